"""Examples in Arrow: in memory while they are few, in a file that is mapped when they are many."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftune import chat
from ftune.data.audit import NUM_FIGURES, Figures

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.int32()),
        ("outcome", pa.string()),
        ("text", pa.large_string()),
        ("fields", pa.large_string()),  # JSON: in Arrow's own structs, keys that one row lacks would be null in it
        ("input_ids", pa.large_list(pa.int32())),
        ("supervised", pa.large_list(pa.bool_())),
        ("tokens_truncated", pa.int32()),
        ("figures", pa.list_(pa.int32(), NUM_FIGURES)),
    ]
)
"""A line for every row that was read; `outcome` says which are examples, and the others' reasons."""
NO_FIGURES = (0,) * NUM_FIGURES
EXAMPLE = ("row_id", "text", "fields", "input_ids", "supervised", "tokens_truncated")
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """A row as the model sees it; `fields` is what it was made from, in the form of its shape."""

    row_id: str
    text: str
    tokens: chat.Tokens
    fields: dict[str, Any]
    tokens_truncated: int = 0
    figures: Figures = field(default=NO_FIGURES, compare=False)
    """What the audit counts in it."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was done to it that a user would want to know; the same words for all such rows."""


def dropped(row_id: str, figures: Figures = NO_FIGURES) -> Example:
    """What is kept of a row that is no example."""
    return Example(row_id, "", chat.Tokens([], []), {}, figures=figures)


def to_batch(rows: Sequence[Example], source: int, outcomes: Sequence[str]) -> pa.RecordBatch:
    """Rows of one source as Arrow holds them."""
    columns: list[Any] = [
        [row.row_id for row in rows],
        [source] * len(rows),
        outcomes,
        [row.text for row in rows],
        [json.dumps(row.fields, ensure_ascii=False) for row in rows],
        [row.tokens.input_ids for row in rows],
        [row.tokens.supervised for row in rows],
        [row.tokens_truncated for row in rows],
        [row.figures for row in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


class Examples(Sequence[Example]):
    """Some rows of an Arrow table, in an order of their own; each becomes an Example when it is asked for."""

    def __init__(self, table: pa.Table, indices: Indices | None = None, class_ids: Indices | None = None) -> None:
        self.table = table
        self.indices = np.arange(len(table)) if indices is None else indices
        self.class_ids = class_ids
        """The class of each example, where they are labelled."""
        self._columns = [table[name].chunks for name in EXAMPLE]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._columns[0])])

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> "Examples": ...
    def __getitem__(self, place: int | slice) -> "Example | Examples":
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        row_id, text, fields, input_ids, supervised, truncated = self._row(int(self.indices[place]))
        tokens = chat.Tokens(input_ids, supervised)
        if self.class_ids is not None:
            tokens = chat.LabelledTokens(input_ids, supervised, int(self.class_ids[place]))
        return Example(row_id, text, tokens, json.loads(fields), truncated)

    def _row(self, index: int) -> tuple[Any, ...]:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        return tuple(column[chunk][index - int(self._starts[chunk])].as_py() for column in self._columns)

    def select(self, places: Indices) -> "Examples":
        """Some of these examples, by their places here."""
        class_ids = None if self.class_ids is None else self.class_ids[places]
        return Examples(self.table, self.indices[places], class_ids)

    def with_class_ids(self, class_ids: Indices) -> "Examples":
        return Examples(self.table, self.indices, class_ids)

    @property
    def lengths(self) -> Indices:
        """Tokens of each example, without reading them."""
        return self._list_lengths("input_ids")[self.indices]

    def _list_lengths(self, column: str) -> Indices:
        parts = [np.diff(chunk.offsets.to_numpy()) for chunk in self.table[column].chunks]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def fields(self) -> Iterator[dict[str, Any]]:
        """What each example was made from, without its tokens."""
        column = self.table["fields"]
        for index in self.indices:
            yield json.loads(column[int(index)].as_py())

    def row_id(self, place: int) -> str:
        """The id of one example, without the rest of it."""
        return str(self.table["row_id"][int(self.indices[place])].as_py())


def open_file(path: Path) -> pa.Table:
    """The table of an Arrow file, mapped: its pages are read when they are used, and can be let go."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
