"""What was removed, and why: each row with the one it repeats, as a run's JSON lists them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from ftune.clean.contamination import Hit
from ftune.clean.duplicates import Sketches
from ftune.clean.letters import Positions

Reason = Literal["duplicate", "near_duplicate", "equal", "contained", "overlap"]
"""The first two repeat another training row; the others hold an item of an evaluation (see `contamination`)."""


class Twin(NamedTuple):
    """A row, the row or item it repeats, how, and how much of it: 1 is all, else a similarity or a share of n-grams."""

    row_id: str
    twin_id: str
    reason: Reason
    share: float

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


def from_first_twins(twins: Positions, id_of: Callable[[int], str]) -> Iterator[Twin]:
    """Exact duplicates, of what `first_twins` found."""
    for row in np.flatnonzero(twins >= 0).tolist():
        yield Twin(id_of(row), id_of(int(twins[row])), "duplicate", 1.0)


def from_clusters(
    clusters: Positions, signatures: Sketches, id_of: Callable[[int], str], rows: Positions | None = None
) -> Iterator[Twin]:
    """Near duplicates, each with the first row of its cluster; in a chain it may be less alike than the threshold.

    rows: which of them; None is all.
    """
    if rows is None:
        rows = np.flatnonzero(clusters != np.arange(len(clusters)))
    shares = signatures.similarity(clusters[rows], rows)
    for row, first, share in zip(rows.tolist(), clusters[rows].tolist(), shares.tolist(), strict=True):
        yield Twin(id_of(row), id_of(first), "near_duplicate", round(share, 3))


def from_hits(hits: Iterable[Hit], id_of: Callable[[int], str]) -> Iterator[Twin]:
    """Contaminated rows, of what `Contamination.find` found; `id_of` names a row by its place."""
    for hit in hits:
        yield Twin(id_of(hit.row), hit.item_id, hit.kind, round(hit.share, 3))
