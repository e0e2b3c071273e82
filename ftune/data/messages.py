"""The turns of a conversation, in the spellings there are, -> messages as chat templates know them.

Two spellings of one thing: {role, content} and ShareGPT's {from, value}. What comes out has the roles system, user,
assistant and tool, a text `content` (absent where a turn is calls alone), OpenAI's `tool_calls` and
`reasoning_content`, and `weight: 0` on an assistant turn that is not to be learned.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from ftune.chat import ROLES, Message
from ftune.data.fields import BadRow, as_list, as_text, from_json, told

USUAL_ALIASES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's names, which need no word."""
OTHER_ALIASES = {
    "developer": "system",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""Names of other tools and models; a note says what they were taken for."""
CALLS = ("function_call", "tool_call")
"""ShareGPT's roles of a turn whose value is the JSON of a call {name, arguments}, or of a list of them."""
REASONING = ("reasoning_content", "thinking", "reasoning")
LEARNED = ("weight", "train", "trainable", "training", "loss")
"""Keys that say whether a turn is learned: 1 or true, 0 or false. OpenAI's, Axolotl's and other tools' names."""
CALLED = ("tool_calls", "function_call", "name", "tool_call_id")
KNOWN = ("role", "content", "from", "value", *CALLED, *REASONING, *LEARNED)
MEDIA = ("image", "images", "image_url", "audio", "audios", "video", "videos")


def messages_of(value: Any, where: str, notes: list[str]) -> list[Message]:
    """The turns of a list (or its JSON); raises BadRow. What was read as something else is added to `notes`."""
    turns = as_list(value, f'"{where}"')
    if not turns:
        raise BadRow(f'"{where}" must be a list that is not empty')
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        message = _message(turn, f"{where}[{i}]", notes)
        if messages and _continues(messages[-1], turn):
            if messages[-1].get("weight") != message.get("weight"):
                raise BadRow(f"{where}[{i}]: a call and the answer it belongs to have different weights")
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def _continues(last: Message, turn: Any) -> bool:
    """Whether a ShareGPT call belongs to the turn before: there an answer and each call are turns of their own."""
    return last["role"] == "assistant" and (turn.get("role") or turn.get("from")) in CALLS


def _message(turn: Any, where: str, notes: list[str]) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{where} must have a text `role` and a text `content`, this is {told(turn)}")
    turn = {key: value for key, value in turn.items() if value is not None}
    _check_keys(turn, where, notes)
    raw_role = as_text(_either(turn, ("role", "from"), where), f"{where}: the role")
    content = _either(turn, ("content", "value"), where)
    if raw_role in CALLS:
        return {"role": "assistant", "tool_calls": _calls(content, where), **_weight(turn, "assistant", where)}
    role = _role(raw_role, where, notes)
    message: Message = {"role": role}
    if content is not None:
        message["content"] = _content(content, where)
    if calls := _calls_of_turn(turn, where):
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if key in turn:
            message[key] = as_text(turn[key], f"{where}: {key}")
    if thoughts := {as_text(turn[key], f"{where}: {key}") for key in REASONING if turn.get(key)}:
        if len(thoughts) > 1:
            raise BadRow(f"{where} has two different texts under {', '.join(k for k in REASONING if k in turn)}")
        message["reasoning_content"] = thoughts.pop()
    _check_turn(message, where)
    return {**message, **_weight(turn, role, where)}


def _check_keys(turn: Message, where: str, notes: list[str]) -> None:
    for key in turn:
        if key in KNOWN or not turn[key]:
            continue
        if key in MEDIA:
            raise BadRow(f"{where} has {key!r}: only text can be trained on", "take the row out")
        if near := _nearest_key(str(key)):
            raise BadRow(f"{where} has the unknown key {key!r}; did you mean {near!r}?")
        notes.append(f"the key {key!r} of messages is not used")


@lru_cache(maxsize=256)
def _nearest_key(key: str) -> str:
    """The known key that this one may be a slip of, or nothing. Looked up once: it is the same in every row."""
    return next(iter(get_close_matches(key, KNOWN, 1, cutoff=0.8)), "")


def _either(turn: Message, keys: tuple[str, str], where: str) -> Any:
    """The value under whichever of two spellings is there."""
    found = [turn[key] for key in keys if key in turn]
    if len(found) == 2 and found[0] != found[1]:
        raise BadRow(f"{where} has both `{keys[0]}` and another `{keys[1]}`", "keep one of them")
    if not found and keys[0] == "role":
        raise BadRow(f"{where} must have a text `role` and a text `content`; it has {', '.join(map(repr, turn))}")
    return found[0] if found else None


def _role(role: str, where: str, notes: list[str]) -> str:
    if role in ROLES:
        return role
    if role in USUAL_ALIASES:
        return USUAL_ALIASES[role]
    if role in OTHER_ALIASES:
        notes.append(f"the role {role!r} is taken as {OTHER_ALIASES[role]!r}")
        return OTHER_ALIASES[role]
    near = get_close_matches(role, [*ROLES, *USUAL_ALIASES, *OTHER_ALIASES, *CALLS], 1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    raise BadRow(f"{where} has the unknown role {role!r}{guess}", f"roles are {', '.join(ROLES)}")


def _content(content: Any, where: str) -> str:
    """A text, or the texts of a list of parts put together as templates do, with nothing between."""
    if not isinstance(content, list):
        return as_text(content, f"{where}: `content`")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = f"a part of type {kind!r}" if kind else told(part)
            raise BadRow(f"{where}: `content` holds {shown}: only text can be trained on", "take the row out")
        texts.append(as_text(part.get("text"), f"{where}: a text part"))
    return "".join(texts)


def _calls_of_turn(turn: Message, where: str) -> list[Message]:
    calls = turn.get("tool_calls") or turn.get("function_call")
    return _calls(calls, where) if calls else []


def _calls(value: Any, where: str) -> list[Message]:
    """The calls of one turn as {type: function, function: {name, arguments}}, from any of the ways to write them."""
    if isinstance(value, str):
        value = from_json(value, f"{where}: a call {{name, arguments}}")
    return [_call(call, where) for call in (value if isinstance(value, list) and value else [value])]


def _call(call: Any, where: str) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"{where}: a call must be {{name, arguments}}, this is {told(call)}")
    arguments = function.get("arguments")
    arguments = {} if arguments is None or arguments == "" else arguments
    decoded = from_json(arguments, f"{where}: `arguments`") if isinstance(arguments, str) else arguments
    if not isinstance(decoded, dict):
        raise BadRow(f"{where}: the arguments of a call must be an object, these are {told(arguments)}")
    about = {"id": as_text(call["id"], f"{where}: the id of a call")} if call.get("id") is not None else {}
    return {"type": "function", **about, "function": {"name": function["name"], "arguments": arguments}}


def _weight(turn: Message, role: str, where: str) -> Message:
    for key in LEARNED:
        if key in turn:
            if turn[key] not in (0, 1):
                raise BadRow(f"{where}: `{key}` must be 0 or 1, this is {told(turn[key])}")
            if turn[key] and role != "assistant":
                raise BadRow(f"{where}: `{key}` asks for a {role} turn to be learned", "only assistant turns are")
            if not turn[key] and role == "assistant":
                return {"weight": 0}
    return {}


def _check_turn(message: Message, where: str) -> None:
    """What a turn must say. A tool may return nothing, and a system message may be empty on purpose."""
    role, content, has_calls = message["role"], message.get("content"), "tool_calls" in message
    if has_calls and role != "assistant":
        raise BadRow(f"{where}: a {role} turn cannot call tools")
    if content is None and not has_calls:
        raise BadRow(f"{where}: the {role} turn has no `content`")
    if role == "assistant" and not has_calls and not (content or "").strip():
        raise BadRow(f"{where}: the assistant's answer is empty")
    if role == "user" and not (content or "").strip():
        raise BadRow(f"{where}: the user's turn is empty")


def check_order(messages: Sequence[Message]) -> None:
    """Refuse an order that templates reject or silently change. First and last may be anybody's turn.

    The turns after the last answer are read but teach nothing. A result must follow an assistant turn, whose call may
    be written in its text.
    """
    last, calls = "", set[str]()
    for i, message in enumerate(messages):
        role, where = message["role"], f"messages[{i}]"
        if role == "system" and i:
            raise BadRow(
                f"{where}: a system message after the first turn", "templates take one, at the start: join them"
            )
        if role == last and role in ("user", "assistant"):
            raise BadRow(f"{where}: two {role} turns in a row", "join them, or add the turn between")
        if role == "tool" and last not in ("assistant", "tool"):
            raise BadRow(f"{where}: a tool's result without a call before it")
        if role == "assistant":
            calls = {call["id"] for call in message.get("tool_calls", ()) if "id" in call}
        elif role == "tool" and calls and "tool_call_id" in message and message["tool_call_id"] not in calls:
            raise BadRow(f"{where}: no call has the id {message['tool_call_id']!r}")
        last = role
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no assistant turn, so nothing to learn from")
    if all(message.get("weight") == 0 for message in answers):
        raise BadRow("every assistant turn has weight 0, so nothing to learn from")
