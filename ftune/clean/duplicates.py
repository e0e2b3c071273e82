"""Rows that say the same, or nearly the same, as an earlier row.

What is computed per text (`digests`, `sketches`) needs nothing but the texts, so batches may go to any process in any
order; what compares rows (`first_twins`, `near_pairs`, `clusters`) works on their arrays.
"""

import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from ftune.clean.letters import WINDOW, Flags, Hashes, Letters, Positions, mixed
from ftune.clean.matching import short_form

THRESHOLD = 0.8
"""The Jaccard similarity of their shingles from which texts are near duplicates."""
NUM_SLOTS, SEED = 128, 42
NUM_BANDS, BAND_SLOTS = 21, 6
"""A pair of similarity s agrees in some band with probability 1 - (1 - s^6)^21: 0.998 at 0.8, 0.28 at 0.5."""
AGREE_BY_CHANCE = 1 / 256
"""Each slot is kept as 8 bits, so that different slots agree that often (b-bit minwise hashing, Li and König 2010)."""
NEIGHBOURS = 8
"""Among many rows that agree in a band, each is compared with the first one and with so many before it."""


def digests(texts: Sequence[str]) -> Hashes:
    """128 bits of each text, as (rows, 2) words of 64: the same for the same text.

    The way a character is written (NFC), line ends, and white space at the ends of lines and of the text do not count;
    case, punctuation and indentation do.
    """
    found = b"".join(
        blake2b(_canonical(text).encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts
    )
    return np.frombuffer(found, dtype="<u8").reshape(-1, 2).astype(np.uint64)


def _canonical(text: str) -> str:
    return "\n".join(line.rstrip() for line in unicodedata.normalize("NFC", text).strip().splitlines())


def first_twins(keys: Hashes) -> Positions:
    """For each row of digests the first row with the same one, or -1 where it is the first itself."""
    order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = np.any(keys[order[1:]] != keys[order[:-1]], axis=1)
    firsts = order[np.maximum.accumulate(np.where(is_new, np.arange(len(keys)), 0))]
    twins = np.full(len(keys), -1, dtype=np.int64)
    twins[order] = np.where(is_new, -1, firsts)
    return twins


@dataclass(frozen=True)
class Sketches:
    """MinHash signatures, 212 bytes a row: `slots` (rows, NUM_SLOTS), `bands` (rows, NUM_BANDS)."""

    slots: NDArray[np.uint8]
    bands: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.slots)

    @classmethod
    def joined(cls, parts: Sequence["Sketches"]) -> "Sketches":
        """Those of consecutive batches as one."""
        empty = cls(np.zeros((0, NUM_SLOTS), np.uint8), np.zeros((0, NUM_BANDS), np.uint32))
        parts = [empty, *parts]
        return cls(np.concatenate([p.slots for p in parts]), np.concatenate([p.bands for p in parts]))

    def similarity(self, one: Positions, other: Positions) -> NDArray[np.float64]:
        """The estimated Jaccard similarity of pairs of rows; its standard deviation is at most 0.045 (0.035 at 0.8)."""
        agreeing = np.empty(len(one))
        for start in range(0, len(one), 100_000):
            part = slice(start, start + 100_000)
            agreeing[part] = np.mean(self.slots[one[part]] == self.slots[other[part]], axis=1)
        return np.maximum(0.0, (agreeing - AGREE_BY_CHANCE) / (1 - AGREE_BY_CHANCE))


def sketches(texts: Sequence[str]) -> Sketches:
    """Signatures of the sets of shingles: WINDOW letters from the beginning of each word (of each character, where a
    script has no spaces). A shorter text is one shingle with its numbers and signs, so it is near its copies alone.
    """
    letters = Letters.of(texts)
    sums = letters.sums()
    windows = letters.windows(sums)
    owners = np.repeat(np.arange(len(letters)), np.diff(letters.bounds))[: len(windows)]
    is_shingle = letters.starts[: len(windows)] & (np.arange(len(windows)) + WINDOW < letters.bounds[owners + 1])
    counts = np.bincount(owners[is_shingle], minlength=len(letters))
    whole = np.flatnonzero(counts == 0)
    whole_hashes = digests([short_form(texts[i]) for i in whole.tolist()])[:, 0]
    shingles = np.insert(windows[is_shingle], (np.cumsum(counts) - counts)[whole], whole_hashes)
    offsets = np.concatenate([[0], np.cumsum(np.maximum(counts, 1))]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, NUM_SLOTS, SEED)
    rows = b"".join(array("I", row).tobytes() for row in matrix.to_rows())
    slots = np.frombuffer(rows, dtype=np.uint32).reshape(-1, NUM_SLOTS)
    return Sketches((slots & 0xFF).astype(np.uint8), _bands(slots))


def _bands(slots: NDArray[np.uint32]) -> NDArray[np.uint32]:
    parts = slots[:, : NUM_BANDS * BAND_SLOTS].reshape(-1, NUM_BANDS, BAND_SLOTS).astype(np.uint64)
    value = np.zeros(parts.shape[:2], dtype=np.uint64)
    for slot in range(BAND_SLOTS):
        value = mixed(value ^ parts[:, :, slot])
    return (value >> np.uint64(32)).astype(np.uint32)


def near_pairs(signatures: Sketches, threshold: float = THRESHOLD) -> tuple[Positions, Positions, NDArray[np.float64]]:
    """Pairs of near duplicates as earlier rows, later rows and estimated similarities, each pair once, sorted.

    Every candidate of the bands is checked by the whole signature. Of rows with equal signatures only the first is
    compared with others; `clusters` joins them all. Where more than NEIGHBOURS + 2 different rows agree in a band,
    their order decides which of them are compared.
    """
    twins = first_twins(_words(signatures.slots))
    unique = np.flatnonzero(twins < 0)
    found = [unique[:0] * len(twins)]
    for band in range(NUM_BANDS):
        for earlier, later in _agreeing(signatures.bands[unique, band]):
            pairs = np.unique(unique[earlier] * len(twins) + unique[later])
            is_near = signatures.similarity(*np.divmod(pairs, len(twins))) >= threshold
            found.append(pairs[is_near])
    copies = np.flatnonzero(twins >= 0)
    found.append(twins[copies] * len(twins) + copies)
    first, second = np.divmod(np.unique(np.concatenate(found)), max(1, len(twins)))
    return first, second, signatures.similarity(first, second)


def _words(slots: NDArray[np.uint8]) -> Hashes:
    """The whole signature in two words."""
    parts = np.ascontiguousarray(slots).view(np.uint64)
    words = np.zeros((len(parts), 2), dtype=np.uint64)
    for column in range(parts.shape[1]):
        words[:, 0] = mixed(words[:, 0] ^ parts[:, column])
        words[:, 1] = mixed(words[:, 1] + parts[:, column] * np.uint64(2 * column + 3))
    return words


def _agreeing(values: NDArray[np.uint32]) -> Iterator[tuple[Positions, Positions]]:
    """Pairs of places with equal values, the earlier place first: all pairs in groups of up to NEIGHBOURS + 2."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    firsts = np.maximum.accumulate(np.where(_is_new(ordered), np.arange(len(order)), 0))
    for distance in range(1, NEIGHBOURS + 1):
        later = np.flatnonzero(ordered[distance:] == ordered[:-distance]) + distance
        yield order[later - distance], order[later]
    later = np.flatnonzero(np.arange(len(order)) - firsts > NEIGHBOURS)
    yield order[firsts[later]], order[later]


def _is_new(ordered: NDArray[np.uint32]) -> Flags:
    return np.concatenate([np.ones(min(1, len(ordered)), dtype=bool), ordered[1:] != ordered[:-1]])


def clusters(num_rows: int, *pairs: tuple[Positions, Positions]) -> Positions:
    """For each row the first row of its cluster (itself, where it is that one): pairs joined, and pairs of pairs."""
    first = np.arange(num_rows)
    none = np.zeros(0, dtype=np.int64)
    one = np.concatenate([none, *(pair[0] for pair in pairs)])
    other = np.concatenate([none, *(pair[1] for pair in pairs)])
    while True:
        before = first.copy()
        least = np.minimum(first[one], first[other])
        for side in (one, other):
            np.minimum.at(first, before[side], least)
            np.minimum.at(first, side, least)
        first = first[first]
        if np.array_equal(before, first):
            return first
