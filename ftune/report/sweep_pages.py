"""compare.json as people read it: compare.html with the pictures, compare.md for a pull request."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune import folder
from ftune.quantities import format_bytes, format_count, format_duration, format_interval, format_score
from ftune.report.cells import plain, table
from ftune.report.environment import printable, template
from ftune.report.scatter import Axis, Form, Mark, Scatter, scatter

NAMES = ("compare.json", "compare.md", "compare.html")


def write_pages(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the document and both pages of it into a folder."""
    folder.write_json(path / NAMES[0], document)
    folder.write_text(path / NAMES[1], printable(markdown_page(document)))
    folder.write_text(path / NAMES[2], printable(html_page(document)))


def html_page(document: Mapping[str, Any]) -> str:
    measured = [method for method in document["methods"] if method["num_finished"]]
    return template("sweep.html.jinja").render(document=document, methods=measured, pictures=pictures(document))


def pictures(document: Mapping[str, Any]) -> list[Scatter]:
    """Score against forgetting, memory and time, as far as they were measured."""
    methods = [method for method in document["methods"] if method["score"] is not None]
    score = Axis(
        f"{document['metric']}".replace("_", " ").capitalize(), Form(), is_more_better=not document["lower_is_better"]
    )
    axes = {
        "worst_drop": ("Score against forgetting", Axis("Worst forgetting", Form())),
        "peak_memory_bytes": ("Score against memory", _memory(methods)),
        "training_seconds": ("Score against time", _time(methods)),
    }
    found = []
    for key, (title, axis) in axes.items():
        marks = [Mark(m["label"], _ends(m[key]), _ends(m["score"])) for m in methods if m[key] is not None]
        found.append(scatter(title, marks, axis, score))
    return [picture for picture in found if picture is not None]


def _ends(figure: Mapping[str, float]) -> tuple[float, float, float]:
    return figure["mean"], figure["min"], figure["max"]


def _memory(methods: Sequence[Mapping[str, Any]]) -> Axis:
    most = max((m["peak_memory_bytes"]["max"] for m in methods if m["peak_memory_bytes"]), default=0)
    power, unit = (30, "GiB") if most >= 2**30 else (20, "MiB")
    return Axis(f"Peak memory, {unit}", Form(2.0**power), may_be_log=True)


def _time(methods: Sequence[Mapping[str, Any]]) -> Axis:
    most = max((m["training_seconds"]["max"] for m in methods if m["training_seconds"]), default=0)
    scale, unit = (3600, "hours") if most >= 7200 else (60, "minutes") if most >= 300 else (1, "seconds")
    return Axis(f"Training time, {unit}", Form(scale), may_be_log=True)


def markdown_page(document: Mapping[str, Any]) -> str:
    measured = [method for method in document["methods"] if method["num_finished"]]
    has_range = len(document["seeds"]) > 1
    headings = ["method", document["metric"] or "score", *(["range"] if has_range else []), "to the best"]
    headings += ["95 % interval", "worst forgetting", *(["range"] if has_range else []), "trainable"]
    headings += ["peak memory", "training", "on disk", "gates"]
    failed = [
        [f"{method['label']}, seed {run['seed']}", str(run["error"])]
        for method in document["methods"]
        for run in method["runs"]
        if run["status"] == "failed"
    ] + [[one["label"], f"left out: {one['reason']}"] for one in document["left_out"]]
    seeds = ", ".join(map(str, document["seeds"]))
    words = f"Means over the seeds {seeds}, with their range." if has_range else f"Seed {seeds}."
    parts = [
        f"# {plain(document['name'])}",
        plain(document["verdict"]),
        table(headings, [_row(method, has_range) for method in measured]) if measured else "",
        f"{words} A star marks what no other method beats in score, forgetting, memory and time at once."
        * bool(measured),
        table(["without a result", "why"], failed) if failed else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(method: Mapping[str, Any], has_range: bool) -> list[str]:
    best = method["difference_to_best"] or {}
    score = _mean(method["score"], format_score)
    return [
        f"{method['label']}{' ★' if method['is_undominated'] else ''}",
        f"**{score}**" if method["is_best"] else score,
        *([_range(method["score"])] if has_range else []),
        "best" if method["is_best"] else format_score(best["difference"], signed=True) if best else "-",
        format_interval(best.get("ci95")),
        _mean(method["worst_drop"], format_score),
        *([_range(method["worst_drop"])] if has_range else []),
        _mean(method["trainable_parameters"], format_count),
        _mean(method["peak_memory_bytes"], format_bytes),
        _mean(method["training_seconds"], format_duration),
        _mean(method["bytes_on_disk"], format_bytes),
        ", ".join(method["gates_failed"]) or ("✓" if method["num_gates"] else "-"),
    ]


def _mean(figure: Mapping[str, float] | None, form: Any) -> str:
    return "-" if figure is None else str(form(figure["mean"]))


def _range(figure: Mapping[str, float] | None) -> str:
    return "" if figure is None else format_interval([figure["min"], figure["max"]])
