"""95 % intervals of a mean score, and of what it dropped by."""

import math
from collections.abc import Sequence

import numpy as np

from ftune.statistics.hypotheses import DRAWS_AT_ONCE, SIGNIFICANCE, Scores, is_binary
from ftune.statistics.quantiles import NORMAL, normal_quantile, t_quantile

Interval = tuple[float, float]

Z = normal_quantile(1 - SIGNIFICANCE / 2)
FEW_CHANGES = 10
"""With fewer items that changed, and most that did not, a bootstrap of graded scores is too narrow."""
FEW_VALUES = 5


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval | None:
    """The 95 % interval of the mean.

    Scores that are all 0 or 1: Wilson's score interval, because the bootstrap calls 300 right out of 300
    certain, and because Wilson's covers closest to 95 % on average at any n (Brown, Cai, DasGupta 2001,
    Statistical Science 16). Other scores: the bootstrap. If these are all equal, the
    bootstrap knows nothing; then the bound is on the share of items unlike them that n draws can miss, which
    needs scores within [0, 1]: None for a constant loss. No values raise ValueError.
    """
    scores = np.asarray(values, dtype=np.float64)
    if not scores.size:
        raise ValueError("the mean of no values")
    if is_binary(scores):
        return wilson(float(scores.mean()), scores.size)
    if np.all(scores == scores[0]):
        return unseen(scores, (0.0, 1.0))
    return bootstrap(scores, seed, resamples)


def drop_interval(before: Scores, after: Scores, seed: int = 0, resamples: int = 10_000) -> Interval | None:
    """The 95 % interval of the mean of before - after, by paired bootstrap: None where nothing can be said.

    Where few items changed the bootstrap is too narrow (4 of 0/1 lost, none gained: it excludes 0 where McNemar's p is
    0.125), so there it is widened to Bonett and Price's adjusted Wald interval, which counts one lost and one gained
    item more and covers at small counts (2012, Journal of Educational and Behavioral Statistics 37).
    """
    drops = before - after
    both_binary = is_binary(before) and is_binary(after)
    is_bounded = bool(np.all((before >= 0) & (before <= 1) & (after >= 0) & (after <= 1)))
    if np.all(drops == drops[0]) and not (both_binary and drops[0] != 0):
        return unseen(drops, (-1.0, 1.0)) if is_bounded else None
    changed = int((drops != 0).sum())
    is_sparse = is_bounded and changed < FEW_CHANGES and 2 * changed < drops.size
    low, high = bootstrap(drops, seed, resamples) if drops.size > 1 else (float(drops[0]), float(drops[0]))
    if not (both_binary or is_sparse):
        return low, high
    first, second = _adjusted_wald(drops)
    return max(-1.0, min(low, first)), min(1.0, max(high, second))


def bootstrap(values: Scores, seed: int, resamples: int) -> Interval:
    """Percentiles of resampled means (Efron 1979), taken as far out as Student's t is wider than the normal and as
    s is larger than the bootstrap's own spread (Hesterberg 2015, The American Statistician 69, section 5.3).

    Plain percentiles are too narrow by sqrt((n - 1) / n) and by t: at 10 values they cover 88 % rather than 95 %.
    """
    generator = np.random.default_rng(seed)
    n, rows = values.size, max(1, DRAWS_AT_ONCE // values.size)
    different, counts = np.unique(values, return_counts=True)
    if different.size <= FEW_VALUES:  # how often each is drawn says all
        means = [generator.multinomial(n, counts / n, resamples) @ different / n]
    else:
        sizes = [(min(rows, resamples - start), n) for start in range(0, resamples, rows)]
        means = [values[generator.integers(0, n, size)].mean(axis=1) for size in sizes]
    share = NORMAL.cdf(-math.sqrt(n / (n - 1)) * t_quantile(1 - SIGNIFICANCE / 2, n - 1))
    low, high = np.quantile(np.concatenate(means), [share, 1 - share])
    return float(low), float(high)


def wilson(share: float, n: int) -> Interval:
    z2 = Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


def unseen(values: Scores, bounds: Interval) -> Interval | None:
    """n equal values say that other ones are rarer than a share of 1 - 0.025^(1/n) (Clopper and Pearson 1934;
    the exact form of the rule of three); at worst those lie at the bounds."""
    value, (low, high) = float(values[0]), bounds
    if not low <= value <= high:
        return None
    share = 1 - (SIGNIFICANCE / 2) ** (1 / values.size)
    return value - share * (value - low), value + share * (high - value)


def _adjusted_wald(drops: Scores) -> Interval:
    """The normal interval after one item more that lost everything and one that gained everything."""
    padded = np.concatenate([drops, [1.0, -1.0]])
    half = Z * float(padded.std()) / math.sqrt(padded.size)
    return float(padded.mean()) - half, float(padded.mean()) + half
