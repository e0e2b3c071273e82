"""A part of the training rows set aside for validation: whole clusters, chosen by content alone."""

import numpy as np

from ftune.clean.letters import Flags, Hashes, Positions, mixed
from ftune.errors import UserError


def split_fraction(keys: Hashes, clusters: Positions, fraction: float, seed: int = 0) -> Flags:
    """Which rows are for validation.

    keys: digests (rows, 2); clusters: for each row the first row of its cluster, as `duplicates.clusters` gives it.
    Clusters come in the order of a hash of the seed and the least digest words among them, and are taken while they fit
    into fraction x rows; one that is too large is passed over. So the number of rows is missed by less than the size of
    the smallest cluster passed over, and neither the order of the rows nor the number of processes matters. At least
    one cluster is on each side; fewer than two clusters, or a fraction outside (0, 1), raise UserError.
    """
    if not 0 < fraction < 1:
        raise UserError(f"a fraction of {fraction} for validation", "data.validation", "give one between 0 and 1")
    heads, numbers, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    if len(heads) < 2:
        raise UserError(
            f"{len(clusters)} training rows without (near) duplicates are {len(heads)}: too few to set some aside",
            "data.validation",
            "give a validation file, or more rows",
        )
    least = np.full((len(heads), 2), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, numbers, keys)
    salt = mixed(np.full(1, seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64))
    order = np.lexsort((least[:, 1], least[:, 0], mixed(least[:, 0] ^ salt)))
    is_chosen = np.zeros(len(heads), dtype=bool)
    is_chosen[_fitting(order, sizes, max(1, round(fraction * len(clusters))))] = True
    return is_chosen[numbers]


def _fitting(order: Positions, sizes: Positions, target: int) -> list[int]:
    """Clusters in order as far as they fit, never all; the smallest one, where none fits."""
    chosen: list[int] = []
    for cluster in order:
        if target >= sizes[cluster] and len(chosen) < len(order) - 1:
            chosen.append(int(cluster))
            target -= int(sizes[cluster])
            if not target:
                break
    return chosen or [int(order[np.argmin(sizes[order])])]
