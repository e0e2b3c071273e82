"""The evidence about a classifier: its labels against the most frequent one."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ftune import predict
from ftune.data import label_of
from ftune.evaluate import Previous
from ftune.predict import Ids
from ftune.recipe import Recipe
from ftune.run.inputs import Inputs

NO_PROBE = "a classifier has no language head to be asked"


def no_forgetting() -> dict[str, Any]:
    """The `forgetting` part of report.json where nothing can be asked."""
    loss = {"before": None, "after": None}
    found: dict[str, Any] = {"suites": [], "overall": None, "worst_drop": None, "general_loss": loss}
    return {**found, "kl_to_base": None, "kl_to_base_on_task": None, "reason": NO_PROBE}


def label_task(recipe: Recipe, inputs: Inputs, tuned: PreTrainedModel) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The `task` part of report.json and the lines of samples.jsonl, of a classifier on the test rows."""
    assert inputs.classes is not None
    assert inputs.test is not None
    labels, examples = inputs.classes.labels, inputs.test.examples
    expected = np.array([labels.index(label_of(example)) for example in examples])
    predicted, probabilities = predict.predict(tuned, examples, inputs.plan)
    common = most_frequent(inputs)
    baseline = np.full_like(expected, labels.index(common))
    found = predict.measure(recipe.evaluation.metric, expected, predicted, baseline, len(labels))
    counts = predict.confusion(expected, predicted, len(labels))
    task = {
        "metric": recipe.evaluation.metric,
        "n": len(examples),
        "zero_shot": found.baseline,
        "few_shot": None,
        "tuned": found.tuned,
        "baseline": "zero_shot",
        "gain": found.tuned - found.baseline,
        "ci95": found.gain_interval and list(found.gain_interval),
        "intervals": {
            "zero_shot": found.baseline_interval and list(found.baseline_interval),
            "few_shot": None,
            "tuned": found.tuned_interval and list(found.tuned_interval),
        },
        "reason": f"zero-shot is the most frequent label of the training rows, {common!r}; "
        "a classifier has no prompt for few-shot examples",
        "accuracy": float((predicted == expected).mean()),
        "macro_f1": predict.macro_f1(counts),
        "confusion": {"labels": list(labels), "counts": counts.tolist()},
    }
    if inputs.previous is not None:
        task["previous"] = against(inputs.previous, recipe.evaluation.metric, labels, expected, predicted)
    samples = [
        {
            "row_id": example.row_id,
            "prompt": example.text,
            "expected": labels[expected[i]],
            "base": None,
            "few_shot": None,
            "tuned": labels[predicted[i]],
            "probability": probabilities[i],
            "scores": {
                "zero_shot": float(baseline[i] == expected[i]),
                "few_shot": None,
                "tuned": float(predicted[i] == expected[i]),
            },
        }
        for i, example in enumerate(examples)
    ]
    return task, samples


def against(previous: Previous, metric: str, labels: Sequence[str], expected: Ids, predicted: Ids) -> dict[str, Any]:
    """`task.previous`: what the previous run's labels are worth, and the gain over them."""
    known = [*labels, *sorted(set(previous.answers) - set(labels))]
    before = np.array([known.index(label) for label in previous.answers])
    found = predict.measure(metric, expected, predicted, before, len(known))
    return {
        "run": str(previous.run),
        "tuned": found.baseline,
        "interval": found.baseline_interval and list(found.baseline_interval),
        "gain": found.tuned - found.baseline,
        "ci95": found.gain_interval and list(found.gain_interval),
    }


def most_frequent(inputs: Inputs) -> str:
    """The training rows' most frequent label; of equally frequent ones the first by class id."""
    assert inputs.classes is not None
    counts = Counter(map(label_of, inputs.train.examples))
    return max(inputs.classes.labels, key=lambda label: counts[label])
