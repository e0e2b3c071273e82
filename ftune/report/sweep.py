"""compare.json: what the runs of `ftune compare` say of their methods, with means over seeds and who beats whom."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ftune.quantities import LOWER_IS_BETTER, format_count, format_score
from ftune.report.finished import Finished, read_runs
from ftune.report.pairing import Scores, paired, task_scores

FIGURES = (
    "score",
    "zero_shot",
    "few_shot",
    "worst_drop",
    "mean_drop",
    "mean_after",
    "kl_to_base",
    "trainable_parameters",
    "peak_memory_bytes",
    "training_seconds",
    "seconds",
    "bytes_on_disk",
)
COSTS = ("worst_drop", "peak_memory_bytes", "training_seconds")
"""What a score is bought with; each is the x axis of a picture."""
DIGITS = 2

Method = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How one run ended. `exit_code` is None as long as it has not run."""

    label: str
    seed: int
    path: Path
    exit_code: int | None
    error: str | None

    @classmethod
    def waiting(cls, label: str, seed: int, path: Path) -> "Outcome":
        return cls(label, seed, path, None, None)

    @property
    def is_finished(self) -> bool:
        return self.exit_code is not None and self.error is None


def summarize(folder: Path, outcomes: Sequence[Outcome], left_out: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """compare.json. `exit_code` is 3 when a run failed, else 1 when a gate did."""
    finished = [outcome for outcome in outcomes if outcome.is_finished]
    runs = dict(zip(finished, read_runs([outcome.path for outcome in finished]), strict=True))
    labels = list(dict.fromkeys(outcome.label for outcome in outcomes))
    methods = [_method(label, [o for o in outcomes if o.label == label], runs) for label in labels]
    metric = next((run.part("task").get("metric") for run in runs.values() if run.part("task")), None)
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    _rank(methods, runs, sign)
    statuses = [run["status"] for method in methods for run in method["runs"]]
    return {
        "schema": 1,
        "name": folder.name,
        "folder": str(folder),
        "verdict": _verdict(methods, metric, len({outcome.seed for outcome in outcomes})),
        "exit_code": 3 if "failed" in statuses else 1 if "gate failed" in statuses else 0,
        "metric": metric,
        "lower_is_better": sign < 0,
        "seeds": sorted({outcome.seed for outcome in outcomes}),
        "methods": methods,
        "left_out": [dict(one) for one in left_out],
    }


def _method(label: str, outcomes: Sequence[Outcome], runs: Mapping[Outcome, Finished]) -> Method:
    rows = [_run(outcome, runs.get(outcome)) for outcome in outcomes]
    finished = [row for row in rows if row["status"] in ("ok", "gate failed")]
    reports = [runs[outcome] for outcome in outcomes if outcome in runs]
    settings = next((run.recipe.get("method") for run in reports), None)
    failed = dict.fromkeys(name for row in finished for name in row["gates_failed"])
    return {
        "label": label,
        "method": settings,
        "num_runs": len(rows),
        "num_finished": len(finished),
        "num_failed": sum(row["status"] == "failed" for row in rows),
        **{name: _spread([row[name] for row in finished]) for name in FIGURES},
        "num_gates": max((len(run.report.get("gates") or []) for run in reports), default=0),
        "gates_failed": list(failed),
        "is_best": False,
        "is_undominated": False,
        "difference_to_best": None,
        "runs": rows,
    }


def _run(outcome: Outcome, run: Finished | None) -> dict[str, Any]:
    row = {"seed": outcome.seed, "path": outcome.path.name, "exit_code": outcome.exit_code, "error": outcome.error}
    if run is None:
        status = "waiting" if outcome.exit_code is None else "failed"
        return row | {"status": status, "gates_failed": []} | dict.fromkeys(FIGURES)
    task, forgetting, cost = run.part("task"), run.part("forgetting"), run.part("cost")
    failed = [str(gate["name"]) for gate in run.report.get("gates") or [] if not gate["passed"]]
    drops, left = ([float(suite[key]) for suite in forgetting.get("suites") or []] for key in ("drop", "after"))
    return {
        **row,
        "exit_code": 1 if failed else 0,
        "status": "gate failed" if failed else "ok",
        "gates_failed": failed,
        "score": task.get("tuned"),
        "zero_shot": task.get("zero_shot"),
        "few_shot": task.get("few_shot"),
        "worst_drop": forgetting.get("worst_drop"),
        "mean_drop": mean(drops) if drops else None,
        "mean_after": mean(left) if left else None,
        "kl_to_base": forgetting.get("kl_to_base"),
        "bytes_on_disk": run.bytes_on_disk,
        **{name: cost.get(name) for name in ("trainable_parameters", "peak_memory_bytes")},
        **{name: cost.get(name) for name in ("training_seconds", "seconds")},
    }


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and range over the seeds; None where one of the runs did not measure it."""
    found = [value for value in values if value is not None]
    if not found or len(found) < len(values):
        return None
    return {"mean": mean(found), "min": min(found), "max": max(found)}


def _rank(methods: Sequence[Method], runs: Mapping[Outcome, Finished], sign: float) -> None:
    """Marks the best score, how far the others lie from it, and what no other method beats in everything at once."""
    scored = [method for method in methods if method["score"] is not None]
    measured = [method for method in methods if method["num_finished"]]
    axes: list[Callable[[Method], float | None]] = [lambda method: -sign * method["score"]["mean"]] if scored else []
    axes += [lambda method, name=name: method[name] and method[name]["mean"] for name in COSTS]  # type: ignore[misc]
    axes = [axis for axis in axes if all(axis(method) is not None for method in measured)]
    for method in undominated(measured, axes):
        method["is_undominated"] = True
    if not scored:
        return
    best = max(scored, key=lambda method: sign * float(method["score"]["mean"]))
    best["is_best"] = True
    items = {method["label"]: _mean_scores(method["label"], runs) for method in scored}
    for method in scored:
        if method is not best:
            difference = paired((best["label"], items[best["label"]]), (method["label"], items[method["label"]]))
            headline = method["score"]["mean"] - best["score"]["mean"]
            if difference["difference"] is None or abs(difference["difference"] - headline) > 1e-6:
                reason = difference["reason"] or "the score is not the mean of its items' scores"
                difference |= {"difference": headline, "ci95": None, "minimum_detectable": None, "reason": reason}
            # Means over seeds are no longer right or wrong, so that McNemar's test says nothing of them.
            method["difference_to_best"] = difference


def undominated(methods: Sequence[Method], axes: Sequence[Callable[[Method], float | None]]) -> list[Method]:
    """Those that no other one equals or beats on every axis, less being better, and beats on one."""
    places = [[axis(method) or 0.0 for axis in axes] for method in methods]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)

    return [
        method
        for method, place in zip(methods, places, strict=True)
        if axes and not any(beats(other, place) for other in places)
    ]


def _mean_scores(label: str, runs: Mapping[Outcome, Finished]) -> Scores:
    """Each test item's score, the mean over the seeds; empty when these were not asked the same."""
    found = [task_scores(run) for outcome, run in runs.items() if outcome.label == label]
    if any(scores.keys() != found[0].keys() for scores in found):
        return {}
    return {item: mean(scores[item] for scores in found) for item in found[0]}


def _verdict(methods: Sequence[Method], metric: str | None, num_seeds: int) -> str:
    measured = [method for method in methods if method["num_finished"]]
    parts = []
    if best := next((method for method in measured if method["is_best"]), None):
        parts.append(_best(best, measured, metric, num_seeds))
    elif measured:
        parts.append("the task was not measured")
    drops = [method for method in measured if method["worst_drop"] is not None]
    if drops:
        least = min(drops, key=lambda method: float(method["worst_drop"]["mean"]))
        parts.append(f"{least['label']} forgets least, {format_score(least['worst_drop']['mean'], DIGITS)}")
    smallest = [method for method in measured if method["trainable_parameters"] is not None]
    if len(smallest) > 1:
        fewest = min(smallest, key=lambda method: float(method["trainable_parameters"]["mean"]))
        count = format_count(fewest["trainable_parameters"]["mean"])
        parts.append(f"{fewest['label']} trains fewest parameters, {count}")
    for name in dict.fromkeys(name for method in methods for name in method["gates_failed"]):
        having = [method["label"] for method in methods if name in method["gates_failed"]]
        parts.append(f"gate failed: {name} by {', '.join(having)}")
    for method in methods:
        if method["num_failed"]:
            of = "" if method["num_runs"] == 1 else f" in {method['num_failed']} of {method['num_runs']} runs"
            parts.append(f"{method['label']} did not finish{of}")
    sentence = "; ".join(parts) or "nothing has finished"
    return f"{sentence}."


def _best(best: Method, measured: Sequence[Method], metric: str | None, num_seeds: int) -> str:
    score, name = best["score"], f"{metric} " if metric in LOWER_IS_BETTER else ""
    told = f"{best['label']} scores best, {name}{format_score(score['mean'], DIGITS)}"
    if num_seeds > 1:
        low, high = (format_score(score[end], DIGITS) for end in ("min", "max"))
        told += f" ({low} to {high} over {num_seeds} seeds)"
    close = []
    for method in measured:
        interval = (method["difference_to_best"] or {}).get("ci95")
        if interval and interval[0] <= 0 <= interval[1]:
            close.append(method["label"])
    if close:
        told += f", and {', '.join(close)} {'does' if len(close) == 1 else 'do'} not clearly differ"
    return told
