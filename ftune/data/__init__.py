"""Files -> rows -> checked examples."""

from ftune.data.examples import (
    LABELLED,
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
from ftune.data.labels import label_of, sorted_labels, with_class_ids
from ftune.data.rows import Row, SourceRow, read_rows

__all__ = [
    "LABELLED",
    "MAX_SHOWN",
    "Account",
    "BadRow",
    "Dataset",
    "Example",
    "Row",
    "Rules",
    "SourceRow",
    "detect_format",
    "label_of",
    "load",
    "make_example",
    "read_rows",
    "sorted_labels",
    "with_class_ids",
]
