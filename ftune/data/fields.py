"""The columns of one row: renamed as the recipe asks, and each as the kind of value that its shape needs."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ftune.data.json_rows import NotJSON, Parser
from ftune.data.source import Row


class BadRow(Exception):
    """One row that cannot be used: what is wrong, and what to try."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


def renamed(fields: Row, columns: Mapping[str, str]) -> Row:
    """The row with our names for its columns. `columns` maps ours to theirs, which may be a path like `answers.0.text`.

    Theirs must be in every row, even for a field that is optional: a misspelt column would be one that no row has.
    """
    if not columns:
        return fields
    taken = {theirs for theirs in columns.values() if theirs in fields}
    return {
        **{name: value for name, value in fields.items() if name not in taken},
        **{ours: _at(fields, theirs) for ours, theirs in columns.items()},
    }


def _at(fields: Row, path: str) -> Any:
    if path in fields:
        return fields[path]
    value: Any = fields
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise BadRow(f"no column {path!r}; {columns_of(fields, path)}", "check data.columns")
    return value


def columns_of(fields: Row, wanted: str) -> str:
    """The columns there are, and which of them may be meant by `wanted`."""
    told = f"columns are {', '.join(map(repr, fields))}" if fields else "the row has no columns"
    near = get_close_matches(wanted, list(map(str, fields)), 1)
    return f"{told}; did you mean {near[0]!r}?" if near else told


def required(fields: Row, name: str) -> Any:
    """A value that must be there; null is as good as absent."""
    if fields.get(name) is not None:
        return fields[name]
    if name in fields:
        raise BadRow(f'missing "{name}": it is null', "give it a value, or take the row out")
    path = _nested(fields, name)
    hint = f"see data.columns, e.g. columns: {{{name}: {path}}}" if path else "see data.columns"
    raise BadRow(f'missing "{name}"; {columns_of(fields, name)}', hint)


def _nested(fields: Row, name: str) -> str:
    """Where the wanted name stands one level down, if it does."""
    for column, value in fields.items():
        inner, path = (value[0], f"{column}.0") if isinstance(value, list) and value else (value, column)
        if isinstance(inner, dict) and name in inner:
            return f"{path}.{name}"
    return ""


def text(fields: Row, name: str) -> str:
    """A text that must be there; it may be empty."""
    return as_text(required(fields, name), f'"{name}"')


def optional_text(fields: Row, name: str) -> str:
    """A text, or the empty text where it is absent or null."""
    return "" if fields.get(name) is None else text(fields, name)


def filled_text(fields: Row, name: str) -> str:
    """A text that must be there and say something."""
    value = text(fields, name)
    if not value.strip():
        raise BadRow(f"the {name} is empty")
    return value


def as_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where} must be text, this is {told(value)}")
    return value


def as_list(value: Any, where: str) -> list[Any]:
    """A list, or the text of one in JSON, as it stands in tables and in columns whose rows differ."""
    if isinstance(value, str):
        value = from_json(value, where)
    if not isinstance(value, list):
        raise BadRow(f"{where} must be a list, this is {told(value)}")
    return value


def from_json(value: str, where: str) -> Any:
    """The value of a JSON text inside a row, read as strictly as a file of them."""
    parser, stripped = Parser(), value.strip(" \t\r\n")
    try:
        parsed, end = parser.value(stripped)
    except NotJSON as error:
        raise BadRow(f"{where} is text that is not JSON ({error}): {told(value)}") from error
    if parser.trouble or end != len(stripped):
        raise BadRow(f"{where} is text that is not JSON ({parser.trouble or 'Extra data'}): {told(value)}")
    return parsed


def told(value: Any) -> str:
    """The beginning of a value, as an error shows it."""
    try:
        shown = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        shown = repr(type(value))
    return shown if len(shown) <= 40 else f"{shown[:39]}…"
