"""Quantiles of the normal and of Student's t distribution, and binomial probabilities, without another library."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
NORMAL = NormalDist()


def normal_quantile(share: float) -> float:
    return NORMAL.inv_cdf(share)


def t_quantile(share: float, freedom: int) -> float:
    """Student's t by Fisher and Cornish's expansion (Abramowitz and Stegun 1964, 26.7.5), whose error is below 0.1 %
    from 6 degrees of freedom on. Below 3 it is no longer good for anything; there 3 stands, which is too narrow."""
    z, nu = NORMAL.inv_cdf(share), max(freedom, 3)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / nu**order for order, term in enumerate(terms))


def log_factorials(largest: int) -> Values:
    """log k! for k = 0 .. largest."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1, dtype=np.float64)))])


def binomial(numbers: NDArray[np.int64], rate: float) -> Values:
    """P(k successes among n) for each n of `numbers` (rows) and each k = 0 .. the largest of them (columns)."""
    largest = int(numbers.max())
    logs, k = log_factorials(largest), np.arange(largest + 1)
    n = numbers[:, None]
    rest = np.maximum(n - k, 0)
    success, failure = (np.log(share) if share > 0 else -np.inf for share in (rate, 1 - rate))
    with np.errstate(invalid="ignore"):  # 0 * log 0 is 0 here
        weights = np.where(k > 0, k * success, 0.0) + np.where(rest > 0, rest * failure, 0.0)
    found = np.exp(logs[n] - logs[k] - logs[rest] + weights)
    return np.where(k <= n, found, 0.0)
