"""The forgetting probe: what the model could do before, item by item, and what it still can."""

from ftune.probe.asking import ask, chosen
from ftune.probe.comparison import compare, lines, mean_of, suite_of, undetectable, worst_drop
from ftune.probe.divergence import kl_to_base
from ftune.probe.items import Answers, Choice, Item, Marked, Probe, Question
from ftune.probe.loading import load, load_general
from ftune.probe.settings import describe

__all__ = [
    "Answers",
    "Choice",
    "Item",
    "Marked",
    "Probe",
    "Question",
    "ask",
    "chosen",
    "compare",
    "describe",
    "kl_to_base",
    "lines",
    "load",
    "load_general",
    "mean_of",
    "suite_of",
    "undetectable",
    "worst_drop",
]
