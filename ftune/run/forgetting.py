"""The evidence about forgetting: the same probe asked of base and tuned model."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import probe
from ftune.probe import Probe
from ftune.train import TrainingPlan


def forgetting(
    tokenizer: PreTrainedTokenizerBase, items: Probe, base: PreTrainedModel, tuned: PreTrainedModel, plan: TrainingPlan
) -> dict[str, Any]:
    """The `forgetting` part of report.json."""
    before = probe.ask(base, tokenizer, items, plan, "base")
    after = probe.ask(tuned, tokenizer, items, plan, "tuned")
    return probe.compare(before, after, probe.kl_to_base(base, tuned, items.everything, plan))
