"""CSV and TSV -> rows. Every cell is text, an empty one the empty text; blank lines are no rows."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ftune.data.source import SourceRow
from ftune.data.streams import LONGEST_ROW, read_lines
from ftune.errors import Problem, UserError

QUOTING = "quote cells that hold delimiters or line breaks, and double the quotes inside them"


def read_table(path: Path, delimiter: str) -> Iterator[SourceRow | Problem]:
    """The rows under a header line.

    A row with too many or too few cells is a Problem. After a broken quotation nobody can tell where the next row
    begins, so that is a UserError, and so is a byte that is not UTF-8.
    """
    csv.field_size_limit(LONGEST_ROW)
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    while True:
        line = lines.number + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            where = f"{path}, row {number + bool(header)} (begins in line {line})"
            raise UserError(f"not valid CSV: {error}", where, QUOTING) from error
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = cells
            _check_header(header, path, delimiter)
            continue
        number += 1
        place = f"{path}, row {number} (line {line})"
        if len(cells) != len(header):
            yield Problem(f"{len(cells)} cells under {len(header)} columns", place, QUOTING)
        elif any("\0" in cell for cell in cells):
            yield Problem("a NUL byte in a cell", place, "remove it; was the file cut off while it was written?")
        else:
            yield SourceRow(f"{path.name}:{number}", place, dict(zip(header, cells, strict=True)))


class _Lines:
    """The lines of a file for the csv module, with the number of the last one that it took."""

    def __init__(self, path: Path) -> None:
        self._lines = read_lines(path)
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, Problem):
            raise UserError.collect([line])
        return line


def _check_header(header: list[str], path: Path, delimiter: str) -> None:
    where = f"{path}, header"
    if unnamed := [i for i, name in enumerate(header, start=1) if not name.strip()]:
        hint = "name it in the header (pandas: to_csv(..., index=False) leaves the index out)"
        raise UserError(f"column {unnamed[0]} has no name", where, hint)
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise UserError(f"the column {twice[0]!r} stands twice", where, "rename one of them")
    other = next((sign for sign in (";", "\t", ",") if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other:
        kind = "save it as .tsv" if other == "\t" else "separate columns with commas"
        raise UserError(f"one column named {header[0]!r}, which looks separated by {other!r}", where, kind)
