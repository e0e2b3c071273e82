"""Parquet -> rows, a batch at a time.

Arrow gives every object of a column the keys of all of them: where a row had no such key it holds null, and a template
would render "None". So null keys of nested objects are dropped; a null that was written on purpose inside an object
cannot be told from that and goes as well (a JSONL keeps it). A null cell of a row stays, and means that it is missing.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftune.data.source import SourceRow
from ftune.data.streams import unreadable_as_user_error
from ftune.errors import Problem, UserError

ROWS_AT_ONCE = 1024


def read_parquet(path: Path) -> Iterator[SourceRow | Problem]:
    """The rows of a Parquet file; classes that `datasets` saved as numbers get their names back."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with unreadable_as_user_error(path):
        try:
            file = pq.ParquetFile(path, pre_buffer=False)
            names = class_names(file.schema_arrow.metadata or {})
            _check_columns(file.schema_arrow.names, path)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                for fields in _rows(batch):
                    number += 1
                    place = f"{path}, row {number}"
                    if isinstance(fields, str):
                        yield Problem(fields, place)
                    else:
                        yield SourceRow(f"{path.name}:{number}", place, _named(fields, names))
        except pa.ArrowException as error:
            raise UserError(f"not valid Parquet: {error}", str(path), "fetch or write it again") from error


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch, or what is wrong with one: Arrow does not check that text is UTF-8."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError) as error:
        if batch.num_rows == 1:
            yield f"cannot be read: {error}"
        else:
            for i in range(batch.num_rows):
                yield from _rows(batch.slice(i, 1))
        return
    yield from ({name: without_nulls(cell) for name, cell in row.items()} for row in rows)


def without_nulls(value: Any) -> Any:
    """The value without the null keys of its objects, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> the names of its classes, out of what `datasets` writes into a Parquet schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: list(feature["names"])
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _named(fields: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Class numbers as names; -1, by which `datasets` means unknown, as null."""
    for column, known in names.items():
        number = fields.get(column)
        if isinstance(number, int):
            fields[column] = known[number] if 0 <= number < len(known) else None
    return fields


def _check_columns(columns: list[str], path: Path) -> None:
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"the column {twice[0]!r} stands twice", str(path), "rename one of them")
