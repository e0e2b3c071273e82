"""Files -> rows -> checked examples."""

from ftune.data.examples import LABELLED, MAX_SHOWN, Account, BadRow, Rules, detect_format, make_example
from ftune.data.labels import label_of, sorted_labels, with_class_ids
from ftune.data.loading import Dataset, load
from ftune.data.mixture import Mixture
from ftune.data.rows import Row, SourceRow, read_rows
from ftune.data.sources import Source
from ftune.data.store import Example, Examples

__all__ = [
    "LABELLED",
    "MAX_SHOWN",
    "Account",
    "BadRow",
    "Dataset",
    "Example",
    "Examples",
    "Mixture",
    "Row",
    "Rules",
    "Source",
    "SourceRow",
    "detect_format",
    "label_of",
    "load",
    "make_example",
    "read_rows",
    "sorted_labels",
    "with_class_ids",
]
