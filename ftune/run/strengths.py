"""`ftune eval --strengths`: what was trained at several strengths, without training again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ftune import evaluate, probe
from ftune.evaluate import TOKEN_METRICS
from ftune.recipe import Recipe
from ftune.run.inputs import Inputs
from ftune.run.labels import label_task
from ftune.run.task import are_bounded, as_list, finite, interval

Load = Callable[[float], PreTrainedModel]
"""The tuned model at a strength."""


def measure(
    recipe: Recipe, inputs: Inputs, base: PreTrainedModel, load: Load, strengths: Sequence[float]
) -> list[dict[str, Any]]:
    """The `strengths` part of report.json: score and forgetting at each, weakest first; null where not measured."""
    items, plan = inputs.probe, inputs.plan
    before = probe.ask(base, inputs.tokenizer, items, plan, "base") if items else None
    found = []
    for strength in sorted(set(strengths)):
        tuned = load(strength)
        who = f"strength {strength:g}"
        score, ci95 = _score(recipe, inputs, tuned, who)
        worst_drop = general_loss = kl = None
        if items and before:
            after = probe.ask(tuned, inputs.tokenizer, items, plan, who)
            worst_drop, general_loss = probe.worst_drop(before, after), after.general_loss
            kl = probe.kl_to_base(base, tuned, items.everything, plan)
        found.append(
            {
                "strength": strength,
                "score": score,
                "ci95": ci95,
                "worst_drop": worst_drop,
                "general_loss": general_loss,
                "kl_to_base": kl,
            }
        )
    return found


def _score(recipe: Recipe, inputs: Inputs, tuned: PreTrainedModel, who: str) -> tuple[float | None, Any]:
    """The task's score on the test rows, and its 95 % interval."""
    settings = recipe.evaluation
    if inputs.test is None:
        return None, None
    if inputs.classes is not None:
        task, _ = label_task(recipe, replace(inputs, previous=None), tuned)
        return task["tuned"], task["intervals"]["tuned"]
    examples = inputs.test.examples
    if settings.metric in TOKEN_METRICS:
        transform = TOKEN_METRICS[settings.metric]
        losses = evaluate.token_losses(tuned, examples, inputs.plan, f"test, {who}")
        value = evaluate.token_score(settings.metric, losses.mean)
        with np.errstate(over="ignore"):
            return finite(value), as_list(evaluate.mean_loss_interval(losses, transform))
    scorer = inputs.function or settings.metric
    scored = evaluate.score(tuned, inputs.tokenizer, examples, scorer, settings.max_new_tokens, f"test, {who}")
    return scored.mean, interval(scored.scores, are_bounded(scored.scores))


@torch.no_grad()
def interpolate(tuned: PreTrainedModel, base: PreTrainedModel, strength: float) -> None:
    """W_0 + strength (W - W_0), in place: a whole model has no adapter to scale, but its weights can be drawn back
    towards the base's (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903)."""
    origin = dict(base.named_parameters())
    for name, parameter in tuned.named_parameters():
        if strength != 1.0:
            parameter.copy_(origin[name] + strength * (parameter - origin[name]))
