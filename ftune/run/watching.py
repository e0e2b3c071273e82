"""Learning against forgetting on the way: what an evaluation during training measures, and which step is best."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ftune import comparing, evaluate, predict, probe, train
from ftune.batches import Features
from ftune.console.streams import note
from ftune.data import Example, Source, SourceRow, label_of
from ftune.data.sources import suffixes
from ftune.evaluate import TOKEN_METRICS, Scorer
from ftune.objectives import OBJECTIVES
from ftune.quantities import format_count
from ftune.recipe import Recipe
from ftune.run.inputs import Inputs

MOST_ANSWERED = 200
"""Validation rows that are answered at each evaluation; their loss is that of all."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Watch:
    """What is measured at each evaluation, and what the base made of the probe."""

    recipe: Recipe
    inputs: Inputs
    answered: Sequence[Example]
    """The validation rows whose answers are scored."""
    scorer: str | Scorer
    before: probe.Answers | None
    base: Line = field(default_factory=dict)
    """What the base scores: the line of step 0."""

    def look(self, model: PreTrainedModel, step: int, features: Features | None = None) -> Line:
        """A line of metrics.jsonl. features: those of the validation rows, where a frozen body's are kept."""
        after = None
        if self.inputs.probe is not None:
            after = probe.ask(model, self.inputs.tokenizer, self.inputs.probe, self.inputs.plan, f"step {step}")
        return self.line(model, step, after, features)

    def line(
        self, model: PreTrainedModel, step: int, after: probe.Answers | None, features: Features | None = None
    ) -> Line:
        validation, plan = self.inputs.validation, self.inputs.plan
        assert validation is not None
        losses = OBJECTIVES[self.recipe.objective.name].token_losses
        loss = train.mean_loss(model, validation.examples, plan, losses, features)
        values = {
            "validation_loss": loss,
            "validation_score": self._score(model, step, features, loss),
            "worst_drop": probe.worst_drop(self.before, after) if self.before and after else None,
            "general_loss": after.general_loss if after else None,
        }
        # JSON has no numbers that are none.
        return {"step": step} | {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}

    def _score(self, model: PreTrainedModel, step: int, features: Features | None, loss: float) -> float | None:
        metric, inputs = self.recipe.evaluation.metric, self.inputs
        if inputs.classes is not None:
            assert inputs.validation is not None
            examples = inputs.validation.examples
            predicted, _ = predict.predict(model, examples, inputs.plan, features)
            labels = inputs.classes.labels
            expected = np.array([labels.index(label_of(example)) for example in examples])
            return predict.score(metric, expected, predicted, len(labels))
        if metric in TOKEN_METRICS:
            return evaluate.token_score(metric, loss)
        if not self.answered:
            return None
        tokens = self.recipe.evaluation.max_new_tokens
        who = f"validation, step {step}"
        return evaluate.score(model, inputs.tokenizer, self.answered, self.scorer, tokens, who).mean


def begin(recipe: Recipe, inputs: Inputs, base: PreTrainedModel) -> Watch | None:
    """Measure the base, before a method is on it; None where there are no validation rows, and so no evaluations."""
    if inputs.validation is None:
        return None
    is_answered = inputs.classes is None and recipe.evaluation.metric not in TOKEN_METRICS
    answered = chosen_rows(inputs.validation.examples) if is_answered else []
    if inputs.plan.packing:
        comparing.prove_packing(base, recipe.model.attention)
    before = None
    if inputs.probe is not None:
        before = probe.ask(base, inputs.tokenizer, inputs.probe, inputs.plan, "base")
    watch = Watch(recipe, inputs, answered, scorer_of(recipe, inputs, answered), before)
    return replace(watch, base=watch.line(base, 0, before))


def chosen_rows(examples: Sequence[Example]) -> list[Example]:
    """The rows with an answer, or MOST_ANSWERED of them, evenly spread."""
    answered = [example for example in examples if evaluate.has_answer(example)]
    if len(answered) <= MOST_ANSWERED:
        return answered
    told = f"{MOST_ANSWERED} of {format_count(len(answered))} validation rows are answered at each evaluation"
    note(f"{told}; the loss is that of all")
    return [answered[i * len(answered) // MOST_ANSWERED] for i in range(MOST_ANSWERED)]


def scorer_of(recipe: Recipe, inputs: Inputs, answered: Sequence[Example]) -> str | Scorer:
    """The recipe's metric; a function of the user's gets the very rows, wherever they come from."""
    own, validation = inputs.function, recipe.data.validation
    if own is None or not own.takes_row:
        return own or recipe.evaluation.metric
    sources = [Source(validation)] if isinstance(validation, Path) else inputs.train.sources
    wanted = {example.row_id for example in answered}
    rows = {
        row.row_id + suffix: row.fields
        for source, suffix in zip(sources, suffixes(sources), strict=True)
        for row in source.rows()
        if isinstance(row, SourceRow) and row.row_id + suffix in wanted
    }
    return replace(own, rows=rows)


@dataclass(frozen=True)
class Selection:
    """Which step of a run is kept, and why."""

    select: str
    step: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(lines: Iterable[Line], metric: str, limit: float | None) -> Selection | None:
    """The evaluated step with the best score among those that forget no more than `limit`; of equals the one with the
    least validation loss, then the earliest.

    Where the score was not measured, the validation loss counts. Where every step forgets more, the one that forgets
    least is kept: the gate then fails, and says so. A value that is no number is never best; None without any other.
    """
    found = [(line, value) for line in evaluations(lines) if math.isfinite(value := _merit(line, metric))]
    if not found:
        return None
    inside = [(line, value) for line, value in found if limit is None or (line["worst_drop"] or 0.0) <= limit]
    if not inside:
        line, _ = min(found, key=lambda pair: pair[0]["worst_drop"])
        told = f"every evaluated step forgot more than {limit:g}; this one least, {line['worst_drop']:.3g}"
        return Selection("best", line["step"], told)
    line, _ = max(inside, key=lambda pair: (pair[1], -_or_worst(pair[0]["validation_loss"])))
    bound = "" if limit is None else f" among {len(inside)} of {len(found)} that forgot no more than {limit:g}"
    name, value = _measure(line, metric)
    return Selection("best", line["step"], f"best {name}, {value:.4g}{bound}")


def _or_worst(loss: float | None) -> float:
    """null in metrics.jsonl is a loss that was no number."""
    return math.inf if loss is None or not math.isfinite(loss) else loss


def evaluations(lines: Iterable[Line]) -> list[Line]:
    """The lines of metrics.jsonl that are evaluations of training; step 0 is the base."""
    return [line for line in lines if "validation_loss" in line and line["step"] > 0]


def _measure(line: Line, metric: str) -> tuple[str, float]:
    """What a step is judged by: its name, and the value."""
    is_loss = metric in TOKEN_METRICS or line.get("validation_score") is None
    value = line["validation_loss"] if is_loss else line["validation_score"]
    return "validation loss" if is_loss else f"validation {metric}", math.nan if value is None else float(value)


def _merit(line: Line, metric: str) -> float:
    """Higher is better."""
    name, value = _measure(line, metric)
    return -value if name == "validation loss" else value


def path(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """The `path` part of report.json: learning against forgetting, evaluation by evaluation from the base on."""
    return [
        {
            "step": line["step"],
            "validation_loss": line["validation_loss"],
            "score": line.get("validation_score"),
            "worst_drop": line.get("worst_drop"),
            "general_loss": line.get("general_loss"),
        }
        for line in lines
        if "validation_loss" in line
    ]
