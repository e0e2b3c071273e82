"""What a test could have found: the smallest true drop that so many, so noisy items show four times in five."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ftune.statistics.hypotheses import SIGNIFICANCE, Scores, is_binary
from ftune.statistics.quantiles import binomial, t_quantile

PLANNED = 0.82
"""What the drop is sought for: a little more than 80 %, because how noisy the items are is known from them alone."""
MOST_EXACT = 1_000  # items up to which McNemar's power is summed over every outcome
HALVINGS = 10  # of the drops from 0 to 1: to 0.001


def minimum_detectable(before: Scores, after: Scores, tests: int = 1) -> float:
    """The smallest true drop that this many items would find (two-sided at 0.05 / `tests`) with 80 % power.

    `tests`: how many suites are judged together; Holm's first step asks 0.05 / tests of the smallest p. What is
    assumed: as many items change either way as did here, one of each more, and the drop comes on top. At most 1,
    which also stands for so few items that even a total loss is not significant.
    """
    drops, level = before - after, SIGNIFICANCE / tests
    n = drops.size
    needed = needed_changes(level)
    if n < needed:
        return 1.0
    if is_binary(before) and is_binary(after):
        churn = (float((drops != 0).sum()) + 2) / (n + 2)
        if n <= MOST_EXACT:
            return _smallest(lambda drop: mcnemar_power(n, churn / 2 + drop, churn / 2, level))
        return max(_solve(n, churn, 1.0, level), _smallest_total(n, needed))
    changes = np.abs(drops[drops != 0])
    if 2 * changes.size > n:
        return _solve(n, float(drops.var(ddof=1)), _weight(changes), level)
    # Most scores stay the same, as 0/1 scores do: what may drop is then whole scores of further items.
    weight = max(_weight(changes), _weight(np.abs(before)))
    variance = (float(drops.var()) * n + 2 * weight**2) / (n + 2)
    return max(_solve(n, variance, weight, level), weight * _smallest_total(n, needed))


def _weight(losses: Scores) -> float:
    """What a drop of 1 adds to the sum of squares when it is made of such losses: sum x^2 / sum x; 1 for 0/1 scores."""
    return float((losses**2).sum() / losses.sum()) if losses.any() else 0.0


def needed_changes(level: float) -> int:
    """How many items must change, all for the worse, before a test at this level can call it: 2 / 2^k below it."""
    return next(count for count in range(1, 1100) if 2.0 ** (1 - count) < level)


def mcnemar_power(n: int, lost: float, gained: float, level: float) -> float:
    """How often McNemar's exact test at `level` finds a loss among n items of which these shares are lost and gained.

    The number of changed items is binomial, and so is, given it, how many of them are lost.
    """
    rate = min(1.0, lost + gained)
    centre, spread = n * rate, 5 * math.sqrt(n * rate * (1 - rate)) + 1
    numbers = np.arange(max(0, int(centre - spread)), min(n, int(centre + spread)) + 1)
    weights = binomial(np.array([n]), rate)[0, numbers]
    outcomes = binomial(numbers, lost / (lost + gained))
    is_found = np.arange(outcomes.shape[1]) >= _needed_losses(n, level)[numbers][:, None]
    return float(weights @ np.where(is_found, outcomes, 0.0).sum(axis=1))


@lru_cache(maxsize=64)
def _needed_losses(n: int, level: float) -> NDArray[np.int64]:
    """Of 0 .. n changed items, how many must be losses for McNemar's p to be below the level."""
    tails = np.flip(np.cumsum(np.flip(binomial(np.arange(n + 1), 0.5), axis=1), axis=1), axis=1)
    needed: NDArray[np.int64] = (2 * tails >= level).sum(axis=1)
    return needed


def _smallest(power: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= PLANNED else (middle, high)
    return high


def _solve(n: int, variance: float, weight: float, level: float) -> float:
    """The d that solves d sqrt(n) = (t_(1 - level/2) + t_0.82) sqrt(variance + weight d - d^2).

    `weight`: see `_weight`. For 0/1 scores it is 1, and this is the sample size of McNemar's test (Miettinen 1968,
    Biometrics 24) with the drop on top of the changes there are.
    """
    z = t_quantile(1 - level / 2, n - 1) + t_quantile(PLANNED, n - 1)
    a, b = n + z * z, z * z * weight
    return (b + math.sqrt(b * b + 4 * a * z * z * variance)) / (2 * a)


def _smallest_total(n: int, needed: int) -> float:
    """If every change is a loss: the rate at which n items show as many as are needed in 82 % of cases."""
    return _smallest(lambda rate: 1 - float(binomial(np.array([n]), rate)[0, :needed].sum()))
