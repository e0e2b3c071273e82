"""Texts as rows of letters: what is compared when case, punctuation, spacing and width do not count.

A text is folded (NFKC, case) and only its letters, digits, combining marks and emoji stay; spaces and punctuation go,
so `don't`, `dont` and `don t` are one, and scripts without spaces need no word list. A batch of texts is one array, so
that windows of all of them are hashed at once.
"""

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Flags = NDArray[np.bool_]
Positions = NDArray[np.int64]

WINDOW = 16
"""Letters in a window, about three and a half English words or five Chinese characters."""
DENSE_WEIGHT = 3
"""An ideograph, a kana or a Hangul syllable says as much as about three letters, and counts as so many."""

SPACED, UNSPACED, DENSE = 1, 2, 3
"""Kinds of letters: of words with spaces around them, of scripts without spaces, dense and without spaces."""
_UNSPACED_RANGES = [(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF), (0x1A20, 0x1AAF)]
"""Thai and Lao, Myanmar, Khmer, Khmer symbols, Tai Tham."""
_EMOJI_RANGES = [(0x2600, 0x27BF), (0x1F000, 0x1FAFF)]
_VARIATION_SELECTORS = (0xFE00, 0xFE0F)
_LAST_SCANNED, _IDEOGRAPHIC_PLANES = 0x20000, slice(0x20000, 0x40000)

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)


def folded(text: str) -> str:
    """The text in one case and one width, letters, spaces and punctuation all still there."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


@cache
def kinds() -> NDArray[np.uint8]:
    """The kind of every code point; 0 is no letter."""
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    for code in range(_LAST_SCANNED):
        character = chr(code)
        if character.isalnum() or unicodedata.category(character)[0] == "M":
            table[code] = DENSE if unicodedata.east_asian_width(character) in "WF" else SPACED
    for first, last in _UNSPACED_RANGES:
        table[first : last + 1][table[first : last + 1] > 0] = UNSPACED
    for first, last in _EMOJI_RANGES:
        table[first : last + 1] = DENSE
    table[_VARIATION_SELECTORS[0] : _VARIATION_SELECTORS[1] + 1] = 0
    table[_IDEOGRAPHIC_PLANES] = DENSE
    return table


@dataclass(frozen=True)
class Letters:
    """The letters of a batch of texts, one after the other, each text followed by a 0.

    `codes` are code points, dense ones DENSE_WEIGHT times; `starts` says where a word begins (every character of a
    script without spaces does); text i lies in codes[bounds[i] : bounds[i + 1] - 1].
    """

    codes: NDArray[np.unsignedinteger]
    starts: Flags
    bounds: Positions

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Letters":
        parts = [folded(text) for text in texts]
        joined = "\n".join([*parts, ""])
        codes = _code_points(joined)
        kind = kinds()[codes]
        kept = kind > 0
        kept[np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)) + 1) - 1] = True
        places = np.flatnonzero(kept)
        codes, kind = codes[places], kind[places]
        codes[kind == 0] = 0
        starts = kind > SPACED
        starts[1:] |= np.diff(places) > 1
        starts[1:] |= codes[:-1] == 0
        starts[:1] = True
        if np.any(kind == DENSE):
            codes, starts = _repeat_dense(codes, starts, kind == DENSE)
        return cls(codes, starts, np.concatenate([[0], np.flatnonzero(codes == 0) + 1]))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def sizes(self) -> Positions:
        """The number of letters of each text."""
        return np.diff(self.bounds) - 1

    def sums(self) -> Hashes:
        """Prefix sums of letter_j B^j modulo 2^64, from which the hash of any stretch is a difference."""
        sums = np.zeros(len(self.codes) + 1, dtype=np.uint64)
        np.cumsum(self.codes * _powers(_BASE, len(self.codes)), out=sums[1:])
        return sums

    def windows(self, sums: Hashes) -> Hashes:
        """The hash of the WINDOW letters from each position on, as far as there are so many.

        Those that reach beyond the end of their text hold a 0, which no text does.
        """
        count = max(0, len(self.codes) - WINDOW + 1)
        return mixed((sums[WINDOW:] - sums[:-WINDOW])[:count] * _powers(_BASE_INVERSE, count))

    def polynomials(self, sums: Hashes) -> Hashes:
        """For each text, letter_0 + letter_1 B + letter_2 B^2 + ... modulo 2^64: equal letters, equal values."""
        first, last = self.bounds[:-1], self.bounds[1:] - 1
        return (sums[last] - sums[first]) * _powers(_BASE_INVERSE, len(self.codes) + 1)[first]

    def powers(self, exponents: Positions) -> Hashes:
        """B to these powers, at most as many as there are letters."""
        return _powers(_BASE, len(self.codes) + 1)[exponents]


def mixed(hashes: Hashes) -> Hashes:
    """Every bit spread over all bits."""
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MULTIPLIER
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MULTIPLIER
    return hashes ^ (hashes >> np.uint64(32))


def _code_points(text: str) -> NDArray[np.unsignedinteger]:
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _repeat_dense(
    codes: NDArray[np.unsignedinteger], starts: Flags, is_dense: Flags
) -> tuple[NDArray[np.unsignedinteger], Flags]:
    counts = np.where(is_dense, DENSE_WEIGHT, 1)
    firsts = np.cumsum(counts) - counts
    repeated = np.zeros(int(counts.sum()), dtype=bool)
    repeated[firsts] = starts
    return np.repeat(codes, counts), repeated


_POWERS: dict[int, Hashes] = {}


def _powers(base: int, count: int) -> Hashes:
    """base^0, base^1, ... modulo 2^64; computed once and kept."""
    known = _POWERS.get(base)
    if known is None or len(known) < count:
        factors = np.full(max(count, 1 << 16), base, dtype=np.uint64)
        factors[0] = 1
        known = _POWERS[base] = np.cumprod(factors, dtype=np.uint64)
    return known[:count]
