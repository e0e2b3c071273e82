"""Loss and perplexity of rows, each with its interval: rows are what is drawn again, tokens are what is counted."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ftune import batches
from ftune.console.progress import task_progress
from ftune.data import Example
from ftune.objectives import sft
from ftune.statistics import Interval
from ftune.statistics.hypotheses import DRAWS_AT_ONCE
from ftune.train import TrainingPlan, attending

Values = NDArray[np.float64]

RESAMPLES = 10_000


TOKEN_METRICS: Mapping[str, Callable[[Values], Values]] = {"loss": np.asarray, "perplexity": np.exp}
"""What each metric of tokens makes of the loss per token; lower is better."""


def token_score(metric: str, loss: float) -> float:
    """A metric of tokens, of a loss per token; infinite where a perplexity is beyond what a float holds."""
    with np.errstate(over="ignore"):
        return float(TOKEN_METRICS[metric](np.array([loss]))[0])


@dataclass(frozen=True)
class TokenLosses:
    """Of each row: the sum of its supervised tokens' losses, in nats, and how many there are."""

    sums: Values
    counts: Values

    @property
    def mean(self) -> float:
        """The loss per supervised token, over all rows together."""
        return float(self.sums.sum() / self.counts.sum())


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, examples: Sequence[Example], plan: TrainingPlan, description: str
) -> TokenLosses:
    """The losses of every row, in the order of the examples."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples))
    groups = batches.split([len(example.tokens) for example in examples], plan.micro_batch_tokens, plan.packing)
    with attending(model, plan.packing, plan.attention), task_progress(description, len(examples)) as progress:
        for group in groups:
            batch = batches.collate([examples[i] for i in group]).to(device)
            losses = sft.token_losses(model, batch, plan.packing).double().cpu().numpy()
            supervised = (batch.labels[0] != -100).cpu().numpy()
            found = np.add.reduceat(supervised.astype(np.int64), batch.bounds[:-1])
            counts[group] = found
            sums[group] = np.add.reduceat(losses, np.cumsum(found) - found)
            progress.advance(len(group))
    model.train(was_training)
    return TokenLosses(sums, counts)


def mean_loss_interval(losses: TokenLosses, transform: Callable[[Values], Values] = np.asarray) -> Interval | None:
    """The 95 % interval of `transform` (np.exp for the perplexity) of the loss per token."""
    return _percentiles(transform(_resampled(losses.counts, losses.sums)[0]))


def fall_interval(
    before: TokenLosses, after: TokenLosses, transform: Callable[[Values], Values] = np.asarray
) -> Interval | None:
    """The 95 % interval of what it fell by: the same rows are drawn for both (paired bootstrap)."""
    first, second = _resampled(before.counts, before.sums, after.sums)
    return _percentiles(transform(first) - transform(second))


def _resampled(counts: Values, *sums: Values) -> list[Values]:
    """The ratio of sums to counts in each of RESAMPLES draws of rows with replacement, for each of `sums`.

    A loss per token is a ratio of two means over rows, whose lengths differ: both are drawn together (Efron and
    Tibshirani 1993, An Introduction to the Bootstrap, chapter 10).
    """
    generator = np.random.default_rng(0)
    n, at_once = counts.size, max(1, DRAWS_AT_ONCE // counts.size)
    ratios: list[list[Values]] = [[] for _ in sums]
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(0, n, (min(at_once, RESAMPLES - start), n))
        tokens = counts[drawn].sum(axis=1)
        for found, values in zip(ratios, sums, strict=True):
            found.append(values[drawn].sum(axis=1) / tokens)
    return [np.concatenate(found) for found in ratios]


def _percentiles(values: Values) -> Interval | None:
    """None where nothing varies, as with one row, and where a perplexity is beyond what a float holds."""
    low, high = (float(end) for end in np.quantile(values, [0.025, 0.975]))
    return (low, high) if low < high and math.isfinite(high - low) else None
