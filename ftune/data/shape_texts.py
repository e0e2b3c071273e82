"""The texts of a shaped row, for duplicates, contamination and overlap: what is asked, and everything."""

import json
from collections.abc import Iterable, Iterator

from ftune.data.messages import Message
from ftune.data.shapes import Completion, Conversation, Labelled, PlainPreference, Preference, ShapedRow, Text


def question_text(row: ShapedRow) -> str:
    """What the row asks: all that neither the system nor the assistant says; of a text, the text."""
    match row:
        case Text() | Labelled():
            return row.text
        case Completion() | PlainPreference():
            return row.prompt
        case Conversation() | Preference():
            asked = (message for message in row.messages if message["role"] not in ("system", "assistant"))
            return "\n".join(message.get("content", "") for message in asked)


def full_text(row: ShapedRow) -> str:
    """All that the row says, a line break between its parts; calls and tools as JSON."""
    return "\n".join(_parts(row))


def _parts(row: ShapedRow) -> Iterator[str]:
    match row:
        case Text():
            yield row.text
        case Labelled():
            yield from (row.text, str(row.label))
        case Completion():
            yield from (row.prompt, row.completion)
        case PlainPreference():
            yield from (row.prompt, row.chosen, row.rejected)
        case Conversation():
            yield from _texts(row.messages)
        case Preference():
            yield from _texts((*row.messages, *row.chosen, *row.rejected))
    if isinstance(row, Conversation | Preference) and row.tools:
        yield from map(_as_json, row.tools)


def _texts(messages: Iterable[Message]) -> Iterator[str]:
    for message in messages:
        for key in ("reasoning_content", "content"):
            if key in message:
                yield message[key]
        yield from (_as_json(call["function"]) for call in message.get("tool_calls", ()))


def _as_json(value: Message) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
