"""Which shape rows have, told by their columns, and which columns the shape leaves unread."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ftune.data.fields import BadRow, columns_of, renamed
from ftune.data.source import Row
from ftune.errors import UserError

LABELLED = "labelled"
"""The shape of rows with `text` and `label`; it is never guessed, the objective or the recipe asks for it."""
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue")
"""Columns that hold turns, of which the first that is there and not null is read."""
AROUND_TURNS = ("system", "tools", "functions")
NEEDED: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    LABELLED: ("text", "label"),
}
"""The columns that each shape needs, the most specific first: that one is taken where several fit."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", *CONVERSATIONS, *AROUND_TURNS),
    "sharegpt": (*CONVERSATIONS, *AROUND_TURNS),
    "messages": (*CONVERSATIONS, *AROUND_TURNS),
    "prompt_completion": AROUND_TURNS,
    "alpaca": ("input", "system", "history", "tools", "functions"),
}
FOREIGN = (
    ("question", "answer"),
    ("query", "response"),
    ("question", "response"),
    ("instruction", "response"),
    ("input", "output"),
    ("source", "target"),
    ("input", "target"),
)
"""Pairs of columns that are a prompt and a completion in sets of other shapes; only ever proposed."""


@dataclass(frozen=True)
class Detected:
    """A shape and the sentence that says how it was found."""

    shape: str
    told: str


def conversation_column(fields: Row) -> str:
    """The column that holds the turns; `messages` where there is none, to be told as missing."""
    present = [name for name in CONVERSATIONS if name in fields]
    return next((name for name in present if fields[name] is not None), present[0] if present else CONVERSATIONS[0])


def detect(fields: Row, requested: str, place: str, columns: Mapping[str, str] | None = None) -> Detected:
    """The shape of rows, decided by the columns of one of them when `auto`; raises UserError.

    `columns` are the recipe's (ours to theirs): a name of ours that the shape does not read is an error as well.
    """
    columns = columns or {}
    if requested == "auto":
        found = _by_columns(fields, place, columns)
    else:
        found = Detected(requested, f"{requested}, as data.format says")
    readable = (*NEEDED[found.shape], *OPTIONAL.get(found.shape, ()))
    for ours in columns:
        if ours not in readable:
            near = get_close_matches(ours, readable, 1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"data.columns names {ours!r}, which rows of the shape {found.shape} do not have{guess}",
                place,
                f"the shape reads {', '.join(readable)}",
            )
    return found


def _by_columns(fields: Row, place: str, columns: Mapping[str, str]) -> Detected:
    try:
        fields = renamed(fields, columns)
    except BadRow as error:
        raise UserError(str(error), place, error.hint) from error
    fits = [found for shape in NEEDED if shape != LABELLED and (found := _columns_that_tell(fields, shape))]
    if not fits:
        raise _no_shape(fields, place)
    (shape, told), *others = fits
    sentence = f"{shape}, by the column{'s' if len(told) > 1 else ''} {' and '.join(map(repr, told))}"
    if others:
        sentence += f"; {' and '.join(name for name, _ in others)} would fit too, but say less"
    return Detected(shape, sentence)


def _columns_that_tell(fields: Row, shape: str) -> tuple[str, tuple[str, ...]] | None:
    if shape not in ("messages", "sharegpt"):
        return (shape, NEEDED[shape]) if all(name in fields for name in NEEDED[shape]) else None
    column = conversation_column(fields)
    value = fields.get(column)
    is_list = isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
    is_there = column in ("messages", "conversations") or is_list
    is_sharegpt = _first_keys(value) >= {"from"}
    return (shape, (column,)) if column in fields and is_there and is_sharegpt == (shape == "sharegpt") else None


def _first_keys(turns: Any) -> set[str]:
    if isinstance(turns, str):
        return {"from"} if '"from"' in turns and '"role"' not in turns else set()
    return set(turns[0]) if isinstance(turns, list) and turns and isinstance(turns[0], dict) else set()


def _no_shape(fields: Row, place: str) -> UserError:
    known = [name for names in (*NEEDED.values(), *OPTIONAL.values()) for name in names]
    pairs = ((n, near[0]) for n in fields if n not in known and (near := get_close_matches(str(n), known, 1)))
    guess = next((f" (did you mean {near!r} by {name!r}?)" for name, near in pairs), "")
    shapes = "; ".join(f"{shape}: {', '.join(names)}" for shape, names in NEEDED.items())
    asked, answered = next((pair for pair in FOREIGN if set(pair) <= set(fields)), ("question", "answer"))
    return UserError(
        f"no known shape: {columns_of(fields, '')}{guess}",
        place,
        f"needed are {shapes}; rename with data.columns, e.g. columns: {{prompt: {asked}, completion: {answered}}}",
    )


def unused_columns(fields: Row, shape: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of a row, as the file names them, that the shape does not read."""
    sources = {theirs if theirs in fields else theirs.split(".")[0] for theirs in columns.values()}
    read = {name for name in (*NEEDED[shape], *OPTIONAL.get(shape, ())) if name not in columns} | sources
    if shape in ("messages", "sharegpt", "preference"):
        read -= set(CONVERSATIONS) - {conversation_column(fields)} - sources
    return tuple(name for name in fields if name not in read)
