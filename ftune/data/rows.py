"""Files -> rows, with the place of each row; whatever the format, one row (or batch) in memory at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ftune.data.columnar import read_parquet
from ftune.data.json_rows import read_json, read_json_lines
from ftune.data.source import Row, SourceRow
from ftune.data.streams import UNPACKERS, kind_of
from ftune.data.tables import read_table
from ftune.data.text_lines import read_text
from ftune.errors import Problem, UserError

__all__ = ["READERS", "Row", "SourceRow", "read_rows"]

READERS: dict[str, Callable[[Path], Iterator[SourceRow | Problem]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": lambda path: read_table(path, ","),
    ".tsv": lambda path: read_table(path, "\t"),
    ".txt": read_text,
    ".parquet": read_parquet,
}
"""By the suffix of a file; all but Parquet, which compresses inside, may also be compressed (UNPACKERS)."""


def read_rows(path: Path) -> Iterator[SourceRow | Problem]:
    """The rows of a file, a Problem in the place of each row that cannot be read.

    UserError for a file that cannot be read, which may show only after some of its rows.
    """
    kind = kind_of(path)
    if kind not in READERS or (kind == ".parquet" and path.suffix.lower() != kind):
        hint = f"use one of {', '.join(READERS)}; all but .parquet may end with {', '.join(UNPACKERS)} too"
        raise UserError(f"unknown kind of file {path.name!r}", str(path), hint)
    yield from READERS[kind](path)
