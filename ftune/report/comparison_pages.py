"""Finished runs side by side, as a page and as Markdown for a pull request."""

from collections.abc import Mapping, Sequence
from typing import Any

from ftune.quantities import (
    LOWER_IS_BETTER,
    NOT_MEASURED,
    format_bytes,
    format_count,
    format_duration,
    format_interval,
    format_score,
)
from ftune.report.cells import plain, table
from ftune.report.curves import Chart, Series, chart, smooth
from ftune.report.environment import template
from ftune.report.finished import Finished
from ftune.report.junit import ARTEFACT_CHECKS, artefact_holds

NUM_COLOURS = 6
"""Of curves, in comparison.css; further runs begin again with the first."""

Words = Sequence[tuple[str, Sequence[str]]]


def html_page(runs: Sequence[Finished], document: Mapping[str, Any], words: Words) -> str:
    shown = document["runs"]
    return template("comparison.html.jinja").render(
        document=document,
        runs=shown,
        words=words,
        scores=_scores(shown),
        pairs=_places(document["task_pairs"]),
        suites=_suites(shown),
        skill_pairs=_by_suite(document["forgetting_pairs"]),
        checks=[[(name, artefact_holds(name, run.get("artefact") or {})) for name in ARTEFACT_CHECKS] for run in shown],
        chart=_losses(runs),
        not_measured=NOT_MEASURED,
    )


def markdown_page(runs: Sequence[Finished], document: Mapping[str, Any], words: Words) -> str:
    shown = document["runs"]
    names = [str(run["name"]) for run in shown]
    moved = [str(row["name"]) for row in document["differences"].get("moved") or []]
    parts = [
        f"# {plain(', '.join(names))}",
        plain(document["verdict"]),
        "## What differs",
        table(["", *names], [[name, *values] for name, values in words]) if words else "Nothing that was recorded.",
        f"The same contents under other paths: {plain(', '.join(moved))}." if moved else "",
        "## Task",
        table(["run", "zero-shot", "few-shot", "tuned", "95 % interval", "gain", "95 % interval"], _tasks(shown)),
        table(["the same items", "difference", "95 % interval", "better", "worse"], _pairs(document["task_pairs"])),
        *(f"{plain(pair['run'])}: {plain(pair['reason'])}." for pair in document["task_pairs"] if pair["reason"]),
        "## Forgetting",
        _forgetting(shown),
        "## Cost",
        table(["run", "trainable", "tokens", "time", "peak memory", "on disk"], _costs(shown)),
        "## Gates",
        table(["run", "failed", "passed"], _gates(shown)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tasks(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for run in runs:
        task = run.get("task") or {}
        scores = [format_score(task.get(key)) for key in ("zero_shot", "few_shot", "tuned")]
        interval = format_interval((task.get("intervals") or {}).get("tuned"))
        gain = format_score(task.get("gain"), signed=True)
        rows.append([str(run["name"]), *scores, interval, gain, format_interval(task.get("ci95"))])
    return rows


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{pair['run']} against {pair['against']}",
            format_score(pair["difference"], signed=True),
            format_interval(pair["ci95"]),
            *("" if pair[key] is None else format_count(pair[key]) for key in ("num_better", "num_worse")),
        ]
        for pair in pairs
    ]


def _forgetting(runs: Sequence[Mapping[str, Any]]) -> str:
    suites = _suites(runs)
    if not suites:
        return "Not measured."
    names = [str(run["name"]) for run in runs]
    rows = [
        [name, *("-" if suite is None else f"{format_score(suite['drop'])} {suite['verdict']}" for suite in found)]
        for name, found in suites
    ]
    return table(["drop", *names], rows)


def _costs(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for run in runs:
        cost = run.get("cost") or {}
        counts = [format_count(cost.get(key)) for key in ("trainable_parameters", "tokens")]
        sizes = [format_bytes(size) for size in (cost.get("peak_memory_bytes"), run.get("bytes_on_disk"))]
        rows.append([str(run["name"]), *counts, format_duration(cost.get("seconds")), *sizes])
    return rows


def _gates(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for run in runs:
        gates = run.get("gates") or []
        groups = [", ".join(str(g["name"]) for g in gates if bool(g["passed"]) is passed) for passed in (False, True)]
        rows.append([str(run["name"]), *(group or "-" for group in groups)])
    return rows


def _scores(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars; `share` and `whisker` are parts of an axis that ends at 1 for scores up to 1."""
    bars: list[dict[str, Any]] = []
    for run in runs:
        task = run.get("task") or {}
        interval = (task.get("intervals") or {}).get("tuned")
        bars.append({"name": run["name"], "score": task.get("tuned"), "interval": interval, "task": task})
    ends = [end for bar in bars for end in [bar["score"], *(bar["interval"] or [])] if end is not None]
    is_share = all(bar["task"].get("metric") not in LOWER_IS_BETTER for bar in bars)
    longest = max(ends, default=1.0)
    scale = 1.0 if longest <= 1 and is_share else 1.05 * longest or 1.0
    for bar in bars:
        bar["share"] = None if bar["score"] is None else bar["score"] / scale
        bar["whisker"] = bar["interval"] and [end / scale for end in bar["interval"]]
    return bars


def _places(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The pairs with their places on an axis around 0 that holds every interval; `end` is its end."""
    ends = [abs(end) for pair in pairs for end in [pair["difference"], *(pair["ci95"] or [])] if end is not None]
    end = max(ends, default=0.0) or 1.0

    def place(value: float) -> float:
        return (value / end + 1) / 2

    rows = [
        {
            **pair,
            "place": None if pair["difference"] is None else place(pair["difference"]),
            "span": pair["ci95"] and [place(value) for value in pair["ci95"]],
            "tint": _tint(pair),
        }
        for pair in pairs
    ]
    return {"end": end, "rows": rows}


def _tint(pair: Mapping[str, Any]) -> str:
    """The colour of a difference: good, bad, or too small for its interval."""
    if not pair["ci95"] or pair["ci95"][0] <= 0 <= pair["ci95"][1]:
        return "unsure"
    is_better = (pair["difference"] > 0) is (pair.get("metric") not in LOWER_IS_BETTER)
    return "kept" if is_better else "forgot"


def _suites(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """A row a suite of the probe: its name, and what each run has of it."""
    parts = [(run.get("forgetting") or {}).get("suites") or [] for run in runs]
    names = list(dict.fromkeys(str(suite["name"]) for part in parts for suite in part))
    return [(name, [next((s for s in part if s["name"] == name), None) for part in parts]) for name in names]


def _by_suite(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [pair for pair in pairs if pair["difference"] is not None]


def _losses(runs: Sequence[Finished]) -> Chart | None:
    """The training losses of all runs, smoothed, one colour each."""
    series = []
    for index, run in enumerate(runs):
        points = [(float(row["step"]), float(row["loss"])) for row in run.metrics if row.get("loss") is not None]
        if points:
            series.append(Series(run.name, f"line run-{index % NUM_COLOURS}", smooth(points)))
    found = chart("Training loss", "nats, smoothed", series) if series else None

    return found
