"""Which of some texts may lie inside other texts: an index of the hashes of their windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ftune.clean.letters import WINDOW, Flags, Hashes, Letters, Positions

BOILERPLATE_SHARE, BOILERPLATE_TEXTS = 0.002, 4
"""A window in more than so many of the texts, and than that share of them, belongs to a template and tells nothing."""
FEW_WINDOWS, NEIGHBOURHOOD = 64, 8
"""A text of more windows is known by the lowest hash of each NEIGHBOURHOOD (winnowing, Schleimer et al. 2003)."""
CANDIDATE_SHARE = 0.7
CELLS_PER_WINDOW = 16
_LARGEST = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class WindowIndex:
    """Windows of texts, without those of templates. `own[t]` are the places in text t where one of its own begins;
    `num_special[t]` letters of it lie in no window of a template.

    A text made of templates alone is known by its rarest windows, so that none is ever unfindable.
    """

    own: tuple[Positions, ...]
    num_special: Positions
    num_known: Positions
    hashes: Hashes
    texts: Positions
    bounds: Positions
    table: Flags

    @classmethod
    def of(cls, texts: Sequence[str]) -> "WindowIndex":
        letters = Letters.of(texts)
        places, hashes, owners = _chosen_windows(letters)
        distinct, numbers = np.unique(hashes, return_inverse=True)
        pairs = np.unique(numbers * len(texts) + owners)
        sharing = np.bincount(pairs // len(texts), minlength=len(distinct))[numbers]
        is_own = sharing <= max(BOILERPLATE_TEXTS, BOILERPLATE_SHARE * len(texts))
        has_own = np.bincount(owners[is_own], minlength=len(texts)) > 0
        rarest = np.full(len(texts), len(texts) + 1)
        np.minimum.at(rarest, owners, sharing)
        is_known = np.where(has_own[owners], is_own, sharing == rarest[owners])
        pairs = np.unique(numbers[is_known] * len(texts) + owners[is_known])
        known, counts = np.unique(pairs // len(texts), return_counts=True)
        starts = np.searchsorted(owners[is_own], np.arange(1, len(texts)))
        return cls(
            own=tuple(np.split((places - letters.bounds[owners])[is_own], starts)),
            num_special=_num_outside(letters, places[~is_own]),
            num_known=np.bincount(pairs % len(texts), minlength=len(texts)),
            hashes=distinct[known],
            texts=pairs % len(texts),
            bounds=np.concatenate([[0], np.cumsum(counts)]),
            table=_table(distinct[known]),
        )

    def candidates(self, letters: Letters, sums: Hashes) -> Iterator[tuple[int, int]]:
        """Pairs (place among the letters' texts, text of the index) that share most known windows, best first."""
        windows = letters.windows(sums)
        where = np.flatnonzero(self.table[_cells(windows, self.table)])
        number = np.minimum(np.searchsorted(self.hashes, windows[where]), len(self.hashes) - 1)
        is_hit = self.hashes[number] == windows[where] if len(self.hashes) else np.zeros(0, dtype=bool)
        if not is_hit.any():
            return
        rows = np.searchsorted(letters.bounds, where[is_hit], side="right") - 1
        rows, number = np.divmod(np.unique(rows * len(self.hashes) + number[is_hit]), len(self.hashes))
        counts = np.diff(self.bounds)[number]
        inner = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        texts = self.texts[np.repeat(self.bounds[number], counts) + inner]
        pairs, shared = np.unique(np.repeat(rows, counts) * len(self.own) + texts, return_counts=True)
        rows, texts = np.divmod(pairs, len(self.own))
        share = shared / self.num_known[texts]
        for i in np.lexsort((texts, -share, rows)):
            if share[i] >= CANDIDATE_SHARE:
                yield int(rows[i]), int(texts[i])


def _chosen_windows(letters: Letters) -> tuple[Positions, Hashes, Positions]:
    """Where the windows begin that stand for their texts, their hashes, and whose they are."""
    hashes = letters.windows(letters.sums())
    owners = np.repeat(np.arange(len(letters)), np.diff(letters.bounds))[: len(hashes)]
    is_inside = np.arange(len(hashes)) + WINDOW < letters.bounds[owners + 1]
    is_chosen = letters.sizes[owners] < FEW_WINDOWS + WINDOW
    if len(hashes) >= NEIGHBOURHOOD:
        near = sliding_window_view(np.where(is_inside, hashes, _LARGEST), NEIGHBOURHOOD)
        is_chosen[near.argmin(axis=1) + np.arange(len(near))] = True
    places = np.flatnonzero(is_inside & is_chosen)
    return places, hashes[places], owners[places]


def _num_outside(letters: Letters, places: Positions) -> Positions:
    """How many letters of each text lie outside the windows at these places."""
    depth = np.zeros(len(letters.codes) + 1, dtype=np.int64)
    np.add.at(depth, places, 1)
    np.add.at(depth, places + WINDOW, -1)
    outside = np.zeros(len(depth), dtype=np.int64)
    np.cumsum(np.cumsum(depth[:-1]) == 0, out=outside[1:])
    num_outside: Positions = outside[letters.bounds[1:] - 1] - outside[letters.bounds[:-1]]
    return num_outside


def _table(hashes: Hashes) -> Flags:
    """A flag for the leading bits of each hash: most windows that are not in the index are turned away by it."""
    cells = max(CELLS_PER_WINDOW * len(hashes), 2)
    table = np.zeros(1 << (cells - 1).bit_length(), dtype=bool)
    table[_cells(hashes, table)] = True
    return table


def _cells(hashes: Hashes, table: Flags) -> Hashes:
    return hashes >> np.uint64(65 - len(table).bit_length())
