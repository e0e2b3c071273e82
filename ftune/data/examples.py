"""Rows -> checked examples: what a row means, its text, its tokens with the supervised mask, and what was counted."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ftune import chat
from ftune.data.audit import ROLES, Figures
from ftune.data.fields import BadRow
from ftune.data.rows import SourceRow
from ftune.data.shapes import (
    Completion,
    Conversation,
    Labelled,
    PlainPreference,
    Preference,
    ShapedRow,
    has_signal,
    normalize,
)
from ftune.data.store import Example
from ftune.errors import UserError

MAX_SHOWN = 20
"""How many bad rows are told one by one before the rest is only counted."""
STRADDLING = "a token reaches over the border of an answer; it is read, not learned"
SAME_ANSWERS = "chosen and rejected answers are the same"
PLACES = {role: place for place, role in enumerate(ROLES)}
COUNTED_AS = {"prompt": "user", "completion": "assistant", "system+user": "user"}
"""The role whose tokens those of a turn are counted among, where it has another name."""


class DroppedTokens(BadRow):
    """A row that has tokens, which the audit counts though none is trained on."""

    figures: Figures


class TooLong(DroppedTokens):
    """A row of more tokens than data.max_length."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(
            f"{length} tokens, more than the {limit} that data.max_length and the model's context allow",
            "raise data.max_length up to the model's context, or set data.too_long to drop or truncate",
        )
        self.length, self.limit = length, limit


class NoLabels(DroppedTokens):
    """A row that would give no loss."""


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


def reason(error: BadRow) -> str:
    """What a dropped row is counted under."""
    return {TooLong: "too_long", NoLabels: "no_labels"}.get(type(error), "bad_row")


def make_example(tokenizer: Any, row: SourceRow, shape: str, rules: Rules, vocab_size: int | None = None) -> Example:
    """One checked example; raises BadRow, with the reason it is dropped for in its text."""
    shaped = normalize(row.fields, shape, rules.columns)
    try:
        rendered = render(tokenizer, shaped)
    except chat.TemplateRowError as error:
        raise BadRow(error.problems[0].what, error.problems[0].hint) from error
    tokens = chat.tokenize(tokenizer, rendered)
    end_ids = frozenset(chat.end_of_turn_ids(tokenizer))
    try:
        kept = _kept(tokenizer, tokens, isinstance(shaped, Labelled), rules)
    except DroppedTokens as error:
        error.figures = figures_of(end_ids, rendered, tokens, tokens)
        raise
    if vocab_size is not None and max(kept.input_ids) >= vocab_size:
        raise BadRow(
            f"token id {max(kept.input_ids)} is outside the model's {vocab_size} embeddings",
            "the tokenizer does not belong to this model",
        )
    notes = [*getattr(shaped, "notes", ()), *rendered.notes]
    notes += [STRADDLING] if tokens.straddling else []
    notes += [SAME_ANSWERS] if isinstance(shaped, Preference | PlainPreference) and not has_signal(shaped) else []
    figures = figures_of(end_ids, rendered, tokens, kept)
    truncated = max(0, len(tokens) - rules.max_length)
    return Example(row.row_id, rendered.text, kept, fields_of(shaped), truncated, figures, tuple(notes))


def _kept(tokenizer: Any, tokens: chat.TextTokens, is_labelled: bool, rules: Rules) -> chat.Tokens:
    """The tokens that are trained on; raises BadRow where there are too many, or none to learn."""
    is_cut = len(tokens) > rules.max_length
    if is_cut and rules.too_long != "truncate":
        raise TooLong(len(tokens), rules.max_length)
    kept = tokens.cut(rules.max_length) if is_cut else tokens
    if is_labelled:
        return _labelled(tokenizer, kept)
    if kept.num_supervised == 0:
        cut = f" within the first {rules.max_length} tokens" if is_cut else ""
        raise NoLabels(f"no supervised tokens{cut}", "raise data.max_length, or shorten the prompt")
    return kept


def render(tokenizer: Any, shaped: ShapedRow) -> chat.Rendered:
    """The text of a row, with what shall be learned of it. Of two answers the chosen one is."""
    match shaped:
        case Conversation():
            return _render_turns(tokenizer, shaped.messages, shaped.tools)
        case Preference():
            return _render_turns(tokenizer, (*_unlearned(shaped.messages), *shaped.chosen), shaped.tools)
        case Completion():
            return chat.render_completion(tokenizer, shaped.prompt, shaped.completion)
        case PlainPreference():
            return chat.render_completion(tokenizer, shaped.prompt, shaped.chosen)
        case Labelled():
            return chat.Rendered(
                shaped.text, (), adds_special_tokens=True, turns=(chat.Turn("text", 0, len(shaped.text)),)
            )
    return chat.render_text(shaped.text)


def _plain(messages: tuple[chat.Message, ...]) -> list[chat.Message]:
    """As a template is given them."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _unlearned(messages: tuple[chat.Message, ...]) -> list[chat.Message]:
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def _render_turns(
    tokenizer: Any, messages: tuple[chat.Message, ...], tools: tuple[chat.Message, ...] | None
) -> chat.Rendered:
    """A conversation; assistant turns of weight 0 are read, not learned."""
    if not tokenizer.chat_template:
        raise UserError(
            "rows are messages, but the tokenizer has no chat template",
            "model.chat_template",
            "name a Jinja file there, or give rows of prompt and completion",
        )
    rendered = chat.render_messages(tokenizer, _plain(messages), None if tools is None else list(tools))
    answers = [message for message in messages if message["role"] == "assistant"]
    learned = [span for span, answer in zip(rendered.spans, answers, strict=True) if answer.get("weight") != 0]
    return rendered if len(learned) == len(answers) else replace(rendered, spans=tuple(learned))


def fields_of(shaped: ShapedRow) -> dict[str, Any]:
    """What an example keeps of its row, as JSON has it; what is absent stays absent."""
    match shaped:
        case Conversation():
            found: dict[str, Any] = {"messages": _plain(shaped.messages), "tools": shaped.tools}
        case Preference():
            answers = {"chosen": list(shaped.chosen), "rejected": list(shaped.rejected)}
            found = {"messages": _plain((*shaped.messages, *shaped.chosen)), **answers, "tools": shaped.tools}
        case Completion():
            found = {"prompt": shaped.prompt, "completion": shaped.completion}
        case PlainPreference():
            found = {"prompt": shaped.prompt, "completion": shaped.chosen, "rejected": shaped.rejected}
        case Labelled():
            found = {"text": shaped.text, "label": shaped.label}
        case _:
            found = {"text": shaped.text}
    return {key: value for key, value in found.items() if value is not None}


def _labelled(tokenizer: Any, tokens: chat.Tokens) -> chat.LabelledTokens:
    """The label is told at the last token. No row ends with the padding token: transformers would pool before it."""
    ids = tokens.input_ids
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    if not ids:
        raise BadRow("the text is nothing but padding")
    return chat.LabelledTokens(ids, [False] * (len(ids) - 1) + [True])


def figures_of(end_ids: frozenset[int], rendered: chat.Rendered, tokens: chat.TextTokens, kept: chat.Tokens) -> Figures:
    """What the audit counts in a row, in the order of NUM_FIGURES. `end_ids`: the tokens that end a turn."""
    turns = sorted((turn.start, turn.end, COUNTED_AS.get(turn.role, turn.role)) for turn in rendered.turns)
    length, labels = len(kept), kept.labels
    counts, ends, current = [0] * (3 * len(ROLES)), [0, 0], 0
    for i, (token, start) in enumerate(zip(tokens.input_ids, tokens.starts, strict=True)):
        while current < len(turns) and turns[current][1] <= start:
            current += 1
        role = PLACES[turns[current][2]] if current < len(turns) and turns[current][0] <= start else PLACES["text"]
        is_supervised = i < length and labels[i] != -100
        counts[role] += 1
        if i >= length:
            counts[2 * len(ROLES) + role] += 1
        elif is_supervised:
            counts[len(ROLES) + role] += 1
        if token in end_ids and role == PLACES["assistant"]:
            ends[0] += 1
            ends[1] += is_supervised
    return (*counts, *ends)
