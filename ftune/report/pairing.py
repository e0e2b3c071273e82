"""The same items scored for two runs, put side by side: only then is a difference of scores one of the models."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftune.report.finished import Finished
from ftune.statistics import paired_difference

TOLERANCE = 1e-6
"""How far a score may lie from the mean of its items' scores to be that mean."""

Scores = dict[tuple[str, ...], float]
"""Items, told apart by what was asked and what was expected, with their scores."""


def scores_of(rows: Iterable[Mapping[str, Any]], keys: Sequence[str], which: str) -> Scores:
    """Equal items are told apart by their order."""
    seen: Counter[tuple[str, ...]] = Counter()
    found: Scores = {}
    for row in rows:
        score = (row.get("scores") or {}).get(which)
        item = tuple(json.dumps(row.get(key), sort_keys=True) for key in keys)
        seen[item] += 1
        if score is not None:
            found[(*item, str(seen[item]))] = float(score)
    return found


def task_scores(run: Finished) -> Scores:
    return scores_of(run.samples, ("prompt", "expected"), "tuned")


def obstacle(first: tuple[str, Scores], second: tuple[str, Scores]) -> str:
    """Why the items of two runs, each with its name, cannot be paired; empty when they can."""
    for name, scores in (first, second):
        if not scores:
            return f"{name} has no scores of single items"
    both = first[1].keys() & second[1].keys()
    if len(both) == len(first[1]) == len(second[1]):
        return ""
    counts = [f"{name} {len(scores)}" for name, scores in (first, second)]
    return f"they were asked different items: {', '.join(counts)}, the same in both {len(both)}"


def paired(first: tuple[str, Scores], second: tuple[str, Scores]) -> dict[str, Any]:
    """How much the second scores above the first, on the same items; `reason` says why nothing can be said."""
    reason = obstacle(first, second)
    document: dict[str, Any] = {"run": second[0], "against": first[0], "n": None, "difference": None, "ci95": None}
    document |= {"p_value": None, "num_better": None, "num_worse": None, "minimum_detectable": None, "reason": reason}
    if reason:
        return document
    items = list(first[1])
    # The drop of `paired_difference` is its first argument minus its second.
    found = paired_difference([second[1][item] for item in items], [first[1][item] for item in items])
    return document | {
        "n": found.n,
        "difference": found.drop,
        "ci95": None if found.ci95 is None else list(found.ci95),
        "p_value": found.p_value,
        "num_better": found.num_lost,
        "num_worse": found.num_gained,
        "minimum_detectable": found.minimum_detectable,
    }


def pair_tasks(first: Finished, second: Finished) -> dict[str, Any]:
    """The difference of two runs on the task. Without the same items and metric there is none; where a score is not
    the mean of its items' (f1, a loss), it has no interval."""
    tasks = {run.name: run.part("task") for run in (first, second)}
    found = paired((first.name, task_scores(first)), (second.name, task_scores(second)))
    metrics = {name: task.get("metric") for name, task in tasks.items()}
    found["metric"] = metrics[second.name]
    for name, task in tasks.items():
        if task.get("tuned") is None:
            return _nothing(found, f"the task was not measured in {name}")
    if len(set(metrics.values())) > 1:
        return _nothing(found, "scored by " + ", ".join(f"{metric} in {name}" for name, metric in metrics.items()))
    headline = tasks[second.name]["tuned"] - tasks[first.name]["tuned"]
    if found["difference"] is None:
        if all(map(task_scores, (first, second))) or not is_same_test(first, second):
            return _nothing(found, found["reason"])
        return found | {"difference": headline, "n": tasks[second.name].get("n")}
    means = [sum(scores.values()) / len(scores) for scores in map(task_scores, (first, second))]
    if any(abs(mean - task["tuned"]) > TOLERANCE for mean, task in zip(means, tasks.values(), strict=True)):
        reason = f"{found['metric']} is not the mean of its items' scores, so it has no paired interval"
        return found | {"difference": headline, "ci95": None, "minimum_detectable": None, "reason": reason}
    return found


def is_same_test(first: Finished, second: Finished) -> bool:
    """Whether both were measured on the same test file, where single items have no scores (a loss)."""
    digests = []
    for run in (first, second):
        path = (run.recipe.get("data") or {}).get("test")
        digests.append((run.manifest.get("data") or {}).get(path))
    return None not in digests and len(set(digests)) == 1


def pair_suites(first: Finished, second: Finished) -> list[dict[str, Any]]:
    """For each suite of the probe that both have, how much better the second run is after training."""
    suites = [suite["name"] for suite in first.part("forgetting").get("suites") or []]
    others = [suite["name"] for suite in second.part("forgetting").get("suites") or []]

    def scores(run: Finished, suite: str) -> tuple[str, Scores]:
        rows = [row for row in run.probe if row.get("suite") == suite]
        return run.name, scores_of(rows, ("prompt", "expected"), "after")

    return [
        {"suite": suite, **paired(scores(first, suite), scores(second, suite))} for suite in suites if suite in others
    ]


def _nothing(found: Mapping[str, Any], reason: str) -> dict[str, Any]:
    silent = dict.fromkeys(("n", "difference", "ci95", "p_value", "num_better", "num_worse", "minimum_detectable"))
    return {**found, **silent, "reason": reason}
