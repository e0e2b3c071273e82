"""The same items scored before and after: what was lost, how sure that is, and what could not have been seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ftune.statistics.hypotheses import SIGNIFICANCE, is_binary, mcnemar, sign_flip
from ftune.statistics.intervals import Interval, drop_interval
from ftune.statistics.power import minimum_detectable

Verdict = Literal["forgot", "kept", "cannot tell"]
MARGIN = 0.05
"""A drop that is surely smaller than this counts as kept."""


@dataclass(frozen=True)
class Paired:
    """The same items scored before and after. `drop` is before - after, so a loss of skill is positive."""

    n: int
    before: float
    after: float
    drop: float
    ci95: Interval | None  # of the drop; None where nothing can be said (see `drop_interval`)
    p_value: float  # two-sided: McNemar's exact test for scores of 0 and 1, sign flips for others
    p_adjusted: float  # by Holm, when several suites are judged together; else the same
    num_lost: int  # items that became worse
    num_gained: int  # items that became better
    minimum_detectable: float
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """A row of report.json's forgetting suites, but for the suite's name."""
        return {**asdict(self), "ci95": None if self.ci95 is None else list(self.ci95)}


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    *,
    margin: float = MARGIN,
    seed: int = 0,
    resamples: int = 10_000,
    tests: int = 1,
) -> Paired:
    """What happened to the same items between two measurements of them; higher scores are better.

    `forgot`: the interval of the drop lies above 0 and p is below 0.05. `kept`: otherwise, if the interval lies below
    `margin`, which is what gains do. Else this test `cannot tell`.
    With (tuned, baseline) as arguments the drop is the gain over the baseline. `tests`: how many such comparisons are
    judged together (see `judge`), which is what `minimum_detectable` is for. Lists of different lengths or empty
    ones raise ValueError.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"pairs of {first.size} and {second.size} scores")
    drops = first - second
    num_lost, num_gained = int((drops > 0).sum()), int((drops < 0).sum())
    both_binary = is_binary(first) and is_binary(second)
    interval = drop_interval(first, second, seed, resamples)
    p_value = mcnemar(num_lost, num_gained) if both_binary else sign_flip(drops, seed)
    return Paired(
        n=drops.size,
        before=float(first.mean()),
        after=float(second.mean()),
        drop=float(drops.mean()),
        ci95=interval,
        p_value=p_value,
        p_adjusted=p_value,
        num_lost=num_lost,
        num_gained=num_gained,
        minimum_detectable=minimum_detectable(first, second, tests),
        verdict=verdict(interval, p_value, margin),
    )


def verdict(interval: Interval | None, p_value: float, margin: float) -> Verdict:
    if interval is None:
        return "cannot tell"
    if interval[0] > 0 and p_value < SIGNIFICANCE:
        return "forgot"
    return "kept" if interval[1] < margin else "cannot tell"
