"""Answers with their scores: the same prompts, decoding and scorer for whoever answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune.console.progress import task_progress
from ftune.data import Example
from ftune.evaluate.generation import generate
from ftune.evaluate.metrics import METRICS, QUICK, corpus_bleu, field_shares, unexpected_share
from ftune.evaluate.prompts import expected, prompt_ids, prompt_text

Scorer: TypeAlias = Callable[[Example, str], float]
"""The score of an answer to an example."""


@dataclass(frozen=True)
class Scored:
    """The answers of one model to a set of items, and the score of each."""

    answers: list[str]
    scores: list[float]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    metric: str | Scorer,
    max_new_tokens: int,
    description: str,
    shots: Sequence[Example] = (),
) -> Scored:
    """Answers and their scores, in the order of the examples. `metric`: a key of METRICS, or a scorer."""
    prompts = [prompt_ids(tokenizer, example, shots) for example in examples]
    answers = generate(model, tokenizer, prompts, max_new_tokens, description)
    return Scored(answers, score_answers(examples, answers, metric, description))


def score_answers(
    examples: Sequence[Example], answers: Sequence[str], metric: str | Scorer, description: str
) -> list[float]:
    """The score of each answer; with progress where the metric may take its time."""
    pairs = zip(examples, answers, strict=True)
    if isinstance(metric, str) and metric in QUICK:
        return [METRICS[metric](expected(example), answer) for example, answer in pairs]
    scores = []
    with task_progress(f"{description}, scores", len(answers)) as progress:
        for example, answer in pairs:
            found = METRICS[metric](expected(example), answer) if isinstance(metric, str) else metric(example, answer)
            scores.append(found)
            progress.advance()
    return scores


def details(
    metric: str, examples: Sequence[Example], base: Scored, few_shot: Scored | None, tuned: Scored
) -> dict[str, Any]:
    """What else report.json's `task` tells of some metrics: which fields are right, BLEU over all items together."""
    wanted = list(map(expected, examples))
    if metric == "json_match":
        pairs = list(zip(wanted, tuned.answers, strict=True))
        fields = field_shares(pairs)
        return {"fields": fields, "unexpected_fields": unexpected_share(pairs)} if fields else {}
    if metric == "bleu":
        measured = {"zero_shot": base, "few_shot": few_shot, "tuned": tuned}
        found = {name: scored and corpus_bleu(wanted, scored.answers) for name, scored in measured.items()}
        scores = {name: pair and pair[0] for name, pair in found.items()}
        return {"corpus_bleu": {**scores, "signature": corpus_bleu(wanted, tuned.answers)[1]}}
    return {}


def sample_rows(
    examples: Sequence[Example], base: Scored, few_shot: Scored | None, tuned: Scored
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl."""
    return [
        {
            "row_id": example.row_id,
            "prompt": prompt_text(example),
            "expected": expected(example),
            "base": base.answers[i],
            "few_shot": few_shot.answers[i] if few_shot else None,
            "tuned": tuned.answers[i],
            "scores": {
                "zero_shot": base.scores[i],
                "few_shot": few_shot.scores[i] if few_shot else None,
                "tuned": tuned.scores[i],
            },
        }
        for i, example in enumerate(examples)
    ]
