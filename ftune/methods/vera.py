"""VeRA, Kopiczko et al. 2023 (arXiv 2310.11454): two trained vectors a layer over random matrices all layers share.

    h = W x + b * (B (d * (A dropout(x))))  A: (r, in), B: (out, r) random, frozen   d: (r,) from 0.1   b: (out,) from 0

A and B are as large as the largest adapted layer; a smaller one uses their first columns and rows. They are saved with
the adapter (PEFT's `vera_A`, `vera_B`), so that no random generator need agree.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base, targets
from ftune.methods.adapted import AdaptedLinear
from ftune.settings import VeraSettings

SHARED = ("vera_A", "vera_B")
D_INITIAL = 0.1
UNSUPPORTED = ("modules_to_save", "layers_to_transform")


class VeraLinear(AdaptedLinear):
    vera_A: torch.Tensor
    vera_B: torch.Tensor

    def __init__(self, base_layer: Any, vera_A: torch.Tensor, vera_B: torch.Tensor, dropout: float) -> None:
        super().__init__(base_layer)
        self.scale = 1.0
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("vera_A", vera_A, persistent=False)
        self.register_buffer("vera_B", vera_B, persistent=False)
        self.vera_lambda_d = nn.Parameter(torch.full((len(vera_A),), D_INITIAL, **base.like(base_layer.weight)))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.num_out, **base.like(base_layer.weight)))
        self.train(base_layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.base_layer(x)
        inner = functional.linear(self.dropout(x.to(self.vera_A.dtype)), self.vera_A[:, : self.num_in])
        update = self.vera_lambda_b * functional.linear(self.vera_lambda_d * inner, self.vera_B[: self.num_out])
        return h + (self.scale * update).to(h.dtype)

    def merged(self) -> nn.Module:
        B = self.vera_lambda_b.double()[:, None] * self.vera_B[: self.num_out].double()
        A = self.vera_lambda_d.double()[:, None] * self.vera_A[:, : self.num_in].double()
        return self.with_matrix(self.matrix().double() + self.scale * B @ A)


def random_matrix(rows: int, columns: int, generator: torch.Generator, weight: torch.Tensor) -> torch.Tensor:
    """Kaiming-uniform over the columns, made on the CPU so that a seed means the same everywhere."""
    if not base.has_values(weight):
        return torch.empty(rows, columns, **base.like(weight))
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator).to(weight.device)


def attach(model: PreTrainedModel, settings: VeraSettings, seed: int = 0) -> None:
    base.freeze(model)
    modules = targets.find_targets(model, settings.target_modules, settings.layers)
    targets.refuse_embeddings(modules)
    shapes = [(layer.num_in, layer.num_out) for layer in map(AdaptedLinear, modules.values())]
    generator = torch.Generator().manual_seed(seed)
    weight: torch.Tensor = next(iter(modules.values())).weight  # type: ignore[assignment]
    A = random_matrix(settings.rank, max(num_in for num_in, _ in shapes), generator, weight)
    B = random_matrix(max(num_out for _, num_out in shapes), settings.rank, generator, weight)
    for path, module in modules.items():
        model.set_submodule(path, VeraLinear(module, A, B, settings.dropout))


def shared(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    _, layer = next(base.modules_of(model, VeraLinear))
    return {f"base_model.{name}": getattr(layer, name) for name in SHARED}


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**base.adapter_tensors(model), **shared(model)}


def load_tensors(model: PreTrainedModel, found: Mapping[str, torch.Tensor]) -> None:
    if "base_model.vera_A" not in found:
        hint = "save it with save_projection=True"
        raise UserError("this VeRA adapter was saved without its random matrices", "adapter_model.safetensors", hint)
    own = {base.PREFIX + name: parameter for name, parameter in base.trainable(model).items()}
    base.copy_strictly({**own, **shared(model)}, found)


def peft_config(model: PreTrainedModel, settings: VeraSettings, base_name: str) -> dict[str, Any]:
    layers = dict(base.modules_of(model, VeraLinear))
    return {
        "peft_type": "VERA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.rank,
        "vera_dropout": settings.dropout,
        "d_initial": D_INITIAL,
        "projection_prng_key": 0,
        "save_projection": True,
        "target_modules": targets.names_for_peft(model, set(layers)),
        "fan_in_fan_out": any(layer.is_transposed for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
    }


def settings_of(config: Mapping[str, Any]) -> VeraSettings:
    targets.refuse_keys(config, UNSUPPORTED)
    return VeraSettings(
        rank=config["r"],
        dropout=config.get("vera_dropout", 0.0),
        target_modules=targets.names_from_peft(config),
    )


METHOD = base.Method(
    attach=attach,
    set_strength=base.scaling(VeraLinear),
    merge=base.folding(VeraLinear),
    peft_config=peft_config,
    is_meant_by=lambda config: config["peft_type"] == "VERA",
    settings_of=settings_of,
    tensors=tensors,
    load_tensors=load_tensors,
)
