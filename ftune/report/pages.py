"""Renders a run folder: reads its files, fills the pages, writes report.html, report.md, junit.xml and review.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune import folder as folders
from ftune import stored
from ftune.folder import RunFolder
from ftune.quantities import LOWER_IS_BETTER, worst_fields
from ftune.report import samples
from ftune.report.confusion import confusion
from ftune.report.curves import Chart, Series, chart, smooth
from ftune.report.environment import printable, template
from ftune.report.flips import choose_flips
from ftune.report.histogram import columns
from ftune.report.junit import ARTEFACT_CHECKS, artefact_holds, junit
from ftune.report.markdown import markdown
from ftune.report.recorded import is_classifier
from ftune.report.review import review_sheet
from ftune.report.tradeoff import path_chart, shown_entries, strength_charts
from ftune.report.verdict import verdict
from ftune.report.verdicts import review_bars

CHECKS = {
    "adapter_live": (
        "The adapter is live",
        "loaded from its files, it changes the base model's outputs",
    ),
    "keys_loaded": ("Every tensor was loaded", "each saved tensor found its place in a fresh model"),
    "reload_max_diff": (
        "A fresh process gives the same model",
        "largest difference of the logits between the model in training and its reload from disk",
    ),
    "merged_max_diff": (
        "Merging keeps the model",
        "largest difference of the logits between the base with the adapter and the merged weights",
    ),
}


def render(folder: Path) -> list[str]:
    """Reads only the folder, so it works a year later, and writes the same bytes each time. Everything but
    report.json may be missing. Raises UserError when report.json is missing or broken. Names what it wrote, and the
    review sheet also where there is none (any more)."""
    run = RunFolder(folder)
    report = stored.read_object(run.report)
    recipe = stored.read_text(run.recipe) if run.recipe.is_file() else None
    rows = _lines(run.samples)
    sheet = review_sheet(str(report.get("name") or "run"), recipe, rows)
    page = template("report.html.jinja").render(
        report=report,
        verdict=verdict(report),
        lengths=columns((report.get("data") or {}).get("histogram")),
        scores=_scores(report.get("task") or {}),
        is_lower_better=(report.get("task") or {}).get("metric") in LOWER_IS_BETTER,
        fields=worst_fields(report.get("task") or {}),
        confusion=confusion(report.get("task") or {}),
        checks=_checks(report.get("artefact") or {}),
        charts=_charts(_lines(run.metrics), "row" if is_classifier(recipe) else "supervised token"),
        path=path_chart(report),
        path_entries=shown_entries(report),
        strengths=strength_charts(report),
        flips=choose_flips(_lines(run.probe)),
        samples=samples.choose(rows),
        sheet=sheet,
        review=review_bars(report.get("review") or {}),
        plan=_optional(run.plan),
        manifest=_optional(run.manifest),
        recipe=recipe,
    )
    texts = {
        "report.html": page,
        "report.md": markdown(report),
        "junit.xml": junit(report),
        run.review.name: sheet.page,
    }
    for name, text in texts.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            folders.write_text(folder / name, printable(text))
    return list(texts)


def _scores(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bars; `left`, `share` and `whisker` are parts of the axis, which is [0, 1] where that holds all scores."""
    intervals = task.get("intervals") or {}
    bars: list[dict[str, Any]] = [
        {"key": key, "name": key.replace("_", "-"), "score": task.get(key), "interval": intervals.get(key)}
        for key in ("zero_shot", "few_shot", "tuned")
    ]
    if previous := task.get("previous"):
        score, interval = previous.get("tuned"), previous.get("interval")
        bars.insert(2, {"key": "previous", "name": "previous run", "score": score, "interval": interval})
    ends = [end for bar in bars for end in [bar["score"], *(bar["interval"] or [])] if end is not None]
    lowest, longest = min([0.0, *ends]), max(ends, default=1.0)
    is_share = lowest >= 0 and longest <= 1 and task.get("metric") not in LOWER_IS_BETTER
    start, end = (0.0, 1.0) if is_share else (1.05 * lowest, 1.05 * max(longest, 0.0))
    scale = end - start or 1.0
    for bar in bars:
        score = bar["score"]
        bar["share"] = None if score is None else abs(score) / scale
        bar["left"] = None if score is None else (min(score, 0.0) - start) / scale
        bar["whisker"] = bar["interval"] and [(end - start) / scale for end in bar["interval"]]
    return bars


def _checks(artefact: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "title": title,
            "meaning": meaning,
            "value": artefact.get(name),
            "is_difference": name.endswith("diff"),
            "holds": artefact_holds(name, artefact),
        }
        for name, (title, meaning) in ((name, CHECKS[name]) for name in ARTEFACT_CHECKS)
    ]


def _charts(metrics: Sequence[Mapping[str, Any]], weighed: str) -> list[Chart]:
    """`weighed` is what the loss is a mean over."""

    def points(key: str) -> list[tuple[float, float]]:
        return [(float(row["step"]), float(row[key])) for row in metrics if row.get(key) is not None]

    loss = points("loss")
    series = [
        Series("each step", "raw", loss),
        Series("smoothed", "smooth", smooth(loss)),
        Series("validation", "dots", points("validation_loss")),
    ]
    found = [
        chart("Loss", f"nats per {weighed}", series),
        chart("Learning rate", "", [Series("", "line", points("learning_rate"))], may_be_log=False),
        chart("Gradient norm", "before clipping", [Series("", "line", points("grad_norm"))]),
    ]
    return [one for one in found if one is not None]


def _lines(path: Path) -> list[dict[str, Any]]:
    return folders.read_json_lines(path) if path.is_file() else []


def _optional(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return stored.read_object(path)
