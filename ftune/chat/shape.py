"""How a template writes a turn, learnt from a conversation of probe texts; rows then only assert it, at its place."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ftune.chat.rows import Message, TemplateRowError
from ftune.chat.template import PROBES, Template

QUESTION, ANSWER = PROBES
NEXT_QUESTION, NEXT_ANSWER = QUESTION[::-1], ANSWER[::-1]


@dataclass(frozen=True)
class Shape:
    """What surrounds the content of a plain turn. All texts are exact; `is_known` is False where nothing was learnt."""

    is_known: bool = False
    head: str = ""
    """What the last answer begins with, after its generation prompt (an empty `<think></think>`, say)."""
    tail: str = ""
    """What follows the content of the last answer, to the end of the text."""
    end_of_turn: str = ""
    """What of it ends the turn; empty where nothing does."""
    ends_earlier_turns: bool = True
    """Whether answers before the last one end the same way."""
    added: str = ""
    """Text of the template's own before the first message, beyond special tokens: a system message by default."""
    generation_prompt: str = ""
    """What add_generation_prompt adds."""

    @property
    def footer(self) -> str:
        """What the template writes at the end of a conversation, behind the end of its last turn."""
        return self.tail[len(self.end_of_turn) :]


_SHAPES: WeakKeyDictionary[Template, Shape] = WeakKeyDictionary()


def shape_of(template: Template) -> Shape:
    if template not in _SHAPES:
        _SHAPES[template] = _learn(template)
    return _SHAPES[template]


def _learn(template: Template) -> Shape:
    asked, answered = _user(QUESTION), {"role": "assistant", "content": ANSWER}
    try:
        question, prompt = template.render([asked]), template.render([asked], add_generation_prompt=True)
        short = template.render([asked, answered])
        long = template.render([asked, answered, _user(NEXT_QUESTION), {"role": "assistant", "content": NEXT_ANSWER}])
    except TemplateRowError:
        return Shape()
    probes = (ANSWER, QUESTION)
    if any(text.count(probe) != 1 for text in (short, long) for probe in probes) or not short.startswith(prompt):
        return Shape()
    if long.count(NEXT_QUESTION) != 1 or not question.startswith(prompt[: question.rindex(QUESTION)]):
        return Shape()
    head, _, tail = short[len(prompt) :].partition(ANSWER)
    between = long.partition(ANSWER)[2].partition(NEXT_QUESTION)[0]
    end = _end_of_turn(template, tail, between)
    if end and end in head:
        return Shape()
    opened = question.removesuffix(tail[len(end) :].lstrip())  # without what ends a conversation
    added = short.partition(QUESTION)[0]
    return Shape(
        is_known=True,
        head=head,
        tail=tail,
        end_of_turn=end,
        ends_earlier_turns=bool(end) and between.startswith(end),
        added=_own_text(template, added, between.removeprefix(end)),
        generation_prompt=prompt[len(opened) :] if prompt.startswith(opened) else "",
    )


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _end_of_turn(template: Template, tail: str, between: str) -> str:
    """What ends a turn: all that is written after the last answer if earlier turns have it too, else its first token.

    Only a special token ends a turn: white space or plain words after a text do not stop anything.
    """
    stripped = tail.rstrip()
    tokens = template.end_tokens
    if stripped.endswith(tokens) and between.startswith(stripped):
        return stripped
    places = [(place + len(token)) for token in tokens if (place := tail.find(token)) >= 0]
    return tail[: min(places)] if places else ""


def _own_text(template: Template, before: str, header: str) -> str:
    """The part of the text before the first user's content that a later user's turn does not have."""
    own = before.strip().removesuffix(header.strip())
    bare = own
    for token in template.control_tokens.values():
        bare = bare.replace(token, "")
    return own.strip() if bare.strip() else ""
