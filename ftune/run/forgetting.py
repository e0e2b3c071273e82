"""The evidence about forgetting: the same probe asked of base and tuned model."""

from typing import Any

from transformers import PreTrainedModel

from ftune import probe
from ftune.probe import Probe
from ftune.recipe import Recipe
from ftune.run.inputs import Inputs

Lines = list[dict[str, Any]]


def forgetting(
    recipe: Recipe, inputs: Inputs, items: Probe, base: PreTrainedModel, tuned: PreTrainedModel
) -> tuple[dict[str, Any], Lines]:
    """The `forgetting` part of report.json, and the lines of probe.jsonl."""
    tokenizer, plan = inputs.tokenizer, inputs.plan
    before = probe.ask(base, tokenizer, items, plan, "base")
    after = probe.ask(tuned, tokenizer, items, plan, "tuned")
    kl = probe.kl_to_base(base, tuned, items.everything, plan)
    rows = inputs.test.examples if inputs.test is not None else ()
    on_task = probe.kl_to_base(base, tuned, rows, plan, "divergence on the task")
    found = probe.compare(before, after, kl, on_task)
    found["notes"] = [*items.notes, *probe.undetectable(found["suites"], recipe.gates.max_forgetting)]
    return found | {"settings": probe.describe(tokenizer, items, after)}, list(probe.lines(before, after))
