"""How often an epoch sees the rows of each source, and in which order: pure functions of seed and epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
SOURCE_STREAM = 5
"""Keeps the draws of single sources apart from other uses of the seed."""


@dataclass(frozen=True)
class Mixture:
    """Examples of each source, one source behind the other, and how many of them one epoch sees."""

    counts: tuple[int, ...]
    per_epoch: tuple[int, ...]

    @classmethod
    def of(cls, counts: Sequence[int], weights: Sequence[float]) -> "Mixture":
        """A weight of 3 shows each row of a source three times an epoch, one of 0.5 half of its rows."""
        pairs = zip(counts, weights, strict=True)
        return cls(tuple(counts), tuple(max(1, round(count * weight)) if count else 0 for count, weight in pairs))

    def __len__(self) -> int:
        """Examples that an epoch sees."""
        return sum(self.per_epoch)

    def order(self, seed: int, epoch: int) -> Indices:
        """The examples of an epoch, in order. Every row of a source is seen once more before any is seen again."""
        shuffled = np.random.default_rng([seed, epoch]).permutation
        if self.per_epoch == self.counts:
            return shuffled(sum(self.counts))
        starts = np.cumsum([0, *self.counts[:-1]])
        return shuffled(np.concatenate([s + self._drawn(k, seed, epoch) for k, s in enumerate(starts)]))

    def _drawn(self, source: int, seed: int, epoch: int) -> Indices:
        """The rows of one source in an epoch: the next ones of an endless row of permutations."""
        count, wanted = self.counts[source], self.per_epoch[source]
        places = np.arange(epoch * wanted, (epoch + 1) * wanted)
        drawn = np.empty(wanted, np.int64)
        for cycle in range(int(places[0]) // count, int(places[-1]) // count + 1) if wanted else ():
            permutation = np.random.default_rng([seed, SOURCE_STREAM, source, cycle]).permutation(count)
            inside = places // count == cycle
            drawn[inside] = permutation[places[inside] % count]
        return drawn


@lru_cache(maxsize=4)
def order(mixture: Mixture, seed: int, epoch: int) -> Indices:
    """The same, remembered: every step of an epoch asks for it."""
    return mixture.order(seed, epoch)
