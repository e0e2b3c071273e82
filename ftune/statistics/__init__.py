"""How sure we can be of a score and of a difference of two: intervals, tests, and what they could have seen.

The forgetting probe and the evaluation call it with one score per item. Numpy only, deterministic.
"""

from ftune.statistics.family import judge
from ftune.statistics.hypotheses import SIGNIFICANCE, holm, mcnemar, sign_flip
from ftune.statistics.intervals import Interval, drop_interval, mean_interval
from ftune.statistics.paired import MARGIN, Paired, Verdict, paired_difference
from ftune.statistics.power import minimum_detectable

__all__ = [
    "MARGIN",
    "SIGNIFICANCE",
    "Interval",
    "Paired",
    "Verdict",
    "drop_interval",
    "holm",
    "judge",
    "mcnemar",
    "mean_interval",
    "minimum_detectable",
    "paired_difference",
    "sign_flip",
]
