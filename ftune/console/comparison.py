"""Finished runs side by side on stdout: what differs, then task, forgetting, cost, files and gates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from ftune.console.streams import results
from ftune.console.summary import COLOURS
from ftune.console.tables import mark, new_table, print_titled
from ftune.console.visible import visible
from ftune.quantities import (
    NOT_MEASURED,
    are_all,
    format_bytes,
    format_count,
    format_duration,
    format_interval,
    format_score,
)

MOST_BESIDE = 4
"""So many runs have columns of their own; of more, forgetting is told in figures over all suites."""


def print_comparison(
    document: Mapping[str, Any], told: Sequence[tuple[str, Sequence[str]]], page: Path | None = None
) -> None:
    """`told`: a row a difference, its name and the value of each run, in words. `page` is where it was written."""
    results().print(Text(f"{visible(document['verdict'])}\n", style="bold"))
    runs = document["runs"]
    _print_differences([str(run["name"]) for run in runs], told, document["differences"].get("moved") or [])
    _print_task(runs)
    _print_pairs(document["task_pairs"])
    _print_forgetting(runs)
    _print_cost(runs)
    _print_files(runs)
    if page is not None:
        results().print(Text("page  ", style="bold") + Text(str(page), style="cyan"), soft_wrap=True)


def _print_differences(
    names: Sequence[str], told: Sequence[tuple[str, Sequence[str]]], moved: Sequence[Mapping[str, Any]]
) -> None:
    if told:
        table = new_table("", *names, num_left=1 + len(names))
        for name, values in told:
            table.add_row(Text(visible(name), style="dim"), *(Text(visible(value)) for value in values))
        print_titled("What differs", table)
    else:
        print_titled("What differs", Text("nothing that was recorded", style="dim"))
    if moved:
        names_moved = ", ".join(str(row["name"]) for row in moved)
        print_titled("The same contents under other paths", Text(names_moved, style="dim"))


def _print_task(runs: Sequence[Mapping[str, Any]]) -> None:
    tasks = [run.get("task") or {} for run in runs]
    if all(task.get("tuned") is None for task in tasks):
        print_titled("Task", Text(NOT_MEASURED, style="dim"))
        return
    table = new_table("", "zero-shot", "few-shot", "tuned", "95 %", "gain", "95 %")
    for run, task in zip(runs, tasks, strict=True):
        if task.get("tuned") is None:
            table.add_row(str(run["name"]), "-", "-", "-", "", "-", "")
            continue
        table.add_row(
            str(run["name"]),
            *(_score(task.get(key)) for key in ("zero_shot", "few_shot")),
            Text(_score(task["tuned"]), style="bold"),
            format_interval((task.get("intervals") or {}).get("tuned"), 2),
            format_score(task["gain"], signed=True) if task.get("gain") is not None else "-",
            format_interval(task.get("ci95"), 2),
        )
    kinds = {f"{task['metric']} on {format_count(task['n'])} items" for task in tasks if task.get("metric")}
    print_titled(f"Task: {', '.join(sorted(kinds))}", table)


def _print_pairs(pairs: Sequence[Mapping[str, Any]]) -> None:
    table = new_table("", "difference", "95 %", "p", "better", "worse")
    for pair in pairs:
        name = f"{pair['run']} against {pair['against']}"
        if pair["difference"] is None:
            table.add_row(name, "-", "", "", "", "")
            continue
        better, worse = (
            format_count(pair[key]) if pair[key] is not None else "" for key in ("num_better", "num_worse")
        )
        p_value = "" if pair["p_value"] is None else "< 0.001" if pair["p_value"] < 0.001 else _score(pair["p_value"])
        difference = Text(format_score(pair["difference"], signed=True), style="bold")
        table.add_row(name, difference, format_interval(pair["ci95"]), p_value, better, worse)
    print_titled("The same items, one by one", table)
    for pair in pairs:
        if pair["reason"]:
            results().print(Text(f"  {pair['run']}: {visible(pair['reason'])}\n", style="dim"), soft_wrap=True)


def _print_forgetting(runs: Sequence[Mapping[str, Any]]) -> None:
    parts = [run.get("forgetting") or {} for run in runs]
    suites = list(dict.fromkeys(str(s["name"]) for part in parts for s in part.get("suites") or []))
    if suites and len(runs) <= MOST_BESIDE:
        table = new_table("drop", *(str(run["name"]) for run in runs))
        for name in suites:
            found = [next((s for s in part.get("suites") or [] if s["name"] == name), None) for part in parts]
            table.add_row(visible(name), *map(_drop, found))
        print_titled("Forgetting, by skill", table)
    table = new_table("", "worst drop", "mean drop", "loss", "KL to the base")
    for run, part in zip(runs, parts, strict=True):
        drops = [float(suite["drop"]) for suite in part.get("suites") or []]
        loss = part.get("general_loss") or {}
        change = f"{_score(loss['before'], 2)} → {_score(loss['after'], 2)}" if loss.get("after") is not None else "-"
        mean = sum(drops) / len(drops) if drops else None
        figures = (_score(part.get("worst_drop")), _score(mean), change, _score(part.get("kl_to_base"), 4))
        table.add_row(str(run["name"]), *figures)
    if any(parts):
        print_titled("Forgetting in all", table)
    else:
        print_titled("Forgetting", Text(NOT_MEASURED, style="dim"))


def _drop(suite: Mapping[str, Any] | None) -> Text:
    if suite is None:
        return Text("-", style="dim")
    verdict = str(suite.get("verdict"))
    return Text(f"{_score(suite['drop'])} {verdict:>11}", style=COLOURS.get(verdict, ""))


def _print_cost(runs: Sequence[Mapping[str, Any]]) -> None:
    table = new_table("", "trainable", "tokens", "time", "peak memory", "on disk")
    for run in runs:
        cost = run.get("cost") or {}
        figures = (
            format_count(cost.get("trainable_parameters")),
            format_count(cost.get("tokens")),
            format_duration(cost.get("seconds")),
            format_bytes(cost.get("peak_memory_bytes")),
            format_bytes(run.get("bytes_on_disk")),
        )
        table.add_row(str(run["name"]), *(("-" if figure == NOT_MEASURED else figure) for figure in figures))
    print_titled("Cost", table)


def _print_files(runs: Sequence[Mapping[str, Any]]) -> None:
    table = new_table("", "live", "keys loaded", "reloaded", "merged", "gates", num_left=6)
    for run in runs:
        artefact, gates = run.get("artefact") or {}, run.get("gates") or []
        limit, keys = artefact.get("tolerance"), artefact.get("keys_loaded")
        differences = [artefact.get(key) for key in ("reload_max_diff", "merged_max_diff")]
        failed = [str(gate["name"]) for gate in gates if not gate["passed"]]
        told = f" {', '.join(failed)}" if failed else f" {len(gates)} passed"
        table.add_row(
            str(run["name"]),
            mark(artefact.get("adapter_live")),
            mark(None if keys is None else are_all(keys)) + Text(f" {keys or ''}"),
            *(mark(None if value is None or limit is None else value <= limit) for value in differences),
            mark(not failed) + Text(told) if gates else Text("none set", style="dim"),
        )
    print_titled("Files and gates", table)


def _score(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else format_score(value, digits)
