"""Rows -> text, with who wrote which characters and which of them the model shall learn to write."""

from collections.abc import Sequence
from typing import Any

from ftune.chat.rows import Message, Rendered, Span, TemplateRowError, Turn
from ftune.chat.shape import shape_of
from ftune.chat.spans import Proof, kept_contents
from ftune.chat.template import Template, template_of

THINKING_REMOVED = "thinking of earlier turns is removed by the template"
THINKING_NOT_RENDERED = "the template does not render the thinking of the last turn"
ANSWERS_CUT = "the template leaves out parts of earlier answers"
SYSTEM_ADDED = "the template adds a system message of its own"
SYSTEM_MERGED = "the template writes the system message into the user's turn"
END_NOT_MARKED = "the template's generation marks leave out the end of the turn: the model does not learn to stop"
MARKS_TRUSTED = "some turns lie where the template's generation marks say, which could not be derived another way"


def render_template(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Any = None
) -> str:
    """The template's text. Templates are code: transformers runs them in jinja2's sandbox."""
    template = template_of(tokenizer)
    return template.render(template.prepare(messages), tools or None, add_generation_prompt)


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> str:
    """What the model sees before it answers: what servers send, too."""
    return render_template(tokenizer, messages, add_generation_prompt=True, tools=tools)


def render_messages(tokenizer: Any, messages: Sequence[Message], tools: Any = None) -> Rendered:
    """A conversation, with every assistant turn supervised up to and including its end-of-turn token.

    Raises TemplateRowError for what is wrong with this row under this template, else UserError for the template.
    """
    template, tools = template_of(tokenizer), tools or None
    template.check_contents(messages, tools)
    prepared = template.prepare(messages)
    if not any(message["role"] == "assistant" for message in prepared):
        raise TemplateRowError("no assistant turn, so nothing to learn from", "take this row out")
    notes: list[str] = []
    if template.has_generation_marks:
        text, marks = template.render_marked(prepared, tools)
    else:
        text, marks = template.render(prepared, tools), []
    proof = Proof(template, prepared, tools, text)
    spans = _marked_spans(proof, marks, notes) if marks else proof.spans()
    _check_answers_are_rendered(proof, spans, notes)
    _check_tools_are_rendered(text, prepared, tools)
    turns = _turns(proof, spans, notes)
    _note_thinking(text, prepared, spans, notes)
    if shape_of(template).added and prepared[0]["role"] != "system":
        notes.append(SYSTEM_ADDED)
    return Rendered(text, tuple(spans), adds_special_tokens=False, turns=turns, notes=tuple(dict.fromkeys(notes)))


def _marked_spans(proof: Proof, marks: Sequence[Span], notes: list[str]) -> list[Span]:
    """What the template marks, as far as the model writes it: the marks of some templates hold headers, too."""
    answers = [i for i, message in enumerate(proof.messages) if message["role"] == "assistant"]
    marks = [(start, end) for start, end in marks if end > start]
    if len(marks) != len(answers):
        raise TemplateRowError(
            f"the template has {len(marks)} generation marks for {len(answers)} assistant turns",
            "mark every assistant turn once, or take the marks out of the template",
        )
    spans = []
    for i, (start, end) in zip(answers, marks, strict=True):
        try:
            first, last = proof.span(i)
        except TemplateRowError:
            first, last = start, end
            notes.append(MARKS_TRUSTED)
        spans.append((max(start, first), min(end, last)))
        if not proof.text[start:end].rstrip().endswith(proof.template.end_tokens):
            notes.append(END_NOT_MARKED)
    return spans


def _check_answers_are_rendered(proof: Proof, spans: Sequence[Span], notes: list[str]) -> None:
    """Some templates leave out the words beside a call; what is cut from earlier answers is told."""
    answers = [i for i, message in enumerate(proof.messages) if message["role"] == "assistant"]
    for i, (start, end) in zip(answers, spans, strict=True):
        content = proof.messages[i].get("content") or ""
        if any(kept.strip() in proof.text[start:end] for kept in kept_contents(content)):
            continue
        if i in proof.shortened:
            notes.append(ANSWERS_CUT)
        else:
            raise TemplateRowError(
                f"assistant message is not rendered by this template: {content[:40]!r}",
                "give a template that renders it, or take the message out of the data",
            )


def _check_tools_are_rendered(text: str, messages: Sequence[Message], tools: Any) -> None:
    named = [tool.get("function", tool).get("name") for tool in tools or () if isinstance(tool, dict)]
    called = [call.get("function", call)["name"] for m in messages for call in m.get("tool_calls", ())]
    for kind, names in (("tool", named), ("call of the tool", called)):
        for name in names:
            if name and name not in text:
                raise TemplateRowError(
                    f"the {kind} {name!r} is not rendered by this template", "give a template that renders tools"
                )


def _note_thinking(text: str, messages: Sequence[Message], spans: Sequence[Span], notes: list[str]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    missing = []
    for i, (message, (start, end)) in enumerate(zip(answers, spans, strict=True)):
        content = message.get("content") or ""
        thinking = message.get("reasoning_content") or (
            content.partition("</think>")[0].rpartition("<think>")[2] if "</think>" in content else ""
        )
        if thinking.strip() and thinking.strip() not in text[start:end]:
            missing.append(i)
    if missing:
        notes.append(THINKING_NOT_RENDERED if missing[-1] == len(answers) - 1 else THINKING_REMOVED)


def _turns(proof: Proof, spans: Sequence[Span], notes: list[str]) -> tuple[Turn, ...]:
    """Who wrote what. Before each answer lies what it answers; roles in there are told apart by rendering the first."""
    turns: list[Turn] = []
    waiting: list[int] = []
    position, remaining = 0, iter(spans)
    for i, message in enumerate(proof.messages):
        if message["role"] != "assistant":
            waiting.append(i)
            continue
        start, end = next(remaining)
        turns += _asked(proof, waiting, (position, start), notes)
        turns.append(Turn("assistant", start, end))
        position, waiting = end, []
    turns += _asked(proof, waiting, (position, len(proof.text)), notes)
    return tuple(turns)


def _asked(proof: Proof, which: Sequence[int], segment: Span, notes: list[str]) -> list[Turn]:
    """The turns of messages that are not the assistant's, in their segment of the text, which must hold all of them."""
    position = segment[0]
    for i in which:
        content = (proof.messages[i].get("content") or "").strip()
        place = proof.text.find(content, position, segment[1])
        if place >= 0:
            position = place + len(content)
        elif not proof.is_used(i):
            raise TemplateRowError(
                f"{proof.messages[i]['role']} message is not rendered by this template",
                "give a template that renders it, or take the message out of the data",
            )
    turns: list[Turn] = []
    begin, roles = segment[0], [proof.messages[i]["role"] for i in which]
    merged = ""
    for k, i in enumerate(which):
        if k + 1 < len(which) and roles[k + 1] == roles[k]:
            continue
        end = segment[1] if k + 1 == len(which) else _end_of_prefix(proof, i, begin)
        role = merged + roles[k]
        if end is None:
            merged = role + "+"
            if roles[k] == "system":
                notes.append(SYSTEM_MERGED)
            continue
        turns.append(Turn(role, begin, end))
        begin, merged = end, ""
    return turns


def _end_of_prefix(proof: Proof, i: int, begin: int) -> int | None:
    """Where messages up to i end, if the conversation begins with them rendered alone; else None."""
    prefix = _prefix(proof.template, proof.messages[: i + 1], proof.tools)
    if prefix is None or prefix[begin:].strip() in {"", *proof.template.special_tokens}:
        return None
    prefix = prefix.removesuffix(proof.shape.footer.lstrip())
    content = (proof.messages[i].get("content") or "").strip()
    is_own = proof.text.startswith(prefix) and content in prefix[begin:]
    return len(prefix) if is_own else None


def _prefix(template: Template, messages: Sequence[Message], tools: Any) -> str | None:
    """Rendered alone. Data sets repeat one system message over all rows, so the last one of those is kept."""
    key = (messages[0].get("content"), repr(tools)) if len(messages) == 1 else None
    if key is not None and key in template.prefixes:
        return template.prefixes[key]
    try:
        text: str | None = template.render(messages, tools)
    except TemplateRowError:
        text = None
    if key is not None:
        template.prefixes.clear()
        template.prefixes[key] = text
    return text


def render_completion(tokenizer: Any, prompt: str, completion: str) -> Rendered:
    """A prompt and its completion: as a chat turn where the tokenizer has a template, else as plain text."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return render_messages(tokenizer, messages)
    text = prompt + completion
    turns = (Turn("prompt", 0, len(prompt)), Turn("completion", len(prompt), len(text)))
    return Rendered(text, ((len(prompt), len(text)),), adds_special_tokens=True, ends_with_eos=True, turns=turns)


def render_text(text: str) -> Rendered:
    """Plain text: every token is supervised."""
    span = (0, len(text))
    return Rendered(text, (span,), adds_special_tokens=True, ends_with_eos=True, turns=(Turn("text", *span),))
