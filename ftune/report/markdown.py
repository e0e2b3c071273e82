"""report.md: the report as it fits into a pull request."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune.quantities import (
    NOT_MEASURED,
    format_bytes,
    format_count,
    format_difference,
    format_duration,
    format_gate,
    format_interval,
    format_rate,
    format_score,
    worst_fields,
)
from ftune.report.cells import plain as _text
from ftune.report.cells import table as _table
from ftune.report.confusion import Confusion, confusion
from ftune.report.junit import ARTEFACT_CHECKS, artefact_holds
from ftune.report.tradeoff import shown_entries
from ftune.report.verdict import because, verdict
from ftune.report.verdicts import review_bars

MARKS = {True: "✅", False: "❌", None: "➖"}
WORDS: dict[Any, str] = {True: "yes", False: "no", None: NOT_MEASURED}


def markdown(report: Mapping[str, Any]) -> str:
    parts = [
        f"# {_text(report.get('name') or 'ftune')}",
        _text(verdict(report)),
        _gates(report.get("gates") or []),
        "## Task",
        _task(report.get("task") or {}),
        "## Forgetting",
        _forgetting(report.get("forgetting") or {}),
        _path(report),
        _strengths(report),
        _review(report.get("review") or {}),
        "## Files",
        _artefact(report.get("artefact") or {}),
        "## Data and cost",
        _data(report.get("data") or {}),
        _cost(report.get("cost") or {}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{MARKS[bool(gate['passed'])]} {gate['name']}",
            format_gate(gate["value"]),
            format_gate(gate["limit"]),
        ]
        for gate in gates
    ]
    return _table(["gate", "value", "limit"], rows) if rows else "No gates were set."


def _task(task: Mapping[str, Any]) -> str:
    if not task:
        return "Not measured."
    intervals = task.get("intervals") or {}
    rows = [
        [name.replace("_", "-"), format_score(task.get(name)), format_interval(intervals.get(name))]
        for name in ("zero_shot", "few_shot", "tuned")
    ]
    gain = format_score(task.get("gain"), signed=True)
    rows.append(["gain over the better baseline", gain, format_interval(task.get("ci95"))])
    if previous := task.get("previous"):
        name = Path(str(previous["run"])).name
        rows.append(
            [f"previous run {name}", format_score(previous["tuned"]), format_interval(previous.get("interval"))]
        )
        gain = format_score(previous["gain"], signed=True)
        rows.append(["gain over the previous run", gain, format_interval(previous.get("ci95"))])
    table = _table([f"{task.get('metric')}, n = {format_count(task.get('n'))}", "score", "95 % interval"], rows)
    if (labels := confusion(task)) is not None:
        table += "\n\n" + _confusion(labels, task)
    if wrong := worst_fields(task):
        rows = [[name, format_score(share)] for name, share in wrong]
        table += "\n\n" + _table(["field of the answer", "share right"], rows)
    reason = task.get("reason")
    return f"{table}\n\nNot everything was measured: {_text(reason)}." if reason else table


def _confusion(found: Confusion, task: Mapping[str, Any]) -> str:
    """The whole matrix of few labels, the most frequent confusions of many."""
    scores = f"Accuracy {format_score(task.get('accuracy'))}, macro F1 {format_score(task.get('macro_f1'))}"
    if found.is_small:
        rows = [[label, *map(format_count, row)] for label, row in zip(found.labels, found.counts, strict=True)]
        return f"{scores}. Rows are expected labels.\n\n" + _table(["expected", *map(_text, found.labels)], rows)
    rows = [[f"{wanted} → {taken}", format_count(count)] for wanted, taken, count in found.pairs]
    told = f"{scores}, {len(found.labels)} labels."
    return f"{told}\n\n" + _table(["expected → predicted", "items"], rows) if rows else told


def _forgetting(forgetting: Mapping[str, Any]) -> str:
    suites = forgetting.get("suites") or []
    if not suites:
        return f"Not measured{_text(because(forgetting))}."
    overall = forgetting.get("overall")
    rows = [
        [
            f"{suite['name']} (n = {format_count(suite['n'])})",
            f"{format_score(suite['before'])} → {format_score(suite['after'])}",
            format_score(suite["drop"]),
            format_interval(suite.get("ci95")),
            format_score(suite.get("minimum_detectable")),
            _strong(str(suite["verdict"] or NOT_MEASURED)),
        ]
        for suite in [*suites, *([{**overall, "name": "all items"}] if overall else [])]
    ]
    table = _table(["skill", "before → after", "drop", "95 % interval", "detectable", "verdict"], rows)
    loss, kl = forgetting.get("general_loss") or {}, forgetting.get("kl_to_base")
    before, after = format_score(loss.get("before")), format_score(loss.get("after"))
    change = NOT_MEASURED if loss.get("before") is None else f"{before} → {after} nats per token"
    flips = [(format_count(one["num_lost"]), format_count(one["num_gained"])) for one in [overall] if one]
    flipped = "".join(f"\n\nItems that changed: {lost} lost, {gained} gained." for lost, gained in flips)
    return f"{table}{flipped}\n\nGeneral loss: {change}. KL to the base: {format_score(kl, 4)}."


def _path(report: Mapping[str, Any]) -> str:
    """Learning against forgetting while training, and which step was kept."""
    selection = report.get("selection") or {}
    kept = selection.get("step")
    rows = [
        [
            format_count(entry["step"])
            + (" (base)" if entry["step"] == 0 else "")
            + (" ✅" if entry["step"] == kept else ""),
            format_score(entry.get("score")),
            format_score(entry.get("worst_drop")),
            format_score(entry.get("validation_loss")),
        ]
        for entry in shown_entries(report)
    ]
    table = _table(["step", "score", "worst drop", "validation loss"], rows) if rows else ""
    reason = f"; {_text(selection['reason'])}" if selection.get("reason") else ""
    told = "" if kept is None else f"Kept: step {format_count(kept)}{reason}."
    return "\n\n".join(part for part in ("## Path" if rows or told else "", table, told) if part)


def _strengths(report: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{entry['strength']:g}",
            format_score(entry.get("score")),
            format_interval(entry.get("ci95")),
            format_score(entry.get("worst_drop")),
        ]
        for entry in report.get("strengths") or []
    ]
    return "## Strengths\n\n" + _table(["strength", "score", "95 % interval", "worst drop"], rows) if rows else ""


def _review(review: Mapping[str, Any]) -> str:
    if not review:
        return ""
    rows = [
        [bar["name"], f"{bar['count']} of {bar['of']}", format_interval(bar["whisker"], 2)]
        for bar in review_bars(review)
    ]
    judged = f"{format_count(review['n'])} items of the review sheet, {format_count(review['blind'])} blind"
    told = f"{judged}; shares are the sheet's."
    return f"## Review\n\n{told}\n\n" + _table(["verdict", "items", "95 % interval"], rows)


def _artefact(artefact: Mapping[str, Any]) -> str:
    rows = []
    for name in ARTEFACT_CHECKS:
        value = artefact.get(name)
        told = format_difference(value) if name.endswith("diff") else WORDS.get(value, str(value))
        rows.append([f"{MARKS[artefact_holds(name, artefact)]} {name.replace('_', ' ')}", told])
    return _table(["check", "found"], rows)


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return "The data were not recorded."
    dropped = {reason: count for reason, count in (data.get("dropped") or {}).items() if count}
    reasons = ", ".join(f"{_text(reason)} {format_count(count)}" for reason, count in dropped.items())
    used = f"{format_count(data.get('rows_in'))} rows in, {format_count(data.get('rows_used'))} used"
    return f"{used}, {format_count(sum(dropped.values()))} dropped" + (f" ({reasons})." if reasons else ".")


def _cost(cost: Mapping[str, Any]) -> str:
    if not cost:
        return "The cost was not recorded."
    trained = f"{format_count(cost.get('trainable_parameters'))} trainable parameters"
    tokens = f"{format_count(cost.get('tokens'))} tokens at {format_rate(cost.get('tokens_per_second'))}"
    peak = format_bytes(cost.get("peak_memory_bytes"))
    return f"{trained}, {tokens}, {format_duration(cost.get('seconds'))} in all, peak memory {peak}."


def _strong(verdict_word: str) -> str:
    return f"**{verdict_word}**" if verdict_word == "forgot" else verdict_word
