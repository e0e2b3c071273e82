"""The evidence: what the base could do, what the tuned model can, what was forgotten, and the gates on it."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ftune import folder
from ftune.evaluate import TOKEN_METRICS
from ftune.folder import RunFolder
from ftune.quantities import LOWER_IS_BETTER
from ftune.recipe import Recipe
from ftune.run.forgetting import forgetting
from ftune.run.inputs import Inputs
from ftune.run.labels import label_task, no_forgetting
from ftune.run.task import answer_task, loss_task


@dataclass(frozen=True)
class Evidence:
    """The `task` and `forgetting` parts of report.json, and the lines of samples.jsonl and probe.jsonl."""

    task: dict[str, Any] | None
    forgetting: dict[str, Any] | None
    samples: list[dict[str, Any]]
    probe: list[dict[str, Any]] = field(default_factory=list)

    def write_lines(self, run: RunFolder) -> None:
        """Write them; there is a probe.jsonl only where a probe was asked."""
        folder.write_json_lines(run.samples, self.samples)
        if self.probe:
            folder.write_json_lines(run.probe, self.probe)
        else:
            run.probe.unlink(missing_ok=True)


def gather(recipe: Recipe, inputs: Inputs, base: PreTrainedModel, tuned: PreTrainedModel) -> Evidence:
    """Measure both models on the same items with the same prompts, decoding and scorer."""
    task: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = []
    if inputs.classes is not None:
        if inputs.test is not None:
            task, samples = label_task(recipe, inputs, tuned)
        return Evidence(task, no_forgetting(), samples)
    if inputs.test is not None:
        if recipe.evaluation.metric in TOKEN_METRICS:
            task = loss_task(recipe.evaluation.metric, base, tuned, inputs.test.examples, inputs.plan)
        else:
            task, samples = answer_task(recipe, inputs, base, tuned, inputs.test.examples)
    forgotten, lines = (None, []) if inputs.probe is None else forgetting(recipe, inputs, inputs.probe, base, tuned)
    return Evidence(task, forgotten, samples, lines)


def gates(recipe: Recipe, evidence: Evidence) -> list[dict[str, Any]]:
    """The recipe's gates against what was measured; what could not be measured does not pass."""
    task, forgetting = evidence.task or {}, evidence.forgetting or {}
    score_gate = at_most if task.get("metric") in LOWER_IS_BETTER else at_least
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
