"""What a probe is made of: questions to be answered, choices to be weighed, texts, and tasks of lm-eval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import folder
from ftune.data import Example

Kind = Literal["answer", "choice"]


@dataclass(frozen=True)
class Item:
    """One thing that a model can get right, as people read it."""

    suite: str
    row_id: str
    kind: Kind
    metric: str
    prompt: str
    expected: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """Answered greedily, and scored by the item's metric."""

    item: Item
    example: Example

    @property
    def examples(self) -> list[Example]:
        return [self.example]


@dataclass(frozen=True)
class Choice:
    """Scored by likelihood. `candidates[k]` is the prompt with choice k after it, whose tokens alone are supervised."""

    item: Item
    answer: int
    candidates: tuple[Example, ...]

    @property
    def examples(self) -> list[Example]:
        """The prompt with the right choice."""
        return [self.candidates[self.answer]]


@dataclass(frozen=True)
class Marked:
    """What one model made of one item."""

    item: Item
    score: float
    text: str
    """What it answered or chose."""
    accuracies: dict[str, float] | None = None
    """Of choices both ways to take the likeliest: `acc` and `acc_norm`."""
    log_likelihoods: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Answers:
    """What one model made of the probe, item by item; and what lm-eval says of how it asked."""

    marked: list[Marked]
    general_loss: float | None
    tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def suites(self) -> dict[str, list[Marked]]:
        found: dict[str, list[Marked]] = {}
        for one in self.marked:
            found.setdefault(one.item.suite, []).append(one)
        return found

    @property
    def scores(self) -> dict[str, list[float]]:
        return {suite: [one.score for one in marked] for suite, marked in self.suites.items()}


class Tasks(Protocol):
    """Suites that another program asks."""

    @property
    def version(self) -> str: ...

    @property
    def documents(self) -> list[Example]: ...

    def ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, who: str) -> Answers: ...


@dataclass(frozen=True)
class Probe:
    """Items by which forgetting is measured, and texts whose loss tells about general language."""

    items: Sequence[Question | Choice]
    texts: Sequence[Example] = ()
    tasks: Tasks | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a user would want to know of how it was read."""

    @property
    def everything(self) -> list[Example]:
        """Prompts with their right answers, and texts: what the divergence from the base is measured on."""
        return [*(example for item in self.items for example in item.examples), *self.texts]

    @property
    def held_out(self) -> list[Example]:
        """What training rows must not hold: all of it, and the documents of lm-eval's tasks."""
        return [*self.everything, *(self.tasks.documents if self.tasks else ())]

    @property
    def digest(self) -> str:
        """sha256 of everything that is asked, whatever file it came from."""
        rows: list[Any] = [asdict(item.item) for item in self.items]
        return folder.sha256_json([*rows, *(text.text for text in self.texts)])
