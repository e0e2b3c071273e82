"""Files -> rows: JSONL, JSON, CSV and TSV, with the place of each row."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune.errors import Problem, UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read: its id is `file name:line` (or `file name:row` where a file has no lines of its own)."""

    row_id: str
    place: str
    fields: Row


def read_rows(path: Path) -> Iterator[SourceRow | Problem]:
    """The rows of a JSONL, JSON, CSV or TSV file, a Problem in the place of each row that cannot be read."""
    readers: dict[str, Callable[[str, Path], Iterator[SourceRow | Problem]]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": lambda text, path: _read_table(text, path, ","),
        ".tsv": lambda text, path: _read_table(text, path, "\t"),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"unknown kind of file {path.suffix!r}", str(path), f"use one of {', '.join(readers)}")
    yield from reader(_read_text(path), path)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError("no such file", str(path), "relative paths are relative to the recipe") from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8: byte {error.start} is {content[error.start]:#04x}", str(path), "save it as UTF-8"
        ) from error


def _read_json_lines(text: str, path: Path) -> Iterator[SourceRow | Problem]:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield _source_row(json.loads(line), f"{path.name}:{number}", place)
            except json.JSONDecodeError as error:
                yield Problem(
                    f"not valid JSON: {error.msg} at column {error.colno}", place, "each line is one JSON object"
                )


def _read_json(text: str, path: Path) -> Iterator[SourceRow | Problem]:
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise UserError(
            f"not valid JSON: {error.msg}", f"{path}, line {error.lineno}", "the file is one JSON list"
        ) from error
    if not isinstance(rows, list):
        raise UserError("not a list of rows", str(path), "write [{...}, {...}], or one object per line as .jsonl")
    for number, row in enumerate(rows, start=1):
        yield _source_row(row, f"{path.name}:{number}", f"{path}, row {number}")


def _read_table(text: str, path: Path, delimiter: str) -> Iterator[SourceRow | Problem]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(reader, None)
    number = 0
    while header is not None:
        number += 1
        place = f"{path}, row {number}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Problem(f"not valid CSV: {error}", place, "quote cells that hold delimiters or line breaks")
            return
        if cells is None:
            return
        if len(cells) != len(header):
            yield Problem(f"{len(cells)} cells under {len(header)} columns", place, "quote cells that hold delimiters")
        else:
            yield SourceRow(f"{path.name}:{number}", place, dict(zip(header, cells, strict=True)))


def _source_row(row: Any, row_id: str, place: str) -> SourceRow | Problem:
    if not isinstance(row, dict):
        return Problem(f"a row must be an object, this is a {type(row).__name__}", place)
    return SourceRow(row_id, place, row)
