"""Files -> rows -> checked examples."""

from ftune.data.examples import (
    MAX_SHOWN,
    Account,
    BadRow,
    Dataset,
    Example,
    Rules,
    detect_format,
    load,
    make_example,
)
from ftune.data.rows import Row, SourceRow, read_rows

__all__ = [
    "MAX_SHOWN",
    "Account",
    "BadRow",
    "Dataset",
    "Example",
    "Row",
    "Rules",
    "SourceRow",
    "detect_format",
    "load",
    "make_example",
    "read_rows",
]
