"""Several suites judged together, so that all their verdicts raise a false alarm as seldom as one would."""

from collections.abc import Sequence
from dataclasses import replace

from ftune.statistics.hypotheses import holm
from ftune.statistics.paired import MARGIN, Paired, paired_difference, verdict


def judge(
    suites: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    margin: float = MARGIN,
    seed: int = 0,
    resamples: int = 10_000,
) -> list[Paired]:
    """What happened to each suite, given its scores before and after. `forgot` needs an adjusted p below 0.05.

    Intervals are each suite's own 95 %, so one may lie above 0 without the verdict: of many suites some do by chance.
    """
    found = [
        paired_difference(*scores, margin=margin, seed=seed, resamples=resamples, tests=len(suites))
        for scores in suites
    ]
    adjusted = holm([one.p_value for one in found])
    return [
        replace(one, p_adjusted=p, verdict=verdict(one.ci95, p, margin)) for one, p in zip(found, adjusted, strict=True)
    ]
