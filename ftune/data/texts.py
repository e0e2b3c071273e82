"""The texts of an example's fields, for duplicates and contamination: what it asks, what it answers, and all of it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

Fields = Mapping[str, Any]


def question_and_answer(fields: Fields) -> tuple[str, str]:
    """What is asked (all but system and assistant; nothing in plain text), and what the row teaches beside it."""
    if "messages" in fields:
        asked = [m for m in fields["messages"] if m["role"] not in ("system", "assistant")]
        told = [m for m in fields["messages"] if m["role"] == "assistant"]
        return "\n".join(_of_messages(asked)), "\n".join(_of_messages(told))
    if "prompt" in fields:
        return fields["prompt"], fields["completion"]
    if "label" in fields:
        return fields["text"], str(fields["label"])
    return "", fields["text"]


def full_text(fields: Fields) -> str:
    """Everything, a line break between its parts; calls and tools as JSON."""
    return "\n".join(_parts(fields))


def _parts(fields: Fields) -> Iterator[str]:
    for key in ("prompt", "text", "completion", "label"):
        if key in fields:
            yield str(fields[key])
    yield from _of_messages(fields.get("messages", ()))
    rejected = fields.get("rejected", ())
    yield from [rejected] if isinstance(rejected, str) else _of_messages(rejected)
    yield from map(_as_json, fields.get("tools") or ())


def _of_messages(messages: Any) -> Iterator[str]:
    for message in messages:
        for key in ("reasoning_content", "content"):
            if message.get(key):
                yield message[key]
        yield from (_as_json(call["function"]) for call in message.get("tool_calls") or ())


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
