"""The supervision audit on a screen: where rows and tokens went, by source and by role, and how long rows are."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftune.console.streams import format_problem, note, results
from ftune.console.tables import Fact, new_table, print_facts, print_titled
from ftune.console.visible import visible
from ftune.errors import Problem
from ftune.quantities import NOT_MEASURED, format_count

BAR_WIDTH = 40  # columns
EIGHTHS = " ▏▎▍▌▋▊▉"
MOST_LONGEST = 3
TOLD = ("rows_in", "rows_used", "dropped", "tokens_truncated", "supervised_tokens", "rows_without_supervision")


def print_audit(data: Mapping[str, Any], console: Console | None = None) -> None:
    """The `data` part of report.json, on stdout unless told otherwise. What an older one lacks is left out."""
    console = console or results()
    print_facts("Data", _facts(data), console)
    if data.get("sources"):
        print_titled("Rows and tokens", _table(data), console)
    if data.get("histogram"):
        print_titled("Tokens a row, before anything is cut off", _histogram(data["histogram"]), console)
    for text, count in (data.get("notes") or {}).items():
        note(visible(text) + (f" ({format_count(count)} rows)" if count else ""))
    if warnings := data.get("warnings"):
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="yellow")
        grid.add_column(overflow="fold")
        for warning in warnings:
            grid.add_row("!", format_problem(Problem(**{key: visible(text) for key, text in warning.items()})))
        print_titled(f"{len(warnings)} warning{'s' * (len(warnings) > 1)}", grid, console)


def _facts(data: Mapping[str, Any]) -> list[Fact]:
    dropped = data.get("dropped") or {}
    rows = f"{format_count(data['rows_in'])} in = {format_count(data['rows_used'])} used"
    facts: list[Fact] = [("rows", rows + f" + {format_count(sum(dropped.values()))} dropped" + _reasons(dropped))]
    if "tokens_in" in data:
        facts.append(("tokens", _tokens(data)))
        share = data["supervised_tokens"] / data["tokens"] if data["tokens"] else 0.0
        facts.append(("supervised", f"{100 * share:.3g} % of the tokens that training sees"))
        ends = data["end_of_turn"]
        told = f"{format_count(ends['supervised'])} of {format_count(ends['tokens'])} tokens supervised"
        facts.append(("end of turn", told if ends["tokens"] else "no such tokens"))
        facts.append(("unsupervised", f"{format_count(data['rows_without_supervision'])} rows"))
    else:
        facts += [(key.replace("_", " "), format_count(data[key])) for key in TOLD[3:] if key in data]
    for key, value in data.items():
        if key not in TOLD and isinstance(value, int | None) and not key.startswith("tokens"):
            told = format_count(value)
            facts.append((key.replace("_", " "), Text(told, style="dim" if told == NOT_MEASURED else "")))
    if len(sources := data.get("sources") or {}) > 1:
        for name, figures in sources.items():
            if figures["dropped"]:
                facts.append(("dropped of", visible(name) + _reasons(figures["dropped"])))
    return facts + _lengths(data)


def _tokens(data: Mapping[str, Any]) -> str:
    dropped = data["tokens_in"] - data["tokens"] - data["tokens_truncated"]
    parts = {
        "supervised": data["supervised_tokens"],
        "read only": data["tokens"] - data["supervised_tokens"],
        "cut off": data["tokens_truncated"],
        "dropped": dropped,
    }
    told = " + ".join(f"{format_count(count)} {name}" for name, count in parts.items())
    return f"{format_count(data['tokens_in'])} in = {told}"


def _lengths(data: Mapping[str, Any]) -> list[Fact]:
    facts: list[Fact] = []
    if found := data.get("quantiles"):
        half, most, nearly_all, longest = (format_count(found[name]) for name in ("median", "p90", "p99", "max"))
        told = f"half up to {half} tokens, 90 % to {most}, 99 % to {nearly_all}, longest {longest}"
        facts.append(("row lengths", told))
    if rows := data.get("longest"):
        told = ", ".join(f"{visible(row['row_id'])} ({format_count(row['tokens'])})" for row in rows[:MOST_LONGEST])
        facts.append(("longest", told))
    return facts


def _table(data: Mapping[str, Any]) -> Table:
    table = new_table("source or role", "rows in", "used", "tokens in", "supervised", "cut off", "dropped")
    parts = [("source", data["sources"]), ("role", data["roles"])]
    for title, part in parts:
        for place, (name, figures) in enumerate(part.items(), 1):
            cells = [figures.get("rows_in", figures.get("rows")), figures.get("rows_used")]
            dropped = figures["tokens_in"] - figures["tokens"] - figures["truncated"]
            cells += [figures["tokens_in"], figures["supervised"], figures["truncated"], dropped]
            told = ["" if cell is None else format_count(cell) for cell in cells]
            label = Text(visible(name), style="bold") if title == "source" else Text(name)
            table.add_row(label, *told, end_section=place == len(part))
    return table


def _histogram(histogram: Mapping[str, Any]) -> Table:
    edges, counts = histogram["edges"], histogram["counts"]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="dim")
    grid.add_column(style="green", no_wrap=True)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        label = format_count(low) if high - low == 1 else f"{format_count(low)}–{format_count(high - 1)}"
        grid.add_row(label, Text(bar(count / max(counts))) + Text(f" {format_count(count)}", style="default"))
    return grid


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of block characters in eighths; what is more than nothing can be seen."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _reasons(dropped: Mapping[str, int]) -> str:
    told = ", ".join(f"{visible(name).replace('_', ' ')} {format_count(n)}" for name, n in dropped.items() if n)
    return f" ({told})" if told else ""
