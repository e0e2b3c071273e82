"""What every reader gives: a row of a file, with its id and its place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune.errors import Problem

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as it was read: its id is `file name:line` (or `file name:row` where a file has no lines of its own)."""

    row_id: str
    place: str
    fields: Row


def source_row(value: Any, path: Path, number: int, place: str) -> SourceRow | Problem:
    """A value out of a JSON file as a row, or the Problem that it is none."""
    if isinstance(value, dict):
        return SourceRow(f"{path.name}:{number}", place, value)
    hint = "name the file .json, if it is one list of rows" if isinstance(value, list) else ""
    return Problem(f"a row must be an object, this is a {type(value).__name__}", place, hint)
