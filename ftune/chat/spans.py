"""Where the assistant's turns lie in a rendered conversation, proven for each row and turn; else the row is refused.

The text of a turn starts where its generation prompt ends: the conversation must begin with exactly the prompt that the
model will be given. Where it ends is asserted at that place, in one of three ways, the cheapest first:

1. the content stands there, or the part of it that templates keep, between what the template writes around any answer;
2. the turn rendered as the last one, from the messages up to it alone, stands there;
3. (templates that rewrite earlier turns) with its content replaced by two probe texts, the same characters stand before
   and after them, and the row has these too: what is between is the turn's own, and must be a part of its content.

Nothing is found by searching for markers, which contents may hold, too.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from ftune.chat.rows import Message, Span, TemplateRowError
from ftune.chat.shape import Shape, shape_of
from ftune.chat.template import PROBES, Template

SPLIT = "split it into rows that end with that turn, or give a template that leaves earlier turns as they are"


def kept_contents(content: str) -> Iterator[str]:
    """What templates make of an answer: all of it, without the white space around, without its thinking."""
    yield content
    yield content.strip()
    if "</think>" in content:
        answer = content.rpartition("</think>")[2]
        yield from (answer, answer.lstrip("\n"), answer.strip())


class Proof:
    """The spans of one row: `text` is the conversation, `messages` are prepared."""

    def __init__(self, template: Template, messages: Sequence[Message], tools: Any, text: str) -> None:
        self.template, self.messages, self.tools, self.text = template, messages, tools, text
        self.shape: Shape = shape_of(template)
        self.shortened: set[int] = set()
        """Turns of which the template keeps a part only."""
        self.last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")

    def spans(self) -> list[Span]:
        """[start, end) of every assistant turn, in order."""
        found = [self.span(i) for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if any(end > start for (_, end), (start, _) in pairwise(found)):
            raise _unproven(self.last, "its turns overlap")
        return found

    def span(self, i: int) -> Span:
        start = self.start(i)
        end = self._end_by_content(i, start)
        if end is None:
            end = self._end_by_prefix(i, start)
        if end is None:
            end = self._end_by_probes(i, start)
        if end <= start:
            raise _unproven(i, "nothing of it is rendered")
        return start, end

    def start(self, i: int) -> int:
        """The length of the prompt that turn i answers; the conversation must begin with it."""
        if i == 0:
            return self._start_of_a_first_answer()
        prompt = self.template.render(self.messages[:i], self.tools, add_generation_prompt=True)
        if not self.text.startswith(prompt):
            raise TemplateRowError(
                f"the chat template is not prefix-stable: the prompt of turn {i + 1}, as the model will be given it, "
                f"is not how this conversation begins; they part after {_shared(prompt, self.text)!r}",
                SPLIT,
            )
        return len(prompt)

    def _start_of_a_first_answer(self) -> int:
        """Nothing was asked, so no prompt can be compared: the generation prompt must stand before the probes."""
        before = self._around(0)[0]
        for head in ("", self.shape.head):
            if self.shape.generation_prompt and before.endswith(self.shape.generation_prompt + head):
                return len(before) - len(head)
        raise _unproven(0, "no question comes before it")

    def is_used(self, i: int) -> bool:
        """Whether the result of a tool is rendered in another form: some templates write it as JSON, with escapes."""
        if self.messages[i]["role"] != "tool":
            return False
        changed = [*self.messages[:i], {**self.messages[i], "content": PROBES[0]}, *self.messages[i + 1 :]]
        return self.template.render(changed, self.tools).count(PROBES[0]) > self.text.count(PROBES[0])

    def _end_by_content(self, i: int, start: int) -> int | None:
        message, end = self.messages[i], self.shape.end_of_turn
        content = message.get("content")
        if not end or not content or message.get("tool_calls"):
            return None
        for head in {"", self.shape.head}:
            for kept in kept_contents(content):
                if kept and self.text.startswith(head + kept + end, start):
                    return start + len(head) + len(kept) + len(end)
        return None

    def _end_by_prefix(self, i: int, start: int) -> int | None:
        is_final = i == len(self.messages) - 1
        until = self.text if is_final else self.template.render(self.messages[: i + 1], self.tools)
        if until[:start] != self.text[:start]:
            return None
        own = until[: self._end_of_last_turn(until, start)]
        return len(own) if self.text.startswith(own) else None

    def _end_of_last_turn(self, text: str, start: int) -> int:
        """Where the turn that begins at `start` and is the last of `text` is over, without what follows its end."""
        if self.shape.is_known and self.shape.end_of_turn and text.endswith(self.shape.tail):
            end = len(text) - len(self.shape.footer)
            if end > start:
                return end
        stripped = text.rstrip()
        is_ended = len(stripped) > start and stripped.endswith(self.template.end_tokens)
        return len(stripped) if is_ended else len(text)

    def _end_by_probes(self, i: int, start: int) -> int:
        before, after, probe, kept = self._around(i)
        alone = self.template.render([*self.messages[:i], probe], self.tools)
        if alone.count(PROBES[0]) != 1:
            raise _unproven(i, "a text in its place is rendered more than once")
        head, _, tail = alone.partition(PROBES[0])
        own_tail = tail[: self._end_of_last_turn(alone, len(head)) - len(head) - len(PROBES[0])]
        if len(before) < start or not head[start:].endswith(before[start:]):
            raise _unproven(i, "what comes before its content depends on later turns")
        inside = self.text[len(before) : len(self.text) - len(after)]
        if inside not in kept:
            raise _unproven(i, "what is rendered in its place is no part of its content")
        if inside != kept:
            self.shortened.add(i)
        if not after.startswith(own_tail):
            raise _unproven(i, "its end is not written as it is when the turn is the last one")
        return len(self.text) - len(after) + len(own_tail)

    def _around(self, i: int) -> tuple[str, str, Message, str]:
        """What the conversation has before and after a probe in turn i, the probed message, what it replaced."""
        renderings = []
        for probe in PROBES:
            changed, replaced = _with_probe(self.messages[i], probe)
            messages = [*self.messages[:i], changed, *self.messages[i + 1 :]]
            renderings.append(self.template.render(messages, self.tools))
        first, second = (text.partition(probe) for text, probe in zip(renderings, PROBES, strict=True))
        before, after = first[0], first[2]
        if not first[1] or (before, after) != (second[0], second[2]) or PROBES[0] in after:
            raise _unproven(i, "a text in its place is not rendered once and alone")
        fits = self.text.startswith(before) and self.text.endswith(after)
        if not fits or len(before) + len(after) > len(self.text):
            raise _unproven(i, "its content changes what is rendered around it")
        return before, after, _with_probe(self.messages[i], PROBES[0])[0], replaced


def _with_probe(message: Message, probe: str) -> tuple[Message, str]:
    """The message with its content replaced, or the name of its last call if it has none; and what was there."""
    content = message.get("content")
    if content or not message.get("tool_calls"):
        return {**message, "content": probe}, content or ""
    *calls, last = message["tool_calls"]
    function = last.get("function", last)
    changed = {**function, "name": probe}
    call = {**last, "function": changed} if "function" in last else changed
    return {**message, "tool_calls": [*calls, call]}, function["name"]


def _unproven(i: int, reason: str) -> TemplateRowError:
    return TemplateRowError(
        f"the chat template is not prefix-stable: the tokens of turn {i + 1} cannot be told apart, {reason}", SPLIT
    )


def _shared(prompt: str, text: str) -> str:
    """The end of what two texts begin with alike."""
    pairs = enumerate(zip(prompt, text, strict=False))
    length = next((k for k, (a, b) in pairs if a != b), min(len(prompt), len(text)))
    return prompt[max(0, length - 30) : length]
