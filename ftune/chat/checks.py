"""What is wrong or worth knowing about a chat template and its tokenizer before anything is trained with them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ftune.chat.rendering import END_NOT_MARKED, render_messages, render_prompt
from ftune.chat.rows import WHERE, Message, Rendered, TemplateRowError
from ftune.chat.shape import ANSWER, QUESTION, Shape, shape_of
from ftune.chat.template import Template, template_of
from ftune.chat.tokens import end_of_turn_ids, tokenize
from ftune.errors import Problem, UserError

TOKEN_LIKE = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")
"""What templates write that some tokenizer has as one token."""
SYSTEM, THINKING = "Bxh", "Ytf"
"""More texts that no template holds."""


@dataclass(frozen=True)
class TemplateCheck:
    """`problems` must be solved before training; `notes` are what a careful reader wants to know."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    generation_prompt: str = ""
    end_of_turn: str = ""
    stop_ids: tuple[int, ...] = ()
    """What the generation config that is saved must stop at."""


def check_template(tokenizer: Any, samples: Sequence[Sequence[Message]] = ()) -> TemplateCheck:
    """Problems and notes of the tokenizer's template, on probe conversations and on some of the user's own.

    Never raises for the template: what cannot be rendered at all is a problem, too.
    """
    try:
        template = template_of(tokenizer)
    except UserError as error:
        return TemplateCheck(error.problems, ())
    shape = shape_of(template)
    problems, notes = list(_of_tokenizer(tokenizer)), list(_notes_of_source(template))
    if shape.is_known:
        problems += _of_shape(shape)
        notes += _notes_of_shape(tokenizer, shape)
        problems += _of_a_row(tokenizer, [_message("user", QUESTION), _message("assistant", ANSWER)], notes)
        notes += _notes_of_roles(tokenizer)
    elif not samples:
        problems.append(
            _problem(
                "the template does not render a plain question and its answer with each text standing in it once",
                "its rows can be proven one by one only; give another template if they are refused",
            )
        )
    for messages in samples:
        problems += _of_a_row(tokenizer, messages, notes)
    return TemplateCheck(
        tuple(dict.fromkeys(problems)),
        tuple(dict.fromkeys(notes)),
        shape.generation_prompt,
        shape.end_of_turn,
        tuple(end_of_turn_ids(tokenizer)),
    )


def _problem(what: str, hint: str) -> Problem:
    return Problem(what, WHERE, hint)


def _message(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def _of_tokenizer(tokenizer: Any) -> Iterator[Problem]:
    bos = tokenizer.bos_token_id
    if bos is not None and list(tokenizer("a")["input_ids"]).count(bos) > 1:
        yield Problem(
            "the tokenizer puts two beginning-of-sequence tokens before plain text", "model.base", "correct its files"
        )
    if getattr(tokenizer, "split_special_tokens", False):
        yield Problem(
            "the tokenizer splits special tokens into pieces (split_special_tokens), so no template can write one",
            "model.base",
            "set it to false in tokenizer_config.json",
        )


def _of_shape(shape: Shape) -> Iterator[Problem]:
    if not shape.end_of_turn:
        looks = TOKEN_LIKE.search(shape.tail)
        why = f"; {looks.group()} is not a token of this tokenizer" if looks else ""
        yield _problem(
            f"the template ends the assistant's turn with no special token{why}: the model would never learn to stop",
            "write {{ eos_token }} after each assistant message, or take the template that belongs to this tokenizer",
        )
    if shape.footer.strip() and shape.footer.strip() == shape.generation_prompt.strip():
        yield _problem("the template writes its generation prompt even where none is asked for", "correct it")
    if not shape.generation_prompt and TOKEN_LIKE.search(shape.head):
        yield _problem(
            f"the template has no generation prompt: the model would have to write {shape.head!r} itself",
            "write the assistant's header where add_generation_prompt is set",
        )


def _notes_of_source(template: Template) -> Iterator[str]:
    if any("strftime_now" in source for source in template.sources):
        yield "the template writes today's date: the same rows give other tokens on another day"


def _notes_of_shape(tokenizer: Any, shape: Shape) -> Iterator[str]:
    if shape.end_of_turn and not shape.ends_earlier_turns:
        yield "only the last answer of a row has an end-of-turn token: rows with several are refused"
    if shape.footer.strip():
        yield f"after the last turn the template writes {shape.footer.strip()!r}, which is not trained"
    if shape.added:
        yield f"the template adds text of its own before the first message: {shape.added[:80]!r}"
    written = shape.added + shape.generation_prompt + shape.head
    for text in dict.fromkeys(TOKEN_LIKE.findall(written)):
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 1:
            yield f"{text} is several tokens to this tokenizer; the template may be another model's"


def _notes_of_roles(tokenizer: Any) -> Iterator[str]:
    question, answer = _message("user", QUESTION), _message("assistant", ANSWER)
    try:
        yield from render_messages(tokenizer, [_message("system", SYSTEM), question, answer]).notes
    except TemplateRowError as error:
        yield f"rows with a system message are refused: {error.problems[0].what}"
    thought = {**answer, "reasoning_content": THINKING}
    try:
        notes = render_messages(tokenizer, [question, thought, question, thought]).notes
        yield from (f"{note} (where rows have it in reasoning_content)" for note in notes if "thinking" in note)
    except TemplateRowError as error:
        yield f"rows with thinking in several turns are refused: {error.problems[0].what}"


def _of_a_row(tokenizer: Any, messages: Sequence[Message], notes: list[str]) -> list[Problem]:
    try:
        rendered = render_messages(tokenizer, messages)
    except TemplateRowError as error:
        return list(error.problems)
    notes += [note for note in rendered.notes if note != END_NOT_MARKED]
    problems = [_problem(note, "extend the marks to it") for note in rendered.notes if note == END_NOT_MARKED]
    return [*problems, *_of_prompt(tokenizer, messages, rendered), *_of_ids(tokenizer, rendered, notes)]


def _of_prompt(tokenizer: Any, messages: Sequence[Message], rendered: Rendered) -> Iterator[Problem]:
    """The text before the last answer must be what transformers gives a server for the same messages."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if not last:
        return
    asked = list(messages[:last])
    prompt = rendered.text[: rendered.spans[-1][0]]
    if prompt != render_prompt(tokenizer, asked) or prompt != tokenizer.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    ):
        yield _problem(
            "the prompt in training is not the one that apply_chat_template(add_generation_prompt=True) gives",
            "let the assistant's turn begin right after the generation prompt",
        )


def _of_ids(tokenizer: Any, rendered: Rendered, notes: list[str]) -> Iterator[Problem]:
    tokens = tokenize(tokenizer, rendered)
    ids, bos, eos = tokens.input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and bos != eos and bos in tokenizer("a")["input_ids"]
    if bos is not None and bos != eos and ids[:2] == [bos, bos]:
        yield _problem("the template begins with two beginning-of-sequence tokens", "write bos_token once")
    if adds_bos and ids[0] == bos:
        notes.append("template and tokenizer both write a beginning of sequence: tokenize its text without adding any")
    if adds_bos and ids[0] != bos:
        notes.append("the template writes no beginning-of-sequence token, which the tokenizer puts before plain text")
    end = [token for token, wanted in zip(ids, tokens.supervised, strict=True) if wanted][-2:]
    if eos is not None and end == [eos, eos]:
        yield _problem("the assistant's turn ends with two end-of-sequence tokens", "write eos_token once")
    if tokens.straddling:
        notes.append("tokens reach over the joint of prompt and answer; they count as prompt, where inference has them")
    prompt = tokenizer(rendered.text[: rendered.spans[-1][0]], add_special_tokens=False)["input_ids"]
    if ids[: len(prompt)] != prompt:
        notes.append("the last tokens of the prompt are others once the answer follows")
