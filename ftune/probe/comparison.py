"""Two models' answers to one probe: what was lost in each suite, and the items that changed."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from ftune.probe.items import Answers, Marked
from ftune.statistics import Paired, judge, paired_difference


def compare(
    before: Answers, after: Answers, kl: float | None = None, kl_on_task: float | None = None
) -> dict[str, Any]:
    """The `forgetting` part of report.json. All suites are judged together, so that a false alarm stays as seldom as
    with one; `overall` pools their items."""
    first, second = before.suites, after.suites
    assert [one.item for one in before.marked] == [one.item for one in after.marked], "two different probes"
    judged = judge([(_scores(first[name]), _scores(second[name])) for name in first])
    suites = [suite_of(name, one, first[name], second[name]) for name, one in zip(first, judged, strict=True)]
    overall = None
    if suites:
        pooled = paired_difference(_scores(before.marked), _scores(after.marked))
        overall = suite_of("overall", pooled, before.marked, after.marked)
    return {
        "suites": suites,
        "overall": overall,
        "worst_drop": worst_drop(before, after),
        "general_loss": {"before": before.general_loss, "after": after.general_loss},
        "kl_to_base": kl,
        "kl_to_base_on_task": kl_on_task,
        "notes": [],
    }


def worst_drop(before: Answers, after: Answers) -> float | None:
    """The largest drop of a suite's mean score; None without suites."""
    return max((fmean(s) - fmean(after.scores[suite]) for suite, s in before.scores.items()), default=None)


def suite_of(name: str, paired: Paired, before: Sequence[Marked], after: Sequence[Marked]) -> dict[str, Any]:
    """A suite as report.json has it; `accuracies` are of its choices, by both ways to take the likeliest."""
    metrics = dict.fromkeys(one.item.metric for one in before)
    accuracies = {
        kind: {"before": mean_of(before, kind), "after": mean_of(after, kind)}
        for kind in ("acc", "acc_norm")
        if any(one.accuracies and kind in one.accuracies for one in before)
    }
    return {"name": name, "metric": " and ".join(metrics), **paired.as_dict(), "accuracies": accuracies or None}


def mean_of(marked: Sequence[Marked], kind: str) -> float:
    """The mean of one of the accuracies, over the choices among them."""
    return fmean(one.accuracies[kind] for one in marked if one.accuracies and kind in one.accuracies)


def undetectable(suites: Sequence[Mapping[str, Any]], limit: float | None) -> list[str]:
    """What a gate on the worst drop should know: suites too small, or too noisy, to see a drop of its limit."""
    if limit is None:
        return []
    blind = [suite for suite in suites if suite["minimum_detectable"] > limit]
    if not blind:
        return []
    named = ", ".join(f"{s['name']} ({s['minimum_detectable']:.3f} with {s['n']} items)" for s in blind)
    return [
        f"gates.max_forgetting is {limit:g}, and these suites find a drop with 80 % power only from "
        f"more than that on: {named}; the gate may pass or fail by chance there, and more items would help"
    ]


def lines(before: Answers, after: Answers) -> Iterator[dict[str, Any]]:
    """The lines of probe.jsonl: every item with what both models made of it."""
    for one, other in zip(before.marked, after.marked, strict=True):
        line: dict[str, Any] = {
            "suite": one.item.suite,
            "row_id": one.item.row_id,
            "kind": one.item.kind,
            "metric": one.item.metric,
            "prompt": one.item.prompt,
            "expected": one.item.expected,
            "before": one.text,
            "after": other.text,
            "scores": {"before": one.score, "after": other.score},
        }
        if one.item.choices:
            line["choices"] = list(one.item.choices)
            line["log_likelihoods"] = {"before": one.log_likelihoods, "after": other.log_likelihoods}
        yield line


def _scores(marked: Sequence[Marked]) -> list[float]:
    return [one.score for one in marked]
