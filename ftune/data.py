"""Files -> rows -> checked examples. Every row is accounted for: used, or dropped with a reason."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ftune import chat
from ftune.errors import Problem, UserError

Row = dict[str, Any]
MAX_SHOWN = 20
"""How many bad rows are told one by one before the rest is only counted."""

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that each `data.format` needs."""


class BadRow(Exception):
    """One row that cannot be used: what is wrong, and what to try."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read: its id is `file name:line` (or `file name:row` where a file has no lines of its own)."""

    row_id: str
    place: str
    fields: Row


@dataclass(frozen=True)
class Example:
    """A row as the model sees it. `prompt` and `expected` are set where an answer can be generated and scored."""

    row_id: str
    text: str
    tokens: chat.Tokens
    fields: Row
    tokens_truncated: int = 0


@dataclass
class Account:
    """What became of the rows; the `data` part of report.json."""

    rows_in: int = 0
    rows_used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens_truncated: int = 0
    supervised_tokens: int = 0

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
class Dataset:
    """Examples in file order, with the account of where the other rows went."""

    examples: tuple[Example, ...]
    account: Account

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class Rules:
    """How rows become examples: the part of the recipe's `data` that shapes tokens."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 1024
    too_long: str = "error"
    on_bad_row: str = "error"


def read_rows(path: Path) -> Iterator[SourceRow | Problem]:
    """The rows of a JSONL, JSON, CSV or TSV file, a Problem in the place of each row that cannot be read."""
    readers: dict[str, Callable[[str, Path], Iterator[SourceRow | Problem]]] = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": lambda text, path: _read_table(text, path, ","),
        ".tsv": lambda text, path: _read_table(text, path, "\t"),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"unknown kind of file {path.suffix!r}", str(path), f"use one of {', '.join(readers)}")
    yield from reader(_read_text(path), path)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError("no such file", str(path), "relative paths are relative to the recipe") from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: byte {error.start} is {content[error.start]:#04x}", str(path), "save it as UTF-8") from error


def _read_json_lines(text: str, path: Path) -> Iterator[SourceRow | Problem]:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield _source_row(json.loads(line), f"{path.name}:{number}", place)
            except json.JSONDecodeError as error:
                yield Problem(f"not valid JSON: {error.msg} at column {error.colno}", place, "each line is one JSON object")


def _read_json(text: str, path: Path) -> Iterator[SourceRow | Problem]:
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", f"{path}, line {error.lineno}", "the file is one JSON list") from error
    if not isinstance(rows, list):
        raise UserError("not a list of rows", str(path), "write [{...}, {...}], or one object per line as .jsonl")
    for number, row in enumerate(rows, start=1):
        yield _source_row(row, f"{path.name}:{number}", f"{path}, row {number}")


def _read_table(text: str, path: Path, delimiter: str) -> Iterator[SourceRow | Problem]:
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    header = next(reader, None)
    number = 0
    while header is not None:
        number += 1
        place = f"{path}, row {number}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Problem(f"not valid CSV: {error}", place, "quote cells that hold delimiters or line breaks")
            return
        if cells is None:
            return
        if len(cells) != len(header):
            yield Problem(f"{len(cells)} cells under {len(header)} columns", place, "quote cells that hold delimiters")
        else:
            yield SourceRow(f"{path.name}:{number}", place, dict(zip(header, cells, strict=True)))


def _source_row(row: Any, row_id: str, place: str) -> SourceRow | Problem:
    if not isinstance(row, dict):
        return Problem(f"a row must be an object, this is a {type(row).__name__}", place)
    return SourceRow(row_id, place, row)


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


def _rename(fields: Row, columns: Mapping[str, str]) -> Row:
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
    return chat.render_text(text)


def make_example(tokenizer: Any, row: SourceRow, shape: str, rules: Rules) -> Example:
    """One checked example; raises BadRow, with the reason it is dropped for in its text."""
    fields = _rename(row.fields, rules.columns)
    rendered = render(tokenizer, fields, shape)
    tokens = chat.tokenize(tokenizer, rendered)
    truncated = max(0, len(tokens) - rules.max_length)
    if truncated:
        if rules.too_long != "truncate":
            raise TooLong(len(tokens), rules.max_length)
        tokens = chat.Tokens(tokens.input_ids[: rules.max_length], tokens.supervised[: rules.max_length])
    if tokens.num_supervised == 0:
        cut = f" within the first {rules.max_length} tokens" if truncated else ""
        raise NoLabels(f"no supervised tokens{cut}", "raise data.max_length, or shorten the prompt")
    return Example(row.row_id, rendered.text, tokens, fields, truncated)


class TooLong(BadRow):
    """A row of more tokens than data.max_length."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"{length} tokens, more than data.max_length {limit}", "raise it, or set data.too_long")


class NoLabels(BadRow):
    """A row that would give no loss."""


def _reason(error: BadRow) -> str:
    return {TooLong: "too_long", NoLabels: "no_labels"}.get(type(error), "bad_row")


def _may_drop(error: BadRow, rules: Rules) -> bool:
    """Whether the recipe allows this row to be dropped (and counted) rather than stopping everything.

    A row left without labels by a truncation that was asked for is dropped; otherwise `data.on_bad_row` decides.
    """
    if isinstance(error, TooLong):
        return rules.too_long == "drop"
    if isinstance(error, NoLabels) and rules.too_long == "truncate":
        return True
    return rules.on_bad_row == "skip"


def load(tokenizer: Any, paths: Sequence[Path], rules: Rules, vocab_size: int | None = None) -> Dataset:
    """All examples of some files. Raises UserError with every problem found, and when nothing usable is left."""
    account, examples, problems = Account(), [], []
    for path in paths:
        shape = None
        for row in read_rows(path):
            account.rows_in += 1
            if isinstance(row, Problem):
                account.dropped["unreadable"] += 1
                if rules.on_bad_row == "error":
                    problems.append(row)
                continue
            try:
                shape = shape or detect_format(_rename(row.fields, rules.columns), rules.format, row.place)
                example = make_example(tokenizer, row, shape, rules)
                _check_vocabulary(example, vocab_size)
            except BadRow as error:
                account.dropped[_reason(error)] += 1
                if not _may_drop(error, rules):
                    problems.append(Problem(f"{error}", f"{row.place} (row {row.row_id})", error.hint))
                continue
            examples.append(example)
            account.tokens_truncated += example.tokens_truncated
            account.supervised_tokens += example.tokens.num_supervised
    account.rows_used = len(examples)
    if not examples:
        problems.append(_nothing_usable(paths, account))
    if problems:
        raise UserError.collect(_shorten(problems))
    return Dataset(tuple(_unique_ids(examples)), account)


def _check_vocabulary(example: Example, vocab_size: int | None) -> None:
    if vocab_size is not None and max(example.tokens.input_ids) >= vocab_size:
        raise BadRow(
            f"token id {max(example.tokens.input_ids)} is outside the model's {vocab_size} embeddings",
            "the tokenizer does not belong to this model",
        )


def _unique_ids(examples: Sequence[Example]) -> Iterator[Example]:
    """Row ids, made unique where two files share a name."""
    seen: Counter[str] = Counter()
    for example in examples:
        seen[example.row_id] += 1
        count = seen[example.row_id]
        yield example if count == 1 else replace(example, row_id=f"{example.row_id}#{count}")


def _nothing_usable(paths: Sequence[Path], account: Account) -> Problem:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in account.dropped.items())
    told = f" ({account.rows_in} rows in; dropped {reasons})" if reasons else f" ({account.rows_in} rows in)"
    return Problem("0 usable examples" + told, ", ".join(map(str, paths)), "see the rows named above, if any")


def _shorten(problems: list[Problem]) -> list[Problem]:
    if len(problems) <= MAX_SHOWN:
        return problems
    hint = "data.on_bad_row: skip drops and counts bad rows"
    rest = Problem(f"and {len(problems) - MAX_SHOWN + 1} more problems", "", hint)
    return [*problems[: MAX_SHOWN - 1], rest]
