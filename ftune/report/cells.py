"""Markdown's tables: text that comes from data stays text, and cannot end a cell."""

import html
import re
from collections.abc import Sequence

SPECIAL = re.compile(r"([\\`*_|#]|\[(?![-\d., ]+\]))")  # an interval's bracket is none


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column holds words, the others numbers; a cell that begins with ** is markup already."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(cell if index == 1 else _cell(cell) for cell in line) + " |"
        for index, line in enumerate(lines)
    )


def plain(text: object) -> str:
    """Names come from data: they must not become markup or end a table's cell."""
    return SPECIAL.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _cell(text: str) -> str:
    return text if text.startswith("**") else plain(text)
