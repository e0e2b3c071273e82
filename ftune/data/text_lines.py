"""Plain text -> rows: each line that is not blank is a row of its own, as in the `datasets` library.

A document of several lines needs a .jsonl with one `text` per document.
"""

from collections.abc import Iterator
from pathlib import Path

from ftune.data.source import SourceRow
from ftune.data.streams import read_lines
from ftune.errors import Problem


def read_text(path: Path) -> Iterator[SourceRow | Problem]:
    """Rows of one column, `text`: the line without its line break, otherwise untouched."""
    for number, line in read_lines(path):
        place = f"{path}, line {number}"
        if isinstance(line, Problem):
            yield line
        elif "\0" in line:
            yield Problem("a NUL byte", place, "remove it; is this a text file?")
        elif not line.isspace():
            text = line.removesuffix("\n").removesuffix("\r")
            yield SourceRow(f"{path.name}:{number}", place, {"text": text})
