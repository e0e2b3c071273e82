"""Messages or a prompt and its completion -> text, token ids and the mask of supervised tokens.

The mask is not found by searching for markers. The conversation is rendered turn by turn; each rendering must begin
with the one before it (the template is *prefix-stable*), so the characters a turn adds are exactly its own, and the
tokenizer's offsets say which tokens cover them. A template for which that does not hold is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftune.errors import UserError

Message = dict[str, Any]
Span = tuple[int, int]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Rendered:
    """A row as text, with the character spans that the model shall learn to write."""

    text: str
    spans: tuple[Span, ...]
    adds_special_tokens: bool
    """Whether the tokenizer adds its own special tokens (plain text), or the template wrote them already."""
    ends_with_eos: bool = False
    """Whether an end-of-sequence token is to be appended and supervised (plain prompt and completion)."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of one row and, for each, whether it is supervised."""

    input_ids: list[int]
    supervised: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """How many tokens give a loss; the first token of a row has nothing before it to be predicted from."""
        return sum(self.supervised[1:])

    @property
    def labels(self) -> list[int]:
        """Unshifted labels: the token itself where it is supervised, else -100; never for the first token."""
        pairs = zip(self.input_ids, self.supervised, strict=True)
        return [token if wanted and i else -100 for i, (token, wanted) in enumerate(pairs)]


@dataclass(frozen=True)
class LabelledTokens(Tokens):
    """A text whose class is told at its last token, where a causal model has read it all."""

    class_id: int = 0

    @property
    def num_supervised(self) -> int:
        return 1

    @property
    def labels(self) -> list[int]:
        return [-100] * (len(self.input_ids) - 1) + [self.class_id]


def render_template(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The template's text. Templates are code: transformers runs them in jinja2's sandbox."""
    import jinja2

    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except (jinja2.TemplateError, TypeError, OverflowError) as error:
        raise UserError(
            f"the chat template cannot render these messages: {error}",
            "model.chat_template",
            "check the roles the template allows, or give another one with model.chat_template",
        ) from error


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """What the model sees before it answers: what servers send, too."""
    return render_template(tokenizer, messages, add_generation_prompt=True)


def render_messages(tokenizer: Any, messages: Sequence[Message]) -> Rendered:
    """A conversation, with every assistant turn supervised up to and including its end-of-turn token."""
    full = render_template(tokenizer, messages)
    _check_contents_are_rendered(full, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:i])
        until_here = render_template(tokenizer, messages[: i + 1])
        if not (until_here.startswith(prompt) and full.startswith(until_here)):
            raise UserError(
                f"the chat template is not prefix-stable: rendering turn {i + 1} changes what came before it, "
                "so its tokens cannot be told apart",
                "model.chat_template",
                "give a template that leaves earlier turns as they are",
            )
        spans.append((len(prompt), _end_of_turn(tokenizer, until_here, len(prompt))))
    return Rendered(full, tuple(spans), adds_special_tokens=False)


def _check_contents_are_rendered(text: str, messages: Sequence[Message]) -> None:
    for message in messages:
        content = message.get("content") or ""
        if content.strip() not in text:
            raise UserError(
                f"{message['role']} message is not rendered by this template",
                "model.chat_template",
                "give a template that renders it, or take the message out of the data",
            )


def _end_of_turn(tokenizer: Any, text: str, start: int) -> int:
    """Where the turn that ends `text` is over: after its last special token, if only white space follows it."""
    stripped = text.rstrip()
    is_ended = len(stripped) > start and any(stripped.endswith(token) for token in _control_tokens(tokenizer).values())
    return len(stripped) if is_ended else len(text)


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens beside the learnt vocabulary, by id; end-of-turn tokens are among them."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}


def render_completion(tokenizer: Any, prompt: str, completion: str) -> Rendered:
    """A prompt and its completion: as a chat turn where the tokenizer has a template, else as plain text."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return render_messages(tokenizer, messages)
    text = prompt + completion
    return Rendered(text, ((len(prompt), len(text)),), adds_special_tokens=True, ends_with_eos=True)


def render_text(text: str) -> Rendered:
    """Plain text: every token is supervised."""
    return Rendered(text, ((0, len(text)),), adds_special_tokens=True, ends_with_eos=True)


def tokenize(tokenizer: Any, rendered: Rendered) -> Tokens:
    """Token ids of the whole text (so that tokens at a joint are those of inference) and the supervised mask.

    A token is supervised when its first character lies in a span; one that straddles the joint between prompt and
    answer belongs to the prompt, where inference will have it.
    """
    encoded = tokenizer(
        rendered.text,
        add_special_tokens=rendered.adds_special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    input_ids: list[int] = list(encoded["input_ids"])
    supervised = [
        end > start and any(first <= start < last for first, last in rendered.spans)
        for start, end in encoded["offset_mapping"]
    ]
    if rendered.ends_with_eos and tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
        supervised.append(True)
    return Tokens(input_ids, supervised)


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """The ids generation must stop at: what the template trains as the end of an assistant turn, and eos."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tokens = tokenize(tokenizer, render_messages(tokenizer, messages))
        last = max(i for i, wanted in enumerate(tokens.supervised) if wanted)
        if tokens.input_ids[last] in _control_tokens(tokenizer) and tokens.input_ids[last] not in ids:
            ids.append(tokens.input_ids[last])
    return ids
