"""Files -> rows -> checked examples."""

from ftune.data.audit import Audit
from ftune.data.detection import LABELLED, detect
from ftune.data.examples import MAX_SHOWN, Rules, make_example
from ftune.data.fields import BadRow
from ftune.data.labels import label_of, sorted_labels, with_class_ids
from ftune.data.loading import Dataset, load
from ftune.data.mixture import Mixture
from ftune.data.rows import Row, SourceRow, read_rows
from ftune.data.sources import Source
from ftune.data.store import Example, Examples

__all__ = [
    "LABELLED",
    "MAX_SHOWN",
    "Audit",
    "BadRow",
    "Dataset",
    "Example",
    "Examples",
    "Mixture",
    "Row",
    "Rules",
    "Source",
    "SourceRow",
    "detect",
    "label_of",
    "load",
    "make_example",
    "read_rows",
    "sorted_labels",
    "with_class_ids",
]
