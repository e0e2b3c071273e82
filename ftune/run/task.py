"""The evidence about the task: what the base could do with and without examples, and what the tuned model can."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ftune import evaluate
from ftune.data import Example
from ftune.evaluate import Scored
from ftune.objectives import sft
from ftune.recipe import Recipe
from ftune.run.inputs import Inputs
from ftune.statistics import mean_interval, paired_difference
from ftune.train import TrainingPlan, mean_loss


def loss_task(
    base: PreTrainedModel, tuned: PreTrainedModel, examples: Sequence[Example], plan: TrainingPlan
) -> dict[str, Any]:
    """Loss per supervised token, in nats; lower is better, so the gain is what it fell by."""
    before = mean_loss(base, examples, plan, sft.token_losses)
    after = mean_loss(tuned, examples, plan, sft.token_losses)
    return {
        "metric": "loss",
        "n": len(examples),
        "zero_shot": before,
        "few_shot": None,
        "tuned": after,
        "gain": before - after,
        "ci95": None,
        "intervals": {"zero_shot": None, "few_shot": None, "tuned": None},
        "reason": "few-shot prompting and intervals are not measured for the loss",
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
    settings = recipe.evaluation

    def measure(model: PreTrainedModel, who: str, shots: Sequence[Example] = ()) -> Scored:
        tokens = settings.max_new_tokens
        return evaluate.score(model, inputs.tokenizer, examples, settings.metric, tokens, f"test, {who}", shots)

    shots = evaluate.choose_shots(inputs.train.examples, settings.few_shot, recipe.training.seed)
    reason = few_shot_obstacle(recipe, inputs, shots, base)
    zero_shot = measure(base, "base zero-shot")
    few_shot = None if reason else measure(base, "base few-shot", shots)
    after = measure(tuned, "tuned")
    baseline = few_shot if few_shot is not None and few_shot.mean > zero_shot.mean else zero_shot
    gain = paired_difference(baseline.scores, after.scores)
    task = {
        "metric": settings.metric,
        "n": len(examples),
        "zero_shot": zero_shot.mean,
        "few_shot": few_shot.mean if few_shot else None,
        "tuned": after.mean,
        "gain": after.mean - baseline.mean,
        "ci95": None if gain.ci95 is None else [-gain.ci95[1], -gain.ci95[0]],
        "intervals": {
            "zero_shot": interval(zero_shot),
            "few_shot": interval(few_shot) if few_shot else None,
            "tuned": interval(after),
        },
        "reason": reason,
    }
    return task, evaluate.sample_rows(examples, zero_shot, few_shot, after)


def interval(scored: Scored) -> list[float] | None:
    """The 95 % interval of a mean score, as JSON has it."""
    found = mean_interval(scored.scores)
    return None if found is None else list(found)
