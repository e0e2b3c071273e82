"""A classifier's predictions and what they are worth: accuracy, macro F1, confusion, each with its interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ftune import batches
from ftune.batches import Features
from ftune.data import Example
from ftune.objectives import classification
from ftune.statistics import Interval, mean_interval, paired_difference
from ftune.train import TrainingPlan, attending

Ids = NDArray[np.int64]
LABEL_METRICS = ("accuracy", "f1")
RESAMPLES = 2000
"""Draws of the bootstrap, which the macro F1 needs for its interval."""


@torch.no_grad()
def predict(
    model: PreTrainedModel, examples: Sequence[Example], plan: TrainingPlan, features: Features | None = None
) -> tuple[Ids, list[float]]:
    """The class id of each example, and its probability. features: what a frozen body made of the examples before."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    ids, shares = np.zeros(len(examples), dtype=np.int64), [0.0] * len(examples)
    groups = batches.split([len(example.tokens) for example in examples], plan.micro_batch_tokens, plan.packing)
    with attending(model, plan.packing and features is None, plan.attention):
        for group in groups:
            made = features.micro_batch(group) if features else batches.collate([examples[i] for i in group])
            batch = made.to(device)
            best = classification.row_logits(model, batch, plan.packing).softmax(dim=-1).max(dim=-1)
            for i, share, class_id in zip(group, best.values.tolist(), best.indices.tolist(), strict=True):
                ids[i], shares[i] = class_id, share
    model.train(was_training)
    return ids, shares


def confusion(expected: Ids, predicted: Ids, num_labels: int) -> Ids:
    """How often each label (row) was taken for each (column): (labels, labels)."""
    counts = np.bincount(expected * num_labels + predicted, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)


def macro_f1(counts: Ids) -> float:
    """The mean over labels of F1 = 2 right / (expected + predicted), of a confusion matrix.

    Labels that were neither expected nor predicted have no F1 and do not count, as in scikit-learn.
    """
    total = counts.sum(axis=0) + counts.sum(axis=1)
    occurs = total > 0
    return float(np.mean(2 * np.diag(counts)[occurs] / total[occurs]))


def score(metric: str, expected: Ids, predicted: Ids, num_labels: int) -> float:
    """The accuracy, or the macro F1."""
    if metric == "accuracy":
        return float((predicted == expected).mean())
    return macro_f1(confusion(expected, predicted, num_labels))


@dataclass(frozen=True)
class Measured:
    """A metric of some predictions and of a baseline's; `gain` is what the first has more."""

    tuned: float
    baseline: float
    tuned_interval: Interval | None
    baseline_interval: Interval | None
    gain_interval: Interval | None


def measure(metric: str, expected: Ids, predicted: Ids, baseline: Ids, num_labels: int) -> Measured:
    if metric == "accuracy":
        right, right_before = ((found == expected).astype(float).tolist() for found in (predicted, baseline))
        drop = paired_difference(right_before, right)
        gain = None if drop.ci95 is None else (-drop.ci95[1], -drop.ci95[0])
        return Measured(drop.after, drop.before, mean_interval(right), mean_interval(right_before), gain)

    def f1(rows: Ids, found: Ids) -> float:
        return score("f1", expected[rows], found[rows], num_labels)

    every = np.arange(len(expected))
    return Measured(
        f1(every, predicted),
        f1(every, baseline),
        _bootstrap(lambda rows: f1(rows, predicted), len(expected)),
        _bootstrap(lambda rows: f1(rows, baseline), len(expected)),
        _bootstrap(lambda rows: f1(rows, predicted) - f1(rows, baseline), len(expected)),
    )


def _bootstrap(value: Callable[[Ids], float], count: int) -> Interval | None:
    """The percentile interval (Efron 1979) of a value of rows drawn with replacement; None where it never varies."""
    generator = np.random.default_rng(0)
    values = [value(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, [0.025, 0.975])
    return None if low == high else (float(low), float(high))
