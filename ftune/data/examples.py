"""Rows -> checked examples. Every row is accounted for: used, or dropped with a reason."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any

from ftune import chat
from ftune.data.rows import Row, SourceRow
from ftune.data.store import Example
from ftune.errors import UserError

MAX_SHOWN = 20
"""How many bad rows are told one by one before the rest is only counted."""

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that each `data.format` needs, where the columns alone can tell it."""
LABELLED = "labelled"
"""The shape of rows with `text` and `label`; it is never guessed, the objective asks for it."""


class BadRow(Exception):
    """One row that cannot be used: what is wrong, and what to try."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


@dataclass
class Account:
    """What became of the rows; the `data` part of report.json."""

    rows_in: int = 0
    rows_used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens_truncated: int = 0
    supervised_tokens: int = 0

    def count(self, example: Example) -> None:
        self.rows_used += 1
        self.tokens_truncated += example.tokens_truncated
        self.supervised_tokens += example.tokens.num_supervised

    def add(self, other: "Account") -> None:
        self.rows_in += other.rows_in
        self.rows_used += other.rows_used
        self.dropped += other.dropped
        self.tokens_truncated += other.tokens_truncated
        self.supervised_tokens += other.supervised_tokens

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> "Account":
        names = ("rows_in", "rows_used", "tokens_truncated", "supervised_tokens")
        return cls(**{name: known[name] for name in names}, dropped=Counter(known["dropped"]))

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows_in": self.rows_in,
            "rows_used": self.rows_used,
            "dropped": dict(sorted(self.dropped.items())),
            "duplicates": None,
            "contaminated": None,
            "tokens_truncated": self.tokens_truncated,
            "supervised_tokens": self.supervised_tokens,
        }


@dataclass(frozen=True)
class Rules:
    """How rows become examples: the part of the recipe's `data` that shapes tokens."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 1024
    too_long: str = "error"
    on_bad_row: str = "error"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "columns": dict(self.columns)}

    def may_drop(self, error: BadRow) -> bool:
        """Whether the recipe allows this row to be dropped (and counted) rather than stopping everything.

        A row left without labels by a truncation that was asked for is dropped; otherwise `on_bad_row` decides.
        """
        if isinstance(error, TooLong):
            return self.too_long == "drop"
        if isinstance(error, NoLabels) and self.too_long == "truncate":
            return True
        return self.on_bad_row == "skip"


def detect_format(fields: Row, requested: str, place: str) -> str:
    """The shape of the rows; decided by the columns of the first row when `auto`."""
    if requested != "auto":
        return requested
    for name, columns in SHAPES.items():
        if all(column in fields for column in columns):
            return name
    shapes = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in SHAPES.items())
    raise UserError(
        f"no known shape among the columns {', '.join(map(repr, fields))}" + _nearest_column(fields),
        place,
        f"needed are {shapes}; rename with data.columns, e.g. columns: {{prompt: question}}",
    )


def _nearest_column(fields: Row) -> str:
    known = [column for columns in SHAPES.values() for column in columns]
    for name in fields:
        if (near := get_close_matches(name, known, 1)) and name not in known:
            return f" (did you mean {near[0]!r} by {name!r}?)"
    return ""


def renamed(fields: Row, columns: Mapping[str, str]) -> Row:
    renamed = dict(fields)
    for ours, theirs in columns.items():
        if theirs not in fields:
            raise BadRow(f"no column {theirs!r}; columns are {', '.join(map(repr, fields))}", "check data.columns")
        renamed[ours] = renamed.pop(theirs)
    return renamed


def _field(fields: Row, name: str) -> Any:
    if name not in fields:
        near = get_close_matches(name, list(fields), 1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise BadRow(f'missing "{name}"; columns are {", ".join(map(repr, fields))}{guess}', "see data.columns")
    return fields[name]


def _text_field(fields: Row, name: str) -> str:
    value = _field(fields, name)
    if not isinstance(value, str):
        raise BadRow(f'"{name}" must be text, this is {json.dumps(value, ensure_ascii=False)[:40]}')
    return value


def check_messages(messages: Any) -> list[chat.Message]:
    """The messages of a row, or BadRow: roles, order and contents are as a chat template expects them."""
    if not isinstance(messages, list) or not messages:
        raise BadRow('"messages" must be a list that is not empty')
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise BadRow(f"{where} must have a text `role` and a text `content`")
        role = message["role"]
        if role not in chat.ROLES:
            near = get_close_matches(str(role), chat.ROLES, 1)
            raise BadRow(f"{where} has the unknown role {role!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if role == "assistant" and not message["content"].strip():
            raise BadRow(f"{where}: the assistant's answer is empty")
        if i and role == messages[i - 1]["role"] and role in ("user", "assistant"):
            raise BadRow(f"{where}: two {role} turns in a row")
        if extra := set(message) - {"role", "content"}:
            raise BadRow(f"{where} has keys this version cannot train on: {', '.join(sorted(extra))}")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no assistant turn, so nothing to learn from")
    return messages


def render(tokenizer: Any, fields: Row, shape: str) -> chat.Rendered:
    """The text of a row in a known shape; raises BadRow."""
    if shape == "messages":
        if not tokenizer.chat_template:
            raise UserError(
                "rows are messages, but the tokenizer has no chat template",
                "model.chat_template",
                "name a Jinja file there, or give rows of prompt and completion",
            )
        return chat.render_messages(tokenizer, check_messages(_field(fields, "messages")))
    if shape == "prompt_completion":
        prompt, completion = _text_field(fields, "prompt"), _text_field(fields, "completion")
        if not completion.strip():
            raise BadRow("the completion is empty")
        return chat.render_completion(tokenizer, prompt, completion)
    text = _text_field(fields, "text")
    if not text.strip():
        raise BadRow("the text is empty")
    if shape == LABELLED:
        check_label(_field(fields, "label"))
        return chat.Rendered(text, (), adds_special_tokens=True)
    return chat.render_text(text)


def check_label(label: Any) -> None:
    """A label is text or a whole number; others would be told apart by accident."""
    if isinstance(label, bool) or not isinstance(label, str | int):
        told = json.dumps(label, ensure_ascii=False)[:40]
        raise BadRow(f'"label" must be text or a whole number, this is {told}', "name the classes")
    if not str(label).strip():
        raise BadRow("the label is empty")


def _labelled(tokenizer: Any, tokens: chat.Tokens) -> chat.Tokens:
    """The label is told at the last token. No row ends with the padding token: transformers would pool before it."""
    ids = tokens.input_ids
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    if not ids:
        raise BadRow("the text is nothing but padding")
    return chat.LabelledTokens(ids, [False] * (len(ids) - 1) + [True])


def make_example(tokenizer: Any, row: SourceRow, shape: str, rules: Rules, vocab_size: int | None = None) -> Example:
    """One checked example; raises BadRow, with the reason it is dropped for in its text."""
    fields = renamed(row.fields, rules.columns)
    rendered = render(tokenizer, fields, shape)
    tokens = chat.tokenize(tokenizer, rendered)
    truncated = max(0, len(tokens) - rules.max_length)
    if truncated:
        if rules.too_long != "truncate":
            raise TooLong(len(tokens), rules.max_length)
        tokens = chat.Tokens(tokens.input_ids[: rules.max_length], tokens.supervised[: rules.max_length])
    if shape == LABELLED:
        tokens = _labelled(tokenizer, tokens)
    if tokens.num_supervised == 0:
        cut = f" within the first {rules.max_length} tokens" if truncated else ""
        raise NoLabels(f"no supervised tokens{cut}", "raise data.max_length, or shorten the prompt")
    _check_vocabulary(tokens, vocab_size)
    return Example(row.row_id, rendered.text, tokens, fields, truncated)


class TooLong(BadRow):
    """A row of more tokens than data.max_length."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(
            f"{length} tokens, more than the {limit} that data.max_length and the model's context allow",
            "raise data.max_length up to the model's context, or set data.too_long to drop or truncate",
        )


class NoLabels(BadRow):
    """A row that would give no loss."""


def reason(error: BadRow) -> str:
    """What a dropped row is counted under."""
    return {TooLong: "too_long", NoLabels: "no_labels"}.get(type(error), "bad_row")


def _check_vocabulary(tokens: chat.Tokens, vocab_size: int | None) -> None:
    if vocab_size is not None and max(tokens.input_ids) >= vocab_size:
        raise BadRow(
            f"token id {max(tokens.input_ids)} is outside the model's {vocab_size} embeddings",
            "the tokenizer does not belong to this model",
        )
