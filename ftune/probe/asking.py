"""The probe asked of one model: answers, the choices it finds likeliest, and its loss on plain text."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import evaluate
from ftune.objectives import sft
from ftune.probe.choices import Weighed, weigh
from ftune.probe.items import Answers, Choice, Item, Marked, Probe, Question
from ftune.train import TrainingPlan, mean_loss

ROOM = 8
"""Tokens an answer may be longer than the longest right one of its suite."""
ROOM_AROUND = 48
"""The same where the right answer may stand among other words."""


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe, plan: TrainingPlan, who: str
) -> Answers:
    """Every question answered greedily, every choice weighed; the loss per token of the texts."""
    marked: dict[tuple[str, str], Marked] = {}
    choices = [item for item in probe.items if isinstance(item, Choice)]
    if choices:
        for choice, weighed in zip(choices, weigh(model, choices, plan, f"probe, {who}"), strict=True):
            marked[_key(choice.item)] = chosen(choice, weighed)
    by_suite: dict[str, list[Question]] = {}
    for item in probe.items:
        if isinstance(item, Question):
            by_suite.setdefault(item.item.suite, []).append(item)
    for suite, questions in by_suite.items():
        for one in answered(model, tokenizer, questions, f"{suite}, {who}"):
            marked[_key(one.item)] = one
    found = [marked[_key(item.item)] for item in probe.items]
    general = mean_loss(model, probe.texts, plan, sft.token_losses) if probe.texts else None
    if probe.tasks is None:
        return Answers(found, general)
    asked = probe.tasks.ask(model, tokenizer, who)
    return Answers([*found, *asked.marked], general, asked.tasks)


def chosen(item: Choice, weighed: Weighed) -> Marked:
    """Whether the likeliest choice is the right one; the score goes by `acc_norm`."""
    accuracies = {
        "acc": float(weighed.by_sum == item.answer),
        "acc_norm": float(weighed.by_character == item.answer),
    }
    text = item.item.choices[weighed.by_character]
    return Marked(item.item, accuracies[item.item.metric], text, accuracies, weighed.sums)


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], description: str
) -> list[Marked]:
    """Questions of one suite. An answer ends where the model ends it, or some tokens behind the longest right one."""
    longest = max(question.example.tokens.num_supervised for question in questions)
    may_be_among_words = any(question.item.metric == "contains" for question in questions)
    prompts = [evaluate.prompt_ids(tokenizer, question.example) for question in questions]
    room = ROOM_AROUND if may_be_among_words else ROOM
    texts = evaluate.generate(model, tokenizer, prompts, longest + room, description)
    return [
        Marked(question.item, evaluate.METRICS[question.item.metric](question.item.expected, text), text)
        for question, text in zip(questions, texts, strict=True)
    ]


def _key(item: Item) -> tuple[str, str]:
    return item.suite, item.row_id
