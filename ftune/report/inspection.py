"""`ftune inspect --html`: one page of rows as training sees them, with the audit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune import folder
from ftune.console.visible import signs, visible
from ftune.report.environment import printable, template
from ftune.report.histogram import columns

MOST_TOKENS = 30_000
"""Of a page, which is then some 4 MB; rows beyond are left out, and the page says so."""
FIRST, LAST = 2400, 600
"""Of a long row."""
IGNORED = -100


@dataclass(frozen=True)
class Piece:
    """Some text and what is told when it is pointed at; or, in the middle of a long row, how many are hidden."""

    text: str
    kind: str
    """CSS classes: s for supervised, x for special."""
    told: str
    hidden: int = 0


@dataclass(frozen=True)
class ShownRow:
    row_id: str
    segment: int
    first: int
    num_tokens: int
    num_supervised: int
    truncated: int
    pieces: list[Piece]


def write_inspection(found: Mapping[str, Any], path: Path, name: str) -> None:
    """The page of what `ftune inspect --json` prints."""
    folder.write_text(path, inspection_page(found, name))


def inspection_page(found: Mapping[str, Any], name: str) -> str:
    rows: list[ShownRow] = []
    first = 0
    for row in found["rows"]:
        if rows and first + len(row["labels"]) > MOST_TOKENS:
            break
        rows.append(_shown(row, first))
        first += len(row["labels"])
    data = found["data"]
    page = template("inspection.html.jinja").render(
        name=visible(name), data=data, lengths=columns(data.get("histogram")), rows=rows, num_rows=len(found["rows"])
    )
    return printable(page)


def _shown(row: Mapping[str, Any], first: int) -> ShownRow:
    num_tokens = len(row["labels"])
    if num_tokens <= FIRST + LAST:
        shown = _pieces(row, range(num_tokens))
    else:
        hidden = Piece("", "", "", num_tokens - FIRST - LAST)
        end = range(num_tokens - LAST, num_tokens)
        shown = [*_pieces(row, range(FIRST)), hidden, *_pieces(row, end)]
    return ShownRow(
        visible(str(row["row_id"])),
        row["segment_ids"][0],
        first,
        num_tokens,
        sum(label != IGNORED for label in row["labels"]),
        row.get("tokens_truncated", 0),
        shown,
    )


def _pieces(row: Mapping[str, Any], places: Sequence[int]) -> list[Piece]:
    """Tokens that make a character only together are one piece."""
    special = row.get("special_tokens_mask") or [0] * len(row["labels"])
    found: list[Piece] = []
    waiting: list[int] = []
    for place in places:
        waiting.append(place)
        text = row["tokens"][place]
        if not text and place != places[-1]:
            continue
        kinds = ["s" * (row["labels"][place] != IGNORED), "x" * bool(special[place])]
        told = "\n".join(_told(row, one) for one in waiting)
        found.append(Piece(signs(text) or "∅", " ".join(filter(None, kinds)), told))
        waiting = []
    return found


def _told(row: Mapping[str, Any], place: int) -> str:
    label = row["labels"][place]
    told = "read only" if label == IGNORED else f"label {label}"
    return f"position {row['position_ids'][place]} · id {row['input_ids'][place]} · {told}"
