"""Plans and methods as tables on stdout; the dictionaries have the shapes of DESIGN.md, section 4."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ftune.console.streams import results
from ftune.quantities import format_bytes, format_count, format_difference

PEAKS = ("training_peak", "evaluation_peak", "merge_peak")
WIDE = 72  # columns
ABILITY_HEADINGS = (
    ("merging", "merges"),
    ("quantized", "4 bits"),
    ("checkpointing", "recompute"),
    ("packing", "packing"),
    ("sharding", "FSDP"),
    ("peft", "PEFT files"),
    ("vllm", "in vLLM"),
)
Fact = tuple[str, str | Text]


def print_titled(title: str, content: RenderableType, console: Console | None = None) -> None:
    """A heading, the content a little to the right, a blank line; on stdout unless told otherwise."""
    console = console or results()
    console.print(Text(title, style="bold"))
    console.print(Padding(content, (0, 0, 1, 2), expand=False))


def print_facts(title: str, rows: Iterable[Fact], console: Console | None = None) -> None:
    """Names in a dim column, what they are beside them."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    print_titled(title, grid, console)


def new_table(*columns: str, num_left: int = 1) -> Table:
    """A light table: the first `num_left` columns hold words, which may wrap, the others numbers,
    which wrap only where a narrow terminal would cut their digits."""
    is_wide = results().width >= WIDE
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        is_words = index < num_left
        justify: Literal["left", "right"] = "left" if is_words else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=is_wide and not is_words)
    return table


def mark(passed: bool | None) -> Text:
    """A check mark, a cross, or a dash for what was not measured."""
    if passed is None:
        return Text("-", style="dim")
    return Text("✓", style="green") if passed else Text("✗", style="bold red")


def distances(largest: Mapping[str, float], kl: Mapping[str, float]) -> list[Fact]:
    """How far the two possible merges lie from what was trained over a quantized base."""
    names = {"full_precision": "full precision", "dequantized": "dequantized"}
    return [
        (
            f"{name} base",
            f"merged, logits lie within {format_difference(largest[key])} of the trained (KL {kl[key]:.1e} nats)",
        )
        for key, name in names.items()
    ]


def print_plans(plans: Sequence[Mapping[str, Any]]) -> None:
    """One plan in full, several side by side."""
    if len(plans) == 1:
        print_plan(plans[0])
        return
    table = new_table("method", "trainable", "percent", "training peak", "evaluation", "smallest card")
    for plan in plans:
        if "problem" in plan:
            table.add_row(Text(str(plan["method"]), style="dim"), Text(f"not here: {plan['problem']}", style="dim"))
            continue
        parameters, memory = plan["parameters"], plan["memory_bytes"]
        table.add_row(
            Text(str(plan["method"]), style="bold"),
            format_count(parameters["trainable"]),
            f"{parameters['percent']:.3g} %",
            format_bytes(memory["training_peak"]),
            format_bytes(memory["evaluation_peak"]),
            next((card.partition(" (")[0] for card, fits in plan["fits"].items() if fits), "none"),
        )
    print_titled("Plans", table)


def print_plan(plan: Mapping[str, Any]) -> None:
    """What training will need; beside it what it needed, where plan.json says so."""
    parameters = plan["parameters"]
    rows: list[Fact] = [
        ("method", str(plan.get("method", "-"))),
        ("parameters", format_count(parameters["total"])),
        ("trainable", f"{format_count(parameters['trainable'])} ({parameters['percent']:.3g} %)"),
        ("steps", _steps(plan.get("steps"))),
    ]
    if targets := plan.get("targets"):
        named = ", ".join(f"{name} {count}" for name, count in targets.items())
        rows.insert(1, ("on", f"{sum(targets.values())} modules in {len(plan['layers'])} layers: {named}"))
    print_facts("Plan", rows)
    measured = (plan.get("measured") or {}).get("memory_bytes")
    print_titled("Memory", _memory_table(plan["memory_bytes"], measured))
    cards = [mark(fits) + Text(f" {card}") for card, fits in plan["fits"].items()]
    print_titled("Fits, by its training peak", Columns(cards, padding=(0, 2)))


def print_methods(methods: Sequence[Mapping[str, Any]]) -> None:
    """One row a method: its name, what it does, its papers, and whether this version has it."""
    table = new_table("name", "what it does", "papers", "here", num_left=4)
    for method in methods:
        is_here = bool(method["available"])
        table.add_row(
            Text(str(method["name"]), style="bold" if is_here else "dim"),
            str(method["description"]),
            ", ".join(map(str, method["papers"])),
            mark(True) if is_here else Text("later", style="dim"),
        )
    print_titled("Methods", table)
    possible = new_table("name", *(heading for _, heading in ABILITY_HEADINGS))
    for method in methods:
        possible.add_row(str(method["name"]), *(mark(bool(method[key])) for key, _ in ABILITY_HEADINGS))
    print_titled("What goes with them", possible)


def _steps(steps: Mapping[str, Any] | None) -> str:
    if steps is None:
        return "unknown without data"
    counts = f"{format_count(steps['total'])} in all, {format_count(steps['per_epoch'])} per epoch"
    return f"{counts}, {format_count(steps['supervised_tokens'])} supervised tokens"


def _memory_table(predicted: Mapping[str, int], measured: Mapping[str, int | None] | None) -> Table:
    table = new_table("", "predicted", *(["measured"] if measured else []))
    names = [name for name in predicted if name not in PEAKS]
    for name in [*names, *PEAKS]:
        cells = [format_bytes(predicted[name])]
        if measured:
            found = measured.get(name)
            cells.append("-" if found is None else format_bytes(found))
        style = "bold" if name in PEAKS else None
        table.add_row(name.replace("_", " "), *cells, style=style, end_section=name == names[-1])
    return table
