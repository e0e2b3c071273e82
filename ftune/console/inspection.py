"""`ftune inspect` in a terminal: rows as training sees them, token by token."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ftune.console.audit import print_audit
from ftune.console.streams import results
from ftune.console.visible import visible, visible_lines
from ftune.quantities import format_count

IGNORED = -100  # the label of a token that is not trained on
FIRST, LAST = 1200, 300
"""How many tokens of a long row are shown; --json has all."""

STYLES = {
    (False, False): "dim",
    (False, True): "cyan",
    (True, False): "bold green",
    (True, True): "bold black on green",
}
"""By whether a token is supervised, and whether it is a special one."""


class Token(NamedTuple):
    text: str
    is_supervised: bool
    is_special: bool


def print_inspection(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Each row between its segment's borders, then the audit. Where there is no colour, signs stand for it."""
    console = console or results()
    has_signs = console.no_color or console.color_system is None
    console.print(_legend(has_signs))
    first = 0
    for row in found["rows"]:
        last = first + len(row["labels"])
        console.print()
        _print(console, _heading(row, first, last))
        for part in _body(row, has_signs):
            part.rstrip()
            _print(console, part, margin=2)
        _print(console, _end(row))
        first = last
    if (more := found["data"]["rows_used"] - len(found["rows"])) > 0:
        console.print(Text(f"\n+{format_count(more)} more rows: --rows N shows N, --json all", style="yellow"))
    console.print()
    print_audit(found["data"], console)


def _print(console: Console, text: Text, margin: int = 0) -> None:
    """Wrapped to a terminal, as long as it is into a pipe."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, margin)), overflow="fold")
    else:
        console.print(text, soft_wrap=True)


def _legend(has_signs: bool) -> Text:
    if has_signs:
        return Text("⟦supervised⟧ read only; ⏎ line end, ␣ space at an edge, ⇥ tab")
    names = {(True, False): "supervised", (True, True): "<special>", (False, False): "read", (False, True): "<special>"}
    legend = Text("  ").join(Text(name, style=STYLES[kind]) for kind, name in names.items())
    return legend + Text("  ⏎ line end  ␣ space at an edge  ⇥ tab", style="dim")


def _heading(row: Mapping[str, Any], first: int, last: int) -> Text:
    supervised = sum(label != IGNORED for label in row["labels"])
    facts = [
        f"{format_count(len(row['labels']))} tokens",
        f"{format_count(supervised)} supervised",
        f"segment {row['segment_ids'][0]}: {format_count(first)} to {format_count(last - 1)}",
    ]
    return Text.assemble("╭ ", (visible(str(row["row_id"])), "bold"), ("  " + " · ".join(facts), "dim"))


def _end(row: Mapping[str, Any]) -> Text:
    if not (cut := row.get("tokens_truncated", 0)):
        return Text("╰")
    return Text.assemble("╰ ", (f"✂ +{format_count(cut)} more tokens were cut off by data.max_length", "yellow"))


def _body(row: Mapping[str, Any], has_signs: bool) -> Iterable[Text]:
    labels = row["labels"]
    special = row.get("special_tokens_mask") or [0] * len(labels)
    tokens = [
        Token(text, label != IGNORED, bool(mark))
        for text, label, mark in zip(row["tokens"], labels, special, strict=True)
    ]
    if len(tokens) <= FIRST + LAST:
        yield _text(tokens, has_signs)
        return
    yield _text(tokens[:FIRST], has_signs)
    hidden = tokens[FIRST:-LAST]
    supervised = sum(token.is_supervised for token in hidden)
    told = f"… +{format_count(len(hidden))} more tokens, {format_count(supervised)} supervised: --json has them …"
    yield Text(told, style="yellow")
    yield _text(tokens[-LAST:], has_signs)


def _text(tokens: Sequence[Token], has_signs: bool) -> Text:
    text = Text()
    for is_supervised, run in groupby(tokens, key=lambda token: token.is_supervised):
        text.append("⟦" if has_signs and is_supervised else "")
        for is_special, alike in groupby(run, key=lambda token: token.is_special):
            joined = visible_lines("".join(token.text for token in alike))
            text.append(joined, style=STYLES[is_supervised, is_special])
        text.append("⟧" if has_signs and is_supervised else "")
    return text
