"""The forgetting probe: what the model could do before, item by item, and what it still can."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import batches, data, evaluate, loss
from ftune.data import Example
from ftune.errors import Problem, UserError
from ftune.model import head, hidden_states
from ftune.objectives import sft
from ftune.statistics import paired_difference
from ftune.train import TrainingPlan, attending, mean_loss

DEFAULT_SUITE = "probe"
ROOM = 8
"""Tokens an answer may be longer than the longest right one of its suite."""
KL_TOKENS = 512
"""Positions whose whole distributions are held at once."""


@dataclass(frozen=True)
class Probe:
    """Items to be answered, by suite, and texts whose loss tells about general language."""

    suites: dict[str, list[Example]]
    texts: list[Example]

    @property
    def everything(self) -> list[Example]:
        return [*(example for examples in self.suites.values() for example in examples), *self.texts]


def load(tokenizer: PreTrainedTokenizerBase, path: Path, max_length: int, vocab_size: int) -> Probe:
    """The user's own probe file: rows of any known shape, with an optional `suite`; rows of `text` have no answer."""
    suites: dict[str, list[Example]] = {}
    texts, problems = [], []
    rules = data.Rules(max_length=max_length)
    for row in data.read_rows(path):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            shape = data.detect(row.fields, "auto", row.place).shape
            example = data.make_example(tokenizer, row, shape, rules)
        except data.BadRow as error:
            problems.append(Problem(str(error), row.place, error.hint))
            continue
        if shape == "text":
            texts.append(example)
        else:
            suites.setdefault(str(row.fields.get("suite", DEFAULT_SUITE)), []).append(example)
    if problems:
        raise UserError.collect(problems[: data.MAX_SHOWN])
    if not suites and not texts:
        raise UserError(
            "0 usable items in the probe", str(path), "give rows of messages, prompt and completion, or text"
        )
    if max((max(e.tokens.input_ids) for e in Probe(suites, texts).everything), default=0) >= vocab_size:
        raise UserError("the probe has tokens outside the model's vocabulary", str(path))
    return Probe(suites, texts)


@dataclass(frozen=True)
class Answers:
    """What one model made of the probe."""

    scores: dict[str, list[float]]
    general_loss: float | None


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe, plan: TrainingPlan, who: str
) -> Answers:
    """Every item answered greedily and scored by exact match; the loss per token of the texts."""
    items = [example for examples in probe.suites.values() for example in examples]
    longest = max((example.tokens.num_supervised for example in items), default=0)
    scores: dict[str, list[float]] = {}
    if items:
        scored = evaluate.score(model, tokenizer, items, "exact_match", longest + ROOM, f"probe, {who}").scores
        position = 0
        for suite, examples in probe.suites.items():
            scores[suite] = scored[position : position + len(examples)]
            position += len(examples)
    general = mean_loss(model, probe.texts, plan, sft.token_losses) if probe.texts else None
    return Answers(scores, general)


def compare(before: Answers, after: Answers, kl: float) -> dict[str, Any]:
    """The `forgetting` part of report.json."""
    suites = []
    for suite, scores in before.scores.items():
        paired = paired_difference(scores, after.scores[suite])
        suites.append({"name": suite, **paired.as_dict()})
    return {
        "suites": suites,
        "worst_drop": max((suite["drop"] for suite in suites), default=None),
        "general_loss": {"before": before.general_loss, "after": after.general_loss},
        "kl_to_base": kl,
    }


def worst_drop(before: Answers, after: Answers) -> float | None:
    """The largest drop of a suite's mean score; None without suites."""
    drops = [fmean(scores) - fmean(after.scores[suite]) for suite, scores in before.scores.items()]
    return max(drops, default=None)


@torch.no_grad()
def kl_to_base(base: PreTrainedModel, tuned: PreTrainedModel, examples: Sequence[Example], plan: TrainingPlan) -> float:
    """Mean over supervised positions of KL(tuned || base) = sum_v p_tuned (log p_tuned - log p_base), in nats."""
    total, count = 0.0, 0
    device = base.get_input_embeddings().weight.device
    base.eval()
    tuned.eval()
    with attending(base, plan.packing, plan.attention), attending(tuned, plan.packing, plan.attention):
        for part in batches.micro_batches(examples, plan.micro_batch_tokens, plan.packing):
            batch = part.to(device)
            positions, _ = loss.predicting_positions(batch.labels)
            states = [hidden_states(model, batch, plan.packing)[positions] for model in (base, tuned)]
            for ours, theirs in zip(*(torch.split(state, KL_TOKENS) for state in states), strict=True):
                log_base = functional.log_softmax(head(base)(ours).float(), dim=-1)
                log_tuned = functional.log_softmax(head(tuned)(theirs).float(), dim=-1)
                total += float(functional.kl_div(log_base, log_tuned, reduction="sum", log_target=True))
                count += len(ours)
    return max(0.0, total / count)
