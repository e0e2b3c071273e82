"""The evidence about the task: what the base could do with and without examples, and what the tuned model can."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ftune import evaluate
from ftune.data import Example
from ftune.evaluate import TOKEN_METRICS, Previous, Scored
from ftune.recipe import Recipe
from ftune.run.inputs import Inputs
from ftune.run.scorer import metric_name
from ftune.statistics import mean_interval, paired_difference
from ftune.train import TrainingPlan

NO_PROMPTS = "few-shot prompting is not measured for the {metric}, which asks for no answer"


def loss_task(
    metric: str, base: PreTrainedModel, tuned: PreTrainedModel, examples: Sequence[Example], plan: TrainingPlan
) -> dict[str, Any]:
    """Loss per supervised token, in nats, or perplexity, which is its exponential; the gain is what it fell by."""
    transform = TOKEN_METRICS[metric]
    before = evaluate.token_losses(base, examples, plan, f"test, base {metric}")
    after = evaluate.token_losses(tuned, examples, plan, f"test, tuned {metric}")
    with np.errstate(over="ignore", invalid="ignore"):  # see `finite`
        zero_shot, found = (evaluate.token_score(metric, losses.mean) for losses in (before, after))
        fall = evaluate.fall_interval(before, after, transform)
        intervals = [evaluate.mean_loss_interval(losses, transform) for losses in (before, after)]
    reason = NO_PROMPTS.format(metric=metric)
    gain = zero_shot - found
    if not math.isfinite(gain):
        reason += f"; the {metric} is not finite: {zero_shot} before, {found} after"
    return {
        "metric": metric,
        "n": len(examples),
        "zero_shot": finite(zero_shot),
        "few_shot": None,
        "tuned": finite(found),
        "baseline": "zero_shot",
        "gain": finite(gain),
        "ci95": as_list(fall),
        "intervals": {"zero_shot": as_list(intervals[0]), "few_shot": None, "tuned": as_list(intervals[1])},
        "reason": reason,
    }


def few_shot_obstacle(recipe: Recipe, inputs: Inputs, shots: Sequence[Example], model: PreTrainedModel) -> str:
    """Why the few-shot baseline cannot be measured; empty when it can."""
    if not recipe.evaluation.few_shot:
        return "evaluation.few_shot is 0"
    if not shots:
        return "no training row has an answer to show"
    assert inputs.test is not None
    longest = max(len(evaluate.prompt_ids(inputs.tokenizer, e, shots)) for e in inputs.test.examples)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and longest + recipe.evaluation.max_new_tokens > room:
        return f"{longest} prompt tokens and the answer do not fit the model's context of {room}"
    return ""


def answer_task(
    recipe: Recipe, inputs: Inputs, base: PreTrainedModel, tuned: PreTrainedModel, examples: Sequence[Example]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The `task` part of report.json and the lines of samples.jsonl; all models answer the same items."""
    settings = recipe.evaluation
    metric = inputs.function or settings.metric

    def measure(model: PreTrainedModel, who: str, shots: Sequence[Example] = ()) -> Scored:
        tokens = settings.max_new_tokens
        return evaluate.score(model, inputs.tokenizer, examples, metric, tokens, f"test, {who}", shots)

    shots = evaluate.choose_shots(inputs.train.examples, settings.few_shot, recipe.training.seed)
    reason = few_shot_obstacle(recipe, inputs, shots, base)
    zero_shot = measure(base, "base zero-shot")
    few_shot = None if reason else measure(base, "base few-shot", shots)
    after = measure(tuned, "tuned")
    name, baseline = better(zero_shot, few_shot)
    bounded = are_bounded(*(scored.scores for scored in (zero_shot, few_shot, after) if scored))
    task = {
        "metric": metric_name(settings.metric),
        "n": len(examples),
        "zero_shot": zero_shot.mean,
        "few_shot": few_shot.mean if few_shot else None,
        "tuned": after.mean,
        "baseline": name,
        "gain": after.mean - baseline.mean,
        "ci95": gain_interval(baseline.scores, after.scores, bounded),
        "intervals": {
            "zero_shot": interval(zero_shot.scores, bounded),
            "few_shot": interval(few_shot.scores, bounded) if few_shot else None,
            "tuned": interval(after.scores, bounded),
        },
        "reason": reason,
        **evaluate.details(settings.metric, examples, zero_shot, few_shot, after),
    }
    if inputs.previous is not None:
        task["previous"] = against(inputs.previous, after)
    return task, evaluate.sample_rows(examples, zero_shot, few_shot, after)


def better(zero_shot: Scored, few_shot: Scored | None) -> tuple[str, Scored]:
    """The baseline that the gain is over, with its name in report.json."""
    if few_shot is not None and few_shot.mean > zero_shot.mean:
        return "few_shot", few_shot
    return "zero_shot", zero_shot


def against(previous: Previous, after: Scored) -> dict[str, Any]:
    """`task.previous`: what the previous run scored on the same items, and the gain over it."""
    bounded = are_bounded(previous.scores, after.scores)
    tuned = sum(previous.scores) / len(previous.scores)
    return {
        "run": str(previous.run),
        "tuned": tuned,
        "interval": interval(previous.scores, bounded),
        "gain": after.mean - tuned,
        "ci95": gain_interval(previous.scores, after.scores, bounded),
    }


def are_bounded(*scores: Sequence[float]) -> bool:
    """Whether all scores lie within [0, 1]; those of a function of the user's need not."""
    return all(0 <= score <= 1 for some in scores for score in some)


def interval(scores: Sequence[float], bounded: bool = True) -> list[float] | None:
    """The 95 % interval of a mean score, as JSON has it. Of equal scores without bounds nothing can be said."""
    return None if is_constant(scores) and not bounded else as_list(mean_interval(scores))


def gain_interval(baseline: Sequence[float], after: Sequence[float], bounded: bool = True) -> list[float] | None:
    """The paired 95 % interval of what `after` has more than the baseline."""
    gains = [now - before for before, now in zip(baseline, after, strict=True)]
    return None if is_constant(gains) and not bounded else as_list(paired_difference(after, baseline).ci95)


def is_constant(values: Sequence[float]) -> bool:
    return min(values) == max(values)


def as_list(found: Sequence[float] | None) -> list[float] | None:
    return None if found is None else list(found)


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
