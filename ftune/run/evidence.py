"""The evidence: what the base could do, what the tuned model can, what was forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import evaluate, probe
from ftune.data import Example
from ftune.evaluate import Scored
from ftune.objectives import sft
from ftune.probe import Probe
from ftune.recipe import Recipe
from ftune.run.inputs import Inputs
from ftune.run.labels import label_task, no_forgetting
from ftune.statistics import mean_interval, paired_difference
from ftune.train import TrainingPlan, mean_loss


@dataclass(frozen=True)
class Evidence:
    """The `task` and `forgetting` parts of report.json, and the lines of samples.jsonl."""

    task: dict[str, Any] | None
    forgetting: dict[str, Any] | None
    samples: list[dict[str, Any]]


def gather(recipe: Recipe, inputs: Inputs, base: PreTrainedModel, tuned: PreTrainedModel) -> Evidence:
    """Measure both models on the same items with the same prompts, decoding and scorer."""
    tokenizer, settings = inputs.tokenizer, recipe.evaluation
    task: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = []
    if inputs.classes is not None:
        if inputs.test is not None:
            task, samples = label_task(recipe, inputs, tuned)
        return Evidence(task, no_forgetting(), samples)
    if inputs.test is not None:
        if settings.metric == "loss":
            task = _loss_task(base, tuned, inputs.test.examples, inputs.plan)
        else:
            task, samples = _answer_task(recipe, inputs, base, tuned, inputs.test.examples)
    forgetting = None
    if inputs.probe is not None:
        forgetting = _forgetting(tokenizer, inputs.probe, base, tuned, inputs.plan)
    return Evidence(task, forgetting, samples)


def _forgetting(
    tokenizer: PreTrainedTokenizerBase, items: Probe, base: PreTrainedModel, tuned: PreTrainedModel, plan: TrainingPlan
) -> dict[str, Any]:
    before = probe.ask(base, tokenizer, items, plan, "base")
    after = probe.ask(tuned, tokenizer, items, plan, "tuned")
    return probe.compare(before, after, probe.kl_to_base(base, tuned, items.everything, plan))


def _loss_task(
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


def _answer_task(
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


def gates(recipe: Recipe, evidence: Evidence) -> list[dict[str, Any]]:
    """The recipe's gates against what was measured; what could not be measured does not pass."""
    task, forgetting = evidence.task or {}, evidence.forgetting or {}
    score_gate = at_most if task.get("metric") == "loss" else at_least
    asked = [
        ("min_score", recipe.gates.min_score, task.get("tuned"), score_gate),
        ("min_gain", recipe.gates.min_gain, task.get("gain"), at_least),
        ("max_forgetting", recipe.gates.max_forgetting, forgetting.get("worst_drop"), at_most),
    ]
    return [
        {"name": name, "limit": limit, "value": value, "passed": value is not None and holds(value, limit)}
        for name, limit, value, holds in asked
        if limit is not None
    ]


def at_least(value: float, limit: float) -> bool:
    return value >= limit


def at_most(value: float, limit: float) -> bool:
    return value <= limit
