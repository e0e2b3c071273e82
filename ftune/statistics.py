"""How sure we can be of a score and of a difference of two: intervals, tests, and what they could have seen.

The forgetting probe and the evaluation call it with one score per item. Numpy only, deterministic.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Verdict = Literal["forgot", "kept", "cannot tell"]
Scores = NDArray[np.float64]

SIGNIFICANCE = 0.05  # two-sided, everywhere: 95 % intervals
Z_SIGNIFICANCE = 1.959964  # the normal quantile of 1 - SIGNIFICANCE / 2
Z_POWER = 0.841621  # of 80 % power
POWER = 0.8
DRAWS_AT_ONCE = 4_000_000  # bounds the memory of the bootstrap to some 64 MB


@dataclass(frozen=True)
class Paired:
    """The same items scored before and after. `drop` is before - after, so a loss of skill is positive."""

    n: int
    before: float
    after: float
    drop: float
    ci95: Interval | None  # of the drop; None where nothing can be said (see `mean_interval`)
    p_value: float | None  # McNemar's, two-sided; None unless every score is 0 or 1
    num_lost: int  # items that became worse
    num_gained: int  # items that became better
    minimum_detectable: float
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """A row of report.json's forgetting suites, but for the suite's name."""
        return {**asdict(self), "ci95": None if self.ci95 is None else list(self.ci95)}


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval | None:
    """The 95 % interval of the mean.

    Scores that are all 0 or 1: Wilson's score interval, because the bootstrap calls 300 right out of 300
    certain, and because Wilson's covers closest to 95 % on average at any n (Brown, Cai, DasGupta 2001,
    Statistical Science 16). Other scores: percentile bootstrap (Efron 1979). If these are all equal, the
    bootstrap knows nothing; then the bound is on the share of items unlike them that n draws can miss, which
    needs scores within [0, 1]: None for a constant loss. No values raise ValueError.
    """
    scores = np.asarray(values, dtype=np.float64)
    if not scores.size:
        raise ValueError("the mean of no values")
    if _is_binary(scores):
        return _wilson(float(scores.mean()), scores.size)
    if np.all(scores == scores[0]):
        return _unseen(scores, (0.0, 1.0))
    return _bootstrap(scores, seed, resamples)


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    *,
    margin: float = 0.05,
    seed: int = 0,
    resamples: int = 10_000,
) -> Paired:
    """What happened to the same items between two measurements of them; higher scores are better.

    `forgot`: the interval of the drop lies above 0 (and for 0/1 scores McNemar's exact p is below 0.05).
    `kept`: otherwise, if it lies below `margin`, which is what gains do. Else this test `cannot tell`.
    With (tuned, baseline) as arguments the drop is the gain over the baseline. Lists of different lengths or
    empty ones raise ValueError.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"pairs of {first.size} and {second.size} scores")
    drops = first - second
    num_lost, num_gained = int((drops > 0).sum()), int((drops < 0).sum())
    is_binary = _is_binary(first) and _is_binary(second)
    is_bounded = bool(np.all((first >= 0) & (first <= 1) & (second >= 0) & (second <= 1)))
    interval = _drop_interval(drops, (seed, resamples), is_binary, is_bounded)
    p_value = mcnemar(num_lost, num_gained) if is_binary else None
    return Paired(
        n=drops.size,
        before=float(first.mean()),
        after=float(second.mean()),
        drop=float(drops.mean()),
        ci95=interval,
        p_value=p_value,
        num_lost=num_lost,
        num_gained=num_gained,
        minimum_detectable=minimum_detectable(drops, is_binary),
        verdict=_verdict(interval, p_value, margin),
    )


def mcnemar(num_lost: int, num_gained: int) -> float:
    """The exact two-sided p of McNemar's test: were as many items to be lost as gained, how likely is a split
    at least this uneven (McNemar 1947; a binomial test at 1/2 on the items that changed)."""
    changed = num_lost + num_gained
    tail = sum(math.comb(changed, count) for count in range(min(num_lost, num_gained) + 1))
    return min(1.0, 2 * tail / (1 << changed))


def minimum_detectable(drops: Scores, is_binary: bool) -> float:
    """The smallest true drop that so many, so noisy items would find (two-sided at 0.05) with 80 % power.

    0/1 scores, with psi the share of items that changed: the d that solves
    d sqrt(n) = z_0.975 sqrt(psi) + z_0.8 sqrt(psi - d^2)   (Connor 1987, Biometrics 43; Miettinen 1968).
    Other scores, with s the standard deviation of the differences: d = (z_0.975 + z_0.8) s / sqrt(n).
    Never less than what McNemar's exact test needs when every change is a loss, so never 0; at most 1, which
    also stands for fewer than 6 items, where even a total loss is not significant.
    """
    n = drops.size
    if is_binary:
        changed = float(np.mean(drops != 0))
        a, b = Z_SIGNIFICANCE * math.sqrt(changed), Z_POWER**2
        root = math.sqrt(max(a * a * n - (n + b) * (a * a - b * changed), 0.0))
        return min(1.0, max((a * math.sqrt(n) + root) / (n + b), _smallest_exact_drop(n)))
    deviation = float(drops.std(ddof=1)) if n > 1 else 0.0
    if deviation == 0:
        return _smallest_exact_drop(n)
    return (Z_SIGNIFICANCE + Z_POWER) * deviation / math.sqrt(n)


def _verdict(interval: Interval | None, p_value: float | None, margin: float) -> Verdict:
    if interval is None:
        return "cannot tell"
    if interval[0] > 0 and (p_value is None or p_value < SIGNIFICANCE):
        return "forgot"
    return "kept" if interval[1] < margin else "cannot tell"


def _drop_interval(drops: Scores, bootstrap: tuple[int, int], is_binary: bool, is_bounded: bool) -> Interval | None:
    """Paired bootstrap. For 0/1 scores it is too narrow if few items changed (4 lost, none gained: it
    excludes 0 where McNemar's p is 0.125), so there it is widened to Bonett and Price's adjusted Wald
    interval, which covers at small counts (2012, Journal of Educational and Behavioral Statistics 37)."""
    if np.all(drops == drops[0]) and not (is_binary and drops[0] != 0):
        return _unseen(drops, (-1.0, 1.0)) if is_bounded else None
    low, high = _bootstrap(drops, *bootstrap) if drops.size > 1 else (float(drops[0]), float(drops[0]))
    if not is_binary:
        return low, high
    n = drops.size + 2
    lost, gained = (int((drops > 0).sum()) + 1) / n, (int((drops < 0).sum()) + 1) / n
    half = Z_SIGNIFICANCE * math.sqrt((lost + gained - (lost - gained) ** 2) / n)
    middle = lost - gained
    return max(-1.0, min(low, middle - half)), min(1.0, max(high, middle + half))


def _bootstrap(values: Scores, seed: int, resamples: int) -> Interval:
    generator = np.random.default_rng(seed)
    n, rows = values.size, max(1, DRAWS_AT_ONCE // values.size)
    sizes = [(min(rows, resamples - start), n) for start in range(0, resamples, rows)]
    means = [values[generator.integers(0, n, size)].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    return float(low), float(high)


def _wilson(share: float, n: int) -> Interval:
    z2 = Z_SIGNIFICANCE**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_SIGNIFICANCE / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


def _unseen(values: Scores, bounds: Interval) -> Interval | None:
    """n equal values say that other ones are rarer than a share of 1 - 0.025^(1/n) (Clopper and Pearson 1934;
    the exact form of the rule of three); at worst those lie at the bounds."""
    value, (low, high) = float(values[0]), bounds
    if not low <= value <= high:
        return None
    share = 1 - (SIGNIFICANCE / 2) ** (1 / values.size)
    return value - share * (value - low), value + share * (high - value)


def _smallest_exact_drop(n: int) -> float:
    """If every change is a loss, the test needs 6: the rate at which n items show 6 in 80 % of cases."""
    needed = next(count for count in range(1, 64) if mcnemar(count, 0) < SIGNIFICANCE)
    if n < needed:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        fewer = sum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(needed))
        low, high = (low, rate) if 1 - fewer >= POWER else (rate, high)
    return high


def _is_binary(scores: Scores) -> bool:
    return bool(np.all((scores == 0) | (scores == 1)))
