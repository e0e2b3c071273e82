"""`ftune report A B`: finished runs side by side, what differs between them, and how sure their difference is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune import folder
from ftune.errors import UserError
from ftune.quantities import LOWER_IS_BETTER, format_interval, format_score
from ftune.report.comparison_pages import html_page, markdown_page
from ftune.report.differences import differences, in_words, told
from ftune.report.environment import printable
from ftune.report.finished import Finished, read_runs
from ftune.report.pairing import pair_suites, pair_tasks
from ftune.stored import as_written

PARTS = ("task", "forgetting", "artefact", "gates", "cost", "data", "selection")
"""What is taken over from each run's report.json."""
LARGE = ("confusion", "histogram", "longest", "sources", "roles")
DIGITS = 2
PAGES: Mapping[str, Callable[..., str]] = {".html": html_page, ".md": markdown_page}


Words = list[tuple[str, list[str]]]


def compare_runs(paths: Sequence[Path], output: Path | None = None) -> tuple[dict[str, Any], Words]:
    """The document of `ftune report A B --json`, and its differences in words; written as a page, too, where `output`
    names one. Every run is set against the first. Raises UserError with everything that is no finished run."""
    if output is not None and output.suffix not in PAGES:
        raise UserError(f"no page can be written as {output.name}", "--output", f"end it in {' or '.join(PAGES)}")
    runs = read_runs(paths)
    with as_written(Path(", ".join(str(path) for path in paths))):
        document = compare_finished(runs)
        words = in_words(document["differences"])
        page = None if output is None else printable(PAGES[output.suffix](runs, document, words))
    if output is not None and page is not None:
        folder.write_text(output, page)
    return document, words


def compare_finished(runs: Sequence[Finished]) -> dict[str, Any]:
    first, *others = runs
    found = differences(runs)
    pairs = [pair_tasks(first, other) for other in others]
    return {
        "schema": 1,
        "verdict": _verdict(runs, pairs, found),
        "runs": [_run(run) for run in runs],
        "differences": found,
        "task_pairs": pairs,
        "forgetting_pairs": [pair for other in others for pair in pair_suites(first, other)],
    }


def _run(run: Finished) -> dict[str, Any]:
    parts = {name: run.report.get(name) for name in PARTS if name in run.report}
    small = {
        name: {key: value for key, value in part.items() if key not in LARGE} if isinstance(part, dict) else part
        for name, part in parts.items()
    }
    return {"name": run.name, "path": str(run.path), "verdict": run.report.get("verdict"), **small} | {
        "bytes_on_disk": run.bytes_on_disk
    }


def _verdict(runs: Sequence[Finished], pairs: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    parts = [difference_told(pair) for pair in pairs]
    drops = {run.name: run.part("forgetting").get("worst_drop") for run in runs}
    if None not in drops.values():
        words = ", ".join(f"{name} {format_score(drop, DIGITS)}" for name, drop in drops.items())
        parts.append(f"worst forgetting: {words}")
    for run in runs:
        if failed := [str(gate["name"]) for gate in run.report.get("gates") or [] if not gate["passed"]]:
            parts.append(f"gate{'s' * (len(failed) > 1)} failed in {run.name}: {', '.join(failed)}")
    return "; ".join([*parts, told(found)]) + "."


def difference_told(pair: Mapping[str, Any]) -> str:
    """One pair in words; claims no more than its interval carries."""
    this, other, difference, interval = pair["run"], pair["against"], pair["difference"], pair["ci95"]
    if difference is None:
        return f"{this} cannot be compared with {other} ({pair['reason']})"
    is_loss = pair.get("metric") in LOWER_IS_BETTER
    subject, object_ = (f"{this}'s {pair['metric']} is", f"{other}'s") if is_loss else (f"{this} scores", other)
    direction = "higher" if difference > 0 else "lower"
    size = format_score(abs(difference), DIGITS)
    if interval is None:
        because = f" ({pair['reason']})" if pair["reason"] else ""
        if not difference:
            return f"{subject} the same as {object_}, without an interval{because}"
        return f"{subject} {size} {direction} than {object_}, without an interval{because}"
    if interval[0] <= 0 <= interval[1]:
        signed = f"{format_score(difference, DIGITS, signed=True)} {format_interval(interval, DIGITS)}"
        return f"{this} does not clearly differ from {other}, {signed}"
    away = interval if difference > 0 else [-interval[1], -interval[0]]
    return f"{subject} {size} {direction} {format_interval(away, DIGITS)} than {object_}"
