"""Rows of any known shape -> what they mean: a conversation, a completion, a text, a labelled text or a preference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftune.chat import Message
from ftune.data.detection import conversation_column
from ftune.data.fields import BadRow, as_list, filled_text, optional_text, renamed, required, text, told
from ftune.data.messages import check_order, messages_of
from ftune.data.source import Row

BETWEEN = "\n\n"
"""Between an instruction and its input: a blank line, so that an input of several paragraphs stays apart."""


@dataclass(frozen=True)
class Conversation:
    """Turns as `messages.py` describes them, and the tools in OpenAI's form.

    `notes`: what was read as something else, one sentence each, the same for each such row.
    """

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Completion:
    """Plain text without a chat template: the model learns to go on from the prompt with the completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Labelled:
    text: str
    label: str | int


@dataclass(frozen=True)
class Preference:
    """The turns that both answers follow, and the answers as turns; each begins with the assistant's."""

    messages: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Message, ...] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class PlainPreference:
    """Two continuations of one plain text, without a chat template."""

    prompt: str
    chosen: str
    rejected: str


ShapedRow = Conversation | Completion | Text | Labelled | Preference | PlainPreference


def normalize(fields: Row, shape: str, columns: Mapping[str, str]) -> ShapedRow:
    """A row as read -> what it means in the given shape; raises BadRow. Null and absent are the same."""
    fields = renamed(fields, columns)
    match shape:
        case "messages" | "sharegpt":
            return _conversation(fields)
        case "prompt_completion":
            return _completion(fields)
        case "alpaca":
            return _alpaca(fields)
        case "preference":
            return _preference(fields)
        case "labelled":
            label = required(fields, "label")
            check_label(label)
            return Labelled(filled_text(fields, "text"), label)
    assert shape == "text", shape
    return Text(filled_text(fields, "text"))


def check_label(label: Any) -> None:
    """A label is text or a whole number; others would be told apart by accident."""
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise BadRow(f'"label" must be text or a whole number, this is {told(label)}', "name the classes")
    if not str(label).strip():
        raise BadRow("the label is empty")


def has_signal(row: Preference | PlainPreference) -> bool:
    """Whether the two answers differ; a pair that does not teaches nothing."""
    return row.chosen != row.rejected


def _conversation(fields: Row) -> Conversation:
    notes: list[str] = []
    column = conversation_column(fields)
    messages = _with_system(fields, messages_of(required(fields, column), column, notes))
    return _checked(fields, messages, notes)


def _checked(fields: Row, messages: Sequence[Message], notes: Sequence[str] = ()) -> Conversation:
    check_order(messages)
    _check_media(fields, messages)
    return Conversation(tuple(messages), _tools(fields), tuple(dict.fromkeys(notes)))


def _with_system(fields: Row, messages: list[Message]) -> list[Message]:
    """The column `system`, where it says something, as the first message."""
    system = optional_text(fields, "system")
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        raise BadRow('the column "system" and the first message are two different system messages', "keep one")
    return [{"role": "system", "content": system}, *messages]


def _check_media(fields: Row, messages: Sequence[Message]) -> None:
    for kind in ("image", "video", "audio"):
        if (fields.get(kind) or fields.get(f"{kind}s")) and any(f"<{kind}>" in m.get("content", "") for m in messages):
            raise BadRow(f"a turn refers to <{kind}>: only text can be trained on", "take the row out")


def _tools(fields: Row) -> tuple[Message, ...] | None:
    """The tools as {type: function, function: {name, description, parameters}}, which is what templates expect."""
    value = fields.get("tools") or fields.get("functions")
    if not value or (isinstance(value, str) and not value.strip()):
        return None
    tools = []
    for i, tool in enumerate(as_list(value, '"tools"')):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"tools[{i}] must have a text `name`, this is {told(tool)}")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools) or None


def _turns(value: Any, where: str, role: str, notes: list[str]) -> list[Message]:
    """One or more turns: a list of messages, one message, or the text of a turn of the given role."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    return messages_of(value if isinstance(value, list) else [value], where, notes)


def _completion(fields: Row) -> Completion | Conversation:
    """Text and text; or, where either is messages, a conversation of which the completion is learned."""
    prompt, completion = required(fields, "prompt"), required(fields, "completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Completion(text(fields, "prompt"), filled_text(fields, "completion"))
    notes: list[str] = []
    asked = [
        {**message, "weight": 0} if message["role"] == "assistant" else message
        for message in _turns(prompt, "prompt", "user", notes)
    ]
    answer = _turns(completion, "completion", "assistant", notes)
    if answer[0]["role"] != "assistant":
        raise BadRow(f"the completion begins with a turn of the {answer[0]['role']}", "move it to the prompt")
    return _checked(fields, _with_system(fields, asked + answer), notes)


def _alpaca(fields: Row) -> Conversation:
    """The instruction and, a blank line below, its input ask; the output answers. `history` holds earlier pairs."""
    parts = (optional_text(fields, "instruction"), optional_text(fields, "input"))
    question = BETWEEN.join(part for part in parts if part.strip())
    if not question:
        required(fields, "instruction")
        raise BadRow("the instruction is empty")
    pairs = as_list(fields["history"], '"history"') if fields.get("history") else []
    messages: list[Message] = []
    for i, pair in enumerate([*pairs, (question, filled_text(fields, "output"))]):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) and t for t in pair)):
            raise BadRow(f"history[{i}] must be a question and its answer, this is {told(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return _checked(fields, _with_system(fields, messages))


def _preference(fields: Row) -> Preference | PlainPreference:
    chosen, rejected = required(fields, "chosen"), required(fields, "rejected")
    prompt, column = fields.get("prompt"), conversation_column(fields)
    if isinstance(chosen, str) and isinstance(rejected, str) and _is_plain(prompt, fields.get(column)):
        return PlainPreference(text(fields, "prompt"), filled_text(fields, "chosen"), filled_text(fields, "rejected"))
    notes: list[str] = []
    better, worse = (_turns(fields[name], name, "assistant", notes) for name in ("chosen", "rejected"))
    if better[0]["role"] == worse[0]["role"] == "assistant":
        context = prompt if prompt is not None else fields.get(column)
        messages = _turns(required(fields, "prompt") if context is None else context, "prompt", "user", notes)
    else:
        messages, better, worse = _shared_turns(better, worse)
        _check_prompt(prompt, messages, notes)
    messages = _with_system(fields, messages)
    for answer in (better, worse):
        conversation = _checked(fields, [*_unlearned(messages), *answer])
    return Preference(tuple(messages), tuple(better), tuple(worse), conversation.tools, tuple(dict.fromkeys(notes)))


def _is_plain(prompt: Any, turns: Any) -> bool:
    """Whether two answers that are texts follow a text, or nothing at all (which is then told as missing)."""
    return isinstance(prompt, str) or (prompt is None and not turns)


def _unlearned(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def _shared_turns(better: list[Message], worse: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole conversations -> the turns they share, and the rest of each, which begins with an answer."""
    pairs = zip(better, worse, strict=False)
    shared = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(better), len(worse)))
    if better == worse:
        shared = max((i for i, message in enumerate(better) if message["role"] == "assistant"), default=0)
    if any(len(turns) <= shared or turns[shared]["role"] != "assistant" for turns in (better, worse)):
        raise BadRow(f"chosen and rejected do not part at an answer, but at messages[{shared}]")
    return better[:shared], better[shared:], worse[shared:]


def _check_prompt(prompt: Any, messages: Sequence[Message], notes: list[str]) -> None:
    """A prompt beside two whole conversations must be what they begin with."""
    if prompt is None:
        return
    if isinstance(prompt, str):
        agrees = any(message.get("content", "").strip() == prompt.strip() for message in messages)
    else:
        agrees = _turns(prompt, "prompt", "user", notes) == list(messages)
    if not agrees:
        raise BadRow("the prompt is not what chosen and rejected begin with", "give only one of the two")
