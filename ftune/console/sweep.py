"""A comparison of methods while it runs: one line a run, and below them what the present one is at; then its tables."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from ftune.console.streams import is_live, messages, results
from ftune.console.tables import mark, new_table, print_titled
from ftune.console.visible import visible
from ftune.quantities import (
    NOT_MEASURED,
    format_bytes,
    format_count,
    format_duration,
    format_interval,
    format_score,
)

LOG_SECONDS = 30.0
"""Without a terminal what a run tells is passed on this often."""


class SweepProgress:
    """Fed with `begin`, then `tell` for each line that the run writes, then `end`."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.number = 0
        self.name = ""
        self.line = ""
        self.began = self.told = time.monotonic()

    def begin(self, name: str) -> None:
        self.number, self.name, self.line = self.number + 1, name, "starting"
        self.began = self.told = time.monotonic()
        if not is_live():
            messages().print(Text(f"run {self.number}/{self.total}  {name}"), soft_wrap=True)

    def tell(self, line: str) -> None:
        self.line = " ".join(line.split())
        if not is_live() and time.monotonic() - self.told >= LOG_SECONDS:
            self.told = time.monotonic()
            messages().print(Text(f"  {self.name}  {self.line}"), soft_wrap=True)

    def end(self, passed: bool | None, told: str) -> None:
        """`passed` is None for a run that was there already."""
        head = mark(passed) + Text(f" {self.number}/{self.total}  ") + Text(self.name, style="bold")
        messages().print(head + Text(f"  {visible(told)}"), soft_wrap=True)
        self.name = ""

    def __rich__(self) -> Table:
        line = Table.grid(padding=(0, 1, 0, 0), expand=True)
        for settings in ({"no_wrap": True}, {"no_wrap": True, "ratio": 1, "overflow": "ellipsis"}, {"no_wrap": True}):
            line.add_column(**settings)
        if self.name:
            elapsed = format_duration(time.monotonic() - self.began)
            head = Text(f"  {self.number}/{self.total}  ") + Text(self.name, style="bold")
            line.add_row(head, Text(self.line, style="dim"), Text(elapsed, style="dim"))
        return line


@contextmanager
def sweep_progress(total: int) -> Iterator[SweepProgress]:
    progress = SweepProgress(total)
    if not is_live():
        yield progress
        return
    with Live(progress, console=messages(), refresh_per_second=4, redirect_stdout=False, transient=True):
        yield progress


def print_sweep(document: Mapping[str, Any]) -> None:
    """compare.json in short; the folder holds the page with the pictures."""
    console = results()
    console.print(Text(f"{visible(document['verdict'])}\n", style="bold"))
    measured = [method for method in document["methods"] if method["num_finished"]]
    if measured:
        _print_scores(document, measured)
        _print_forgetting(document, measured)
        _print_cost(measured)
    _print_failed(document)
    page = Text(f"{document['folder']}/compare.html", style="cyan")
    console.print(Text("page  ", style="bold") + page, soft_wrap=True)


def _print_scores(document: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> None:
    num_seeds = len(document["seeds"])
    table = new_table("", "score", *(["range"] * (num_seeds > 1)), "to the best", "95 %", "gates")
    for method in methods:
        best, failed = method["difference_to_best"] or {}, ", ".join(method["gates_failed"])
        table.add_row(
            Text(visible(method["label"]), style="bold" if method["is_best"] else ""),
            _mean(method["score"]),
            *([_range(method["score"])] * (num_seeds > 1)),
            "best" if method["is_best"] else _signed(best.get("difference")),
            format_interval(best.get("ci95"), 2),
            Text(f"✗ {failed}", style="red") if failed else mark(True if method["num_gates"] else None),
        )
    words = f", the mean over {num_seeds} seeds" if num_seeds > 1 else ""
    print_titled(f"Task: {document['metric'] or 'not measured'}{words}", table)


def _print_forgetting(document: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> None:
    if all(method["worst_drop"] is None for method in methods):
        print_titled("Forgetting", Text(NOT_MEASURED, style="dim"))
        return
    num_seeds = len(document["seeds"])
    table = new_table("", "worst drop", *(["range"] * (num_seeds > 1)), "mean drop", "left", "KL to the base")
    for method in methods:
        table.add_row(
            visible(method["label"]),
            _mean(method["worst_drop"]),
            *([_range(method["worst_drop"])] * (num_seeds > 1)),
            _mean(method["mean_drop"]),
            _mean(method["mean_after"]),
            _figure(method["kl_to_base"], lambda value: format_score(value, 4)),
        )
    print_titled("Forgetting; left: what the skills score after it, on average", table)


def _print_cost(methods: Sequence[Mapping[str, Any]]) -> None:
    table = new_table("", "trainable", "peak memory", "training", "in all", "on disk", "unbeaten")
    for method in methods:
        table.add_row(
            visible(method["label"]),
            _figure(method["trainable_parameters"], format_count),
            _figure(method["peak_memory_bytes"], format_bytes),
            _figure(method["training_seconds"], format_duration),
            _figure(method["seconds"], format_duration),
            _figure(method["bytes_on_disk"], format_bytes),
            Text("★", style="green") if method["is_undominated"] else "",
        )
    print_titled("Cost, the mean of the runs; ★ no other method beats it in everything at once", table)


def _print_failed(document: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold red", no_wrap=True)
    table.add_column(overflow="fold")
    runs = [(run, f"{method['label']}, seed {run['seed']}") for method in document["methods"] for run in method["runs"]]
    for run, name in runs:
        if run["status"] == "failed":
            table.add_row(visible(name), Text(visible(str(run["error"]))))
    for left in document["left_out"]:
        table.add_row(
            Text(visible(left["label"]), style="dim"), Text(f"left out: {visible(left['reason'])}", style="dim")
        )
    if table.row_count:
        print_titled("Without a result", table)


def _mean(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None else format_score(figure["mean"])


def _range(figure: Mapping[str, Any] | None) -> str:
    return "" if figure is None else format_interval([figure["min"], figure["max"]], 2)


def _signed(difference: float | None) -> str:
    return "-" if difference is None else format_score(difference, signed=True)


def _figure(figure: Mapping[str, Any] | None, form: Any) -> str:
    return "-" if figure is None else str(form(figure["mean"]))
