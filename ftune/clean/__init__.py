"""Duplicates, near duplicates, splits without leaks, and training rows that hold items of an evaluation."""

from ftune.clean.contamination import Contamination, Hit, Item
from ftune.clean.duplicates import Sketches, clusters, digests, first_twins, near_pairs, sketches
from ftune.clean.letters import Hashes, Positions
from ftune.clean.split import split_fraction
from ftune.clean.twins import Reason, Twin, from_clusters, from_first_twins, from_hits

__all__ = [
    "Contamination",
    "Hashes",
    "Hit",
    "Item",
    "Positions",
    "Reason",
    "Sketches",
    "Twin",
    "clusters",
    "digests",
    "first_twins",
    "from_clusters",
    "from_first_twins",
    "from_hits",
    "near_pairs",
    "sketches",
    "split_fraction",
]
