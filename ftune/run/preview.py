"""`ftune check`, `inspect` and `plan`: the dry runs."""

from typing import Any

from ftune import plan
from ftune.batches import MicroBatch, collate
from ftune.classifier import Classes
from ftune.console.streams import note
from ftune.data import findings
from ftune.errors import UserError
from ftune.model import facts, load_tokenizer
from ftune.recipe import Recipe
from ftune.run.datasets import Collector, is_classification, read_classes, read_sets
from ftune.run.inputs import read, training_plan
from ftune.run.pieces import pieces
from ftune.settings import METHOD_NAMES, available
from ftune.train import TrainingPlan

MOST_TWINS = 100
"""How many removed rows a check lists; a run's twins.jsonl has them all."""


def check(recipe: Recipe) -> dict[str, Any]:
    """Everything but training; `problems` is empty when the recipe is ready."""
    collector = Collector()
    inputs = read(recipe, collector)
    return {
        "problems": [problem.as_dict() for problem in collector.problems],
        "data": inputs.account() if inputs else None,
        "twins": [twin.as_dict() for twin in inputs.twins[:MOST_TWINS]] if inputs else None,
        "plan": inputs.prediction.as_dict() if inputs else None,
    }


def inspect(recipe: Recipe, num_rows: int | None) -> dict[str, Any]:
    """The exact tokens, labels and segments that training will see, row by row, out of the training collator."""
    tokenizer, collector = load_tokenizer(recipe.model), Collector()
    sets = read_sets(recipe, tokenizer, facts(recipe.model), collector)
    if sets.train is None or collector.problems:
        raise UserError.collect(collector.problems)
    shown = sets.train.examples[:num_rows]
    batch = collate(shown)
    rows = [
        {**_row(batch, k, tokenizer), "text": example.text, "tokens_truncated": example.tokens_truncated}
        for k, example in enumerate(shown)
    ]
    return {"rows": rows, "data": findings.document(sets.train.audit, sets.classes is None)}


def _row(batch: MicroBatch, k: int, tokenizer: Any) -> dict[str, Any]:
    start, end = batch.bounds[k], batch.bounds[k + 1]
    ids = batch.input_ids[0, start:end].tolist()
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return {
        "row_id": batch.row_ids[k],
        "input_ids": ids,
        "labels": batch.labels[0, start:end].tolist(),
        "position_ids": batch.position_ids[0, start:end].tolist(),
        "segment_ids": batch.segment_ids[start:end],
        "special_tokens_mask": [int(token in special) for token in ids],
        "tokens": pieces(tokenizer, ids),
    }


def plan_methods(recipe: Recipe, methods: str | None) -> list[dict[str, Any]]:
    """The plan of the recipe's method, or of several by their defaults, from config.json alone."""
    run_plan, classes = training_plan(recipe, None), classes_to_plan(recipe)
    if methods is None:
        chosen: list[Any] = [recipe.method]
    else:
        table = available(METHOD_NAMES)
        names = list(table) if methods == "all" else [name.strip() for name in methods.split(",")]
        if unknown := [name for name in names if name not in table]:
            raise UserError(f"unknown method {unknown[0]!r}", "--methods", f"available: {', '.join(table)}")
        chosen = [
            recipe.method if name == recipe.method.name else table[name].model_validate({"name": name})
            for name in names
        ]
    if methods != "all":
        return [plan.make_plan(recipe, settings, run_plan, None, classes).as_dict() for settings in chosen]
    return [_plan_or_reason(recipe, settings, run_plan, classes) for settings in chosen]


def classes_to_plan(recipe: Recipe) -> Classes | None:
    """The labels of a classifier's training rows; a plan goes without them where they cannot be read, and says so."""
    if not is_classification(recipe):
        return None
    try:
        return read_classes(recipe, load_tokenizer(recipe.model), facts(recipe.model))
    except UserError as error:
        count = len(plan.UNREAD_CLASSES.labels)
        note(f"the classifier is planned with {count} labels, as its rows were not read: {error.problems[0].what}")
        return None


def _plan_or_reason(recipe: Recipe, settings: Any, run_plan: TrainingPlan, classes: Classes | None) -> dict[str, Any]:
    """A method's plan, or why this model cannot have it (BitFit needs biases)."""
    try:
        return plan.make_plan(recipe, settings, run_plan, None, classes).as_dict()
    except UserError as error:
        return {"method": settings.name, "problem": error.problems[0].what}
