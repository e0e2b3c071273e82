"""The optimizers: which one a recipe means on a device, and its groups of parameters."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.recipe import TrainingSection

BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


def resolve_optimizer(requested: str, device: torch.device) -> str:
    """The optimizer that `auto` means here; raises UserError for a paged one on a CPU.

    Paged memory is CUDA's; bitsandbytes would fall back to ordinary memory there with no more than a warning.
    """
    if requested == "auto":
        return "paged_adamw_32bit" if device.type == "cuda" else "adamw"
    if requested.startswith("paged") and device.type != "cuda":
        plain = requested.removeprefix("paged_").removesuffix("_32bit")
        hint = f"use {plain}, which computes the same"
        raise UserError(f"{requested} needs a GPU: there is no paged memory here", "training.optimizer", hint)
    return requested


def is_decayed(parameter: nn.Parameter) -> bool:
    """Only matrices have weight decay: not biases, norms or scales."""
    return parameter.ndim >= 2


def decay_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """The trainable parameters that training.weight_decay is for, and the others, by name."""
    groups: dict[str, list[str]] = {"decayed": [], "not_decayed": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["decayed" if is_decayed(parameter) else "not_decayed"].append(name)
    return groups


def make_optimizer(model: PreTrainedModel, training: TrainingSection) -> torch.optim.Optimizer:
    """The optimizer over every trainable parameter; weight decay only on matrices.

    A parameter's `learning_rate_scale` multiplies its learning rate (LoRA+).
    """
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            scale = getattr(parameter, "learning_rate_scale", 1.0)
            decay = training.weight_decay if is_decayed(parameter) else 0.0
            grouped.setdefault((decay, scale), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "scale": scale} for (decay, scale), parameters in grouped.items()
    ]
    assert training.learning_rate is not None
    name = resolve_optimizer(training.optimizer, model.get_input_embeddings().weight.device)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)
    import bitsandbytes

    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, BITSANDBYTES[name])(groups, lr=training.learning_rate)
    return made
