"""The end of a run on one screen: what was learned, what was forgotten, and whether the files are right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ftune.console.streams import results
from ftune.console.tables import facts, mark, new_table
from ftune.quantities import (
    NOT_MEASURED,
    are_all,
    format_bytes,
    format_count,
    format_difference,
    format_duration,
    format_gate,
    format_interval,
    format_rate,
    format_score,
)

COLOURS = {"kept": "green", "forgot": "bold red", "cannot tell": "yellow"}


def print_report(report: Mapping[str, Any], folder: Path | None) -> None:
    """report.json in short; the run's folder holds the page with the rest."""
    console = results()
    console.print(Text(str(report.get("verdict") or report.get("name", "")), style="bold"), end="\n\n")
    console.print(_task(report.get("task")))
    console.print(_forgetting(report.get("forgetting")))
    for title, rows in (
        ("Files", _artefact(report.get("artefact") or {})),
        ("Gates", _gates(report.get("gates") or [])),
        ("Cost", _cost(report.get("cost") or {})),
    ):
        console.print(Text(title, style="bold"), facts(rows), sep="\n", end="\n\n")
    if folder is not None:
        console.print(
            Text("report  ", style="dim") + Text(str(folder / "report.html"), style="cyan"), soft_wrap=True
        )


def _task(task: Mapping[str, Any] | None) -> Table | Text:
    if not task or task.get("n") is None:
        return _missing("Task", task)
    intervals = task.get("intervals") or {}
    table = new_table(
        f"Task: {task['metric']} on {format_count(task['n'])} held-out items", "", "score", "95 %"
    )
    for name in ("zero_shot", "few_shot", "tuned"):
        style = "bold" if name == "tuned" else None
        score, interval = format_score(task.get(name)), format_interval(intervals.get(name))
        table.add_row(name.replace("_", "-"), score, interval, style=style, end_section=name == "tuned")
    table.add_row("gain", format_score(task.get("gain"), signed=True), format_interval(task.get("ci95")))
    return table


def _forgetting(forgetting: Mapping[str, Any] | None) -> Table | Text | Group:
    if not forgetting:
        return _missing("Forgetting", forgetting)
    parts: list[Table] = []
    if suites := forgetting.get("suites"):
        headings = ("before", "after", "drop", "95 %", "detectable", "verdict")
        parts.append(table := new_table("Forgetting, by skill", "", *headings))
        for suite in suites:
            verdict = str(suite["verdict"])
            table.add_row(
                Text(str(suite["name"])),
                format_score(suite["before"], 2),
                format_score(suite["after"], 2),
                format_score(suite["drop"], 2),
                format_interval(suite.get("ci95"), 2),
                format_score(suite.get("minimum_detectable"), 2),
                Text(verdict, style=COLOURS.get(verdict, "")),
            )
    loss = forgetting.get("general_loss") or {}
    rows = [
        (
            "general loss",
            f"{format_score(loss.get('before'))} → {format_score(loss.get('after'))} nats per token",
        ),
        ("KL to base", f"{format_score(forgetting.get('kl_to_base'), 4)} nats per token"),
    ]
    return Group(*parts, facts(row for row in rows if NOT_MEASURED not in row[1]), "")


def _missing(title: str, part: Mapping[str, Any] | None) -> Text:
    reason = (part or {}).get("reason")
    words = f"{NOT_MEASURED}, {reason}" if reason else NOT_MEASURED
    return Text.assemble((title, "bold"), "\n", (f"  {words}\n", "dim"))


def _artefact(artefact: Mapping[str, Any]) -> list[tuple[str, str | Text]]:
    live, limit = artefact.get("adapter_live"), artefact.get("tolerance")
    words = {True: "its outputs differ from the base's", False: "it changes nothing", None: NOT_MEASURED}
    rows: list[tuple[str, str | Text]] = [("adapter live", mark(live) + Text(f" {words[live]}"))]
    keys = artefact.get("keys_loaded")
    rows.append(
        ("keys loaded", mark(None if keys is None else are_all(keys)) + Text(f" {keys or NOT_MEASURED}"))
    )
    for name, key in (("reloaded", "reload_max_diff"), ("merged", "merged_max_diff")):
        value = artefact.get(key)
        if value is None:
            rows.append((name, mark(None) + Text(f" {NOT_MEASURED}")))
            continue
        told = f" logits differ by at most {format_difference(value)}"
        bound = "" if limit is None else f" (limit {format_difference(limit)})"
        rows.append((name, mark(None if limit is None else value <= limit) + Text(told + bound)))
    if artefact.get("reason"):
        rows.append(("", Text(str(artefact["reason"]), style="dim")))
    return rows


def _gates(gates: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | Text]]:
    if not gates:
        return [("none set", "")]
    return [
        (
            str(gate["name"]),
            mark(gate["passed"]) + Text(f" {format_gate(gate['value'])}, limit {format_gate(gate['limit'])}"),
        )
        for gate in gates
    ]


def _cost(cost: Mapping[str, Any]) -> list[tuple[str, str | Text]]:
    return [
        ("trained", f"{format_count(cost.get('trainable_parameters'))} parameters"),
        ("on", f"{format_count(cost.get('tokens'))} tokens, {format_rate(cost.get('tokens_per_second'))}"),
        ("in", f"{format_duration(cost.get('seconds'))}, evaluation and proofs included"),
        ("peak", format_bytes(cost.get("peak_memory_bytes"))),
    ]
