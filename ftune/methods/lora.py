"""LoRA, Hu et al. 2021 (arXiv 2106.09685); rank-stabilized scale, Kalajdzievski 2023 (arXiv 2312.03732).

    h = W x + s B A dropout(x)      A: (r, in)   B: (out, r), starts at 0   s = alpha / r, or alpha / sqrt(r)

Only A and B are trained. Parameters are named as PEFT's files name them: `<path>.lora_A.weight` and `.lora_B.weight`.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base
from ftune.settings import LoraSettings

trains_base = False


class LoraLinear(nn.Module):
    """A frozen linear layer (torch's or GPT-2's transposed one) with a low-rank update beside it."""

    lora_A: nn.Linear
    lora_B: nn.Linear

    def __init__(self, base_layer: Any, rank: int, alpha: float, dropout: float, rank_stabilized: bool) -> None:
        super().__init__()
        self.is_transposed = not isinstance(base_layer, nn.Linear)
        num_in, num_out = base_layer.weight.shape if self.is_transposed else base_layer.weight.shape[::-1]
        self.base_layer: nn.Module = base_layer
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(num_in, rank, bias=False, **base.like(base_layer.weight))
        self.lora_B = nn.Linear(rank, num_out, bias=False, **base.like(base_layer.weight))
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base_layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out), in the base's dtype; the update is computed in the adapter's."""
        h: torch.Tensor = self.base_layer(x)
        update: torch.Tensor = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return h + (self.scale * update).to(h.dtype)

    def delta(self) -> torch.Tensor:
        """The weight update s B A, float64, laid out as the base's weight."""
        delta: torch.Tensor = self.scale * (self.lora_B.weight.double() @ self.lora_A.weight.double())
        return delta.T if self.is_transposed else delta

    def merged(self) -> nn.Module:
        """The base layer with the update added: computed in float64, rounded once to the base's dtype."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        weight.data = (weight.data.double() + self.delta()).to(weight.dtype)
        return self.base_layer


def attach(model: PreTrainedModel, settings: LoraSettings, seed: int = 0) -> None:
    base.freeze(model)
    torch.manual_seed(seed)
    for path, module in base.find_targets(model, settings.target_modules, settings.layers).items():
        rank = base.pattern_value(settings.rank_pattern, path, settings.rank)
        alpha = base.pattern_value(settings.alpha_pattern, path, settings.alpha)
        model.set_submodule(path, LoraLinear(module, rank, alpha, settings.dropout, settings.rank_stabilized))


def set_strength(model: PreTrainedModel, strength: float) -> None:
    for _, layer in base.modules_of(model, LoraLinear):
        layer.scale *= strength


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    for path, layer in base.modules_of(model, LoraLinear):
        model.set_submodule(path, layer.merged())


def adapter_config(model: PreTrainedModel, settings: LoraSettings, base_name: str) -> dict[str, Any]:
    layers = dict(base.modules_of(model, LoraLinear))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilized,
        "target_modules": _target_names(model, set(layers)),
        "rank_pattern": {path: layer.rank for path, layer in layers.items() if layer.rank != settings.rank},
        "alpha_pattern": {path: layer.alpha for path, layer in layers.items() if layer.alpha != settings.alpha},
        "bias": "none",
        "fan_in_fan_out": any(layer.is_transposed for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _target_names(model: nn.Module, adapted: set[str]) -> list[str]:
    """The shortest names that mean exactly the adapted modules: `q_proj` where all of them are, else full paths."""
    names = {path.rsplit(".", 1)[-1] for path in adapted}
    meant = {path for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in names}
    return sorted(names if meant == adapted else adapted)


UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "lora_bias": "LoRA biases",
    "exclude_modules": "exclude_modules",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "layers_to_transform": "layers_to_transform",
}
"""Keys of PEFT's LoraConfig that change the result and that this version cannot honour."""


def settings_of(config: dict[str, Any]) -> LoraSettings:
    refused = [name for key, name in UNSUPPORTED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append(f"bias: {config['bias']}")
    if refused:
        raise UserError(
            f"this adapter uses {', '.join(refused)}, which this version cannot load", "adapter_config.json"
        )
    targets = config.get("target_modules")
    if not targets:
        raise UserError("adapter_config.json names no target_modules", "target_modules", "was it written by PEFT?")
    return LoraSettings(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=config.get("lora_dropout", 0.0),
        target_modules="all-linear"
        if targets == "all-linear"
        else (targets,)
        if isinstance(targets, str)
        else tuple(targets),
        rank_stabilized=config.get("use_rslora", False),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )
