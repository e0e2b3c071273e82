"""Tests of "nothing was lost": McNemar's for 0/1 scores, sign flips for others, and Holm's step-down for several."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

SIGNIFICANCE = 0.05  # two-sided, everywhere: 95 % intervals
DRAWS_AT_ONCE = 4_000_000  # bounds the memory of resampling to some 64 MB
ALL_FLIPS = 14  # so many differences have 16,384 sign patterns, which are all looked at
FLIPS = 10_000


def is_binary(scores: Scores) -> bool:
    return bool(np.all((scores == 0) | (scores == 1)))


def mcnemar(num_lost: int, num_gained: int) -> float:
    """The exact two-sided p of McNemar's test: were as many items to be lost as gained, how likely is a split
    at least this uneven (McNemar 1947; a binomial test at 1/2 on the items that changed)."""
    changed = num_lost + num_gained
    tail = sum(math.comb(changed, count) for count in range(min(num_lost, num_gained) + 1))
    return min(1.0, 2 * tail / (1 << changed))


def sign_flip(drops: Scores, seed: int = 0) -> float:
    """The two-sided p of Fisher's randomization test: were each difference as likely to be a gain as a loss, how
    likely is a sum at least this far from 0 (Fisher 1935, The Design of Experiments, section 21).

    For differences of 1 and -1 it is McNemar's exact test. Few are flipped in every way, many `FLIPS` times at random,
    where the pattern that was seen counts as one of them, so that p is never too small (Phipson and Smyth 2010).
    """
    changes = np.abs(drops[drops != 0])
    if not changes.size:
        return 1.0
    limit = abs(float(drops.sum())) - 1e-9 * float(changes.sum())
    if changes.size <= ALL_FLIPS:
        patterns = np.arange(1 << changes.size)[:, None] >> np.arange(changes.size) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ changes) >= limit))
    generator = np.random.default_rng([seed, 1])
    rows, width, extreme, done = max(1, DRAWS_AT_ONCE // changes.size), -(-changes.size // 8), 1, 0
    while done < FLIPS:
        count = min(rows, FLIPS - done)
        octets = np.frombuffer(generator.bytes(count * width), np.uint8).reshape(count, width)
        is_flipped = np.unpackbits(octets, axis=1, count=changes.size)
        extreme += int((np.abs(changes.sum() - 2 * (is_flipped @ changes)) >= limit).sum())
        done += count
    return extreme / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p adjusted so that, of all that fall below 0.05, any one is a false alarm in at most 5 % of probes.

    The k-th smallest of m is multiplied by m - k + 1, and none is smaller than one before it (Holm 1979,
    Scandinavian Journal of Statistics 6). It asks nothing of how the tests depend on each other.
    """
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
