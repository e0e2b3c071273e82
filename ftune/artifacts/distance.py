"""How far a merge lies from what was trained over a quantized base, for both bases that it could go into.

The adapter was trained on dequant(W4). Merged into the full-precision W it meets other weights; merged into dequant(W4)
and written in the stored dtype it meets the same, rounded once more. Both distances are measured, neither is assumed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune import classifier, comparing, quantized
from ftune import model as models
from ftune.artifacts import files
from ftune.methods.head import method_of
from ftune.recipe import ModelSection

Logits = list[torch.Tensor]


@dataclass(frozen=True)
class Distance:
    """Over the proof rows: the largest logit difference, and the mean KL(trained || merged) a token in nats."""

    max_difference: float
    kl: float


@dataclass(frozen=True)
class Distances:
    """Of both choices from what was trained."""

    full_precision: Distance
    dequantized: Distance

    def as_dict(self) -> dict[str, Any]:
        pairs = {"full_precision": self.full_precision, "dequantized": self.dequantized}
        return {
            "distance_to_trained": {name: one.max_difference for name, one in pairs.items()},
            "kl_to_trained": {name: one.kl for name, one in pairs.items()},
        }


def between(merged: Logits, trained: Logits) -> Distance:
    ours, theirs = (torch.cat(rows).double().log_softmax(-1) for rows in (merged, trained))
    kl = (theirs.exp() * (theirs - ours)).sum(dim=-1).mean()
    return Distance(comparing.max_difference(merged, trained), float(kl))


def reference(model: PreTrainedModel) -> Logits:
    """The logits that other forms of this model are compared with."""
    return comparing.logits_of(model, comparing.proof_rows_for(model))


def full_precision(settings: ModelSection) -> ModelSection:
    """The same base with its plain weights."""
    return settings.model_copy(update={"quantization": "none"})


def is_measurable(settings: ModelSection) -> bool:
    """Whether the base was quantized here, so that both its forms are there."""
    return settings.quantization != "none" and not quantized.is_stored_quantized(models.load_config(settings))


def dequantized_merge(settings: ModelSection, merged: PreTrainedModel, trained: Logits) -> Distance:
    """Of a model whose adapter is folded in already; it is left plain, in the dtype it would be written in."""
    dtype = models.stored_dtype(models.load_config(settings))
    quantized.dequantize(merged)
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    return between(reference(merged), trained)


def full_precision_merge(settings: ModelSection, adapter: Path, trained: Logits, device: torch.device) -> Distance:
    """Of the adapter folded into the plain base, in the dtype its files have."""
    plain = full_precision(settings)
    dtype = models.stored_dtype(models.load_config(plain))
    model = classifier.load(plain, dtype, device, files.read_classes(adapter))
    method_of(files.load_adapter(model, adapter).method, model).merge(model)
    return between(reference(model), trained)
