"""What a row is on its way to the model: messages, their text with its turns, token ids with the supervised mask."""

from dataclasses import dataclass, field, replace
from typing import Any

from ftune.errors import UserError

Message = dict[str, Any]
Span = tuple[int, int]
ROLES = ("system", "user", "assistant", "tool")
WHERE = "model.chat_template"


class TemplateRowError(UserError):
    """One row that the chat template cannot render, or whose tokens cannot be told apart; others may be fine."""

    def __init__(self, what: str, hint: str = "take this row out, or give another template with model.chat_template"):
        super().__init__(what, WHERE, hint)


@dataclass(frozen=True)
class Turn:
    """Characters [start, end) of a text: neighbouring messages of one role, or `system+user` where they are merged.

    Of an assistant's turn they are what the model writes: the generation prompt before it belongs to what it answers.
    """

    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A row as text, with the character spans that the model shall learn to write."""

    text: str
    spans: tuple[Span, ...]
    adds_special_tokens: bool
    """Whether the tokenizer adds its own special tokens (plain text), or the template wrote them already."""
    ends_with_eos: bool = False
    """Whether an end-of-sequence token is to be appended and supervised (plain prompt and completion)."""
    turns: tuple[Turn, ...] = ()
    """Who wrote which characters; what lies between them was written by the template alone."""
    notes: tuple[str, ...] = ()
    """What the template did that the data does not show, in the same words for every row it happens to."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of one row and, for each, whether it is supervised."""

    input_ids: list[int]
    supervised: list[bool]
    straddling: int = field(default=0, kw_only=True)
    """How many tokens reach over an end of a supervised span."""

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
class TextTokens(Tokens):
    """Tokens of a text, and where in it they stand."""

    starts: tuple[int, ...] = field(default=(), compare=False)
    """The character that each token begins at; the text's length for one that was added behind it."""

    def cut(self, length: int) -> "TextTokens":
        """The first tokens; which ones were supervised stays."""
        return replace(self, input_ids=self.input_ids[:length], supervised=self.supervised[:length])


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
