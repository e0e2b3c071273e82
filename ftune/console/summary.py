"""The end of a run on one screen: what was learned, what was forgotten, and whether the files are right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from ftune.console.streams import note, results
from ftune.console.tables import Fact, distances, mark, new_table, print_facts, print_titled
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
    worst_fields,
)

COLOURS = {"kept": "green", "forgot": "bold red", "cannot tell": "yellow"}


def print_report(report: Mapping[str, Any], folder: Path | None) -> None:
    """report.json in short; the run's folder holds the page with the rest."""
    console = results()
    console.print(Text(f"{report.get('verdict') or report.get('name', '')}\n", style="bold"))
    _print_task(report.get("task") or {})
    _print_forgetting(report.get("forgetting") or {})
    _print_strengths(report.get("strengths") or [])
    print_facts("Files", _artefact(report.get("artefact") or {}))
    print_facts("Gates", _gates(report.get("gates") or []))
    print_facts("Cost", _cost(report.get("cost") or {}))
    if folder is not None:
        page = Text(str(folder / "report.html"), style="cyan")
        console.print(Text("report  ", style="bold") + page, soft_wrap=True)
        if (folder / "review.html").is_file():
            sheet = Text(str(folder / "review.html"), style="cyan")
            console.print(Text("review  ", style="bold") + sheet, soft_wrap=True)


def _print_task(task: Mapping[str, Any]) -> None:
    if task.get("tuned") is None and task.get("zero_shot") is None:
        _print_missing("Task", task)
        return
    intervals = task.get("intervals") or {}
    table = new_table("", "score", "95 %")
    for name in ("zero_shot", "few_shot", "tuned"):
        score, interval = format_score(task.get(name)), format_interval(intervals.get(name))
        style = "bold" if name == "tuned" else None
        table.add_row(name.replace("_", "-"), score, interval, style=style, end_section=name == "tuned")
    table.add_row("gain", format_score(task.get("gain"), signed=True), format_interval(task.get("ci95")))
    if previous := task.get("previous"):
        table.add_row("previous run", format_score(previous["tuned"]), format_interval(previous.get("interval")))
        table.add_row("gain", format_score(previous["gain"], signed=True), format_interval(previous.get("ci95")))
    print_titled(f"Task: {task['metric']} on {format_count(task['n'])} held-out items", table)
    if wrong := worst_fields(task):
        print_facts("Fields, share right", [(name, format_score(share)) for name, share in wrong])


def _print_forgetting(forgetting: Mapping[str, Any]) -> None:
    suites = list(forgetting.get("suites") or ())
    if len(suites) > 1 and forgetting.get("overall"):
        suites.append(forgetting["overall"])
    if not suites:
        _print_missing("Forgetting", forgetting)
    else:
        table = new_table("", "before → after", "drop", "95 %", "detectable", "verdict")
        for suite in suites:
            verdict = str(suite["verdict"])
            table.add_row(
                Text(str(suite["name"])),
                f"{format_score(suite['before'])} → {format_score(suite['after'])}",
                format_score(suite["drop"]),
                format_interval(suite.get("ci95"), 2),
                format_score(suite.get("minimum_detectable"), 2),
                Text(verdict, style=COLOURS.get(verdict, "")),
            )
        print_titled("Forgetting, by skill", table)
        for told in forgetting.get("notes") or ():
            note(told)
    loss, kl = forgetting.get("general_loss") or {}, forgetting.get("kl_to_base")
    before, after = format_score(loss.get("before")), format_score(loss.get("after"))
    rows: list[Fact] = [
        ("loss", f"{before} → {after} nats per token" if loss.get("before") is not None else NOT_MEASURED),
        ("KL to the base", f"{format_score(kl, 4)} nats per token" if kl is not None else NOT_MEASURED),
    ]
    if forgetting:
        print_facts("General text", rows)


def _print_strengths(strengths: Sequence[Mapping[str, Any]]) -> None:
    """What was trained at several strengths: 0 is the base, 1 all of it."""
    if not strengths:
        return
    table = new_table("strength", "score", "95 %", "worst drop", "general loss", "KL to the base")
    for row in strengths:
        table.add_row(
            f"{row['strength']:g}",
            format_score(row["score"]),
            format_interval(row["ci95"]),
            format_score(row["worst_drop"]),
            format_score(row["general_loss"]),
            format_score(row["kl_to_base"], 4),
        )
    print_titled("Learning against forgetting, by strength", table)


def _print_missing(title: str, part: Mapping[str, Any]) -> None:
    reason = part.get("reason")
    print_titled(title, Text(f"{NOT_MEASURED}, {reason}" if reason else NOT_MEASURED, style="dim"))


def _artefact(artefact: Mapping[str, Any]) -> list[Fact]:
    live, limit = artefact.get("adapter_live"), artefact.get("tolerance")
    words = {True: "its outputs differ from the base's", False: "it changes nothing", None: NOT_MEASURED}
    rows: list[Fact] = [("adapter live", mark(live) + Text(f" {words[live]}"))]
    keys = artefact.get("keys_loaded")
    rows.append(("keys loaded", mark(None if keys is None else are_all(keys)) + Text(f" {keys or NOT_MEASURED}")))
    for name, key in (("reloaded", "reload_max_diff"), ("merged", "merged_max_diff")):
        value = artefact.get(key)
        if value is None:
            rows.append((name, mark(None) + Text(f" {NOT_MEASURED}")))
            continue
        told = f" logits differ by at most {format_difference(value)}" if value else " the same logits"
        bound = "" if limit is None else f" (limit {format_difference(limit)})"
        rows.append((name, mark(None if limit is None else value <= limit) + Text(told + bound)))
    if over := artefact.get("distance_to_trained"):
        rows += distances(over, artefact["kl_to_trained"])
    if changed := artefact.get("forced_base"):
        rows.append(("base", mark(False) + Text(f" not the one trained on: {', '.join(changed)}; forced")))
    if artefact.get("reason"):
        rows.append(("", Text(str(artefact["reason"]), style="dim")))
    return rows


def _gates(gates: Sequence[Mapping[str, Any]]) -> list[Fact]:
    rows: list[Fact] = []
    for gate in gates:
        limit = "" if gate["limit"] is True else f", limit {format_gate(gate['limit'])}"
        rows.append((str(gate["name"]), mark(gate["passed"]) + Text(f" {format_gate(gate['value'])}{limit}")))
    return rows or [("none set", "")]


def _cost(cost: Mapping[str, Any]) -> list[Fact]:
    if not cost:
        return [("not recorded", "")]
    return [
        ("trained", f"{format_count(cost.get('trainable_parameters'))} parameters"),
        ("on", f"{format_count(cost.get('tokens'))} tokens, {format_rate(cost.get('tokens_per_second'))}"),
        ("in", f"{format_duration(cost.get('seconds'))}, evaluation and proofs included"),
        ("peak", format_bytes(cost.get("peak_memory_bytes"))),
    ]
