"""DoRA, Liu et al. 2024 (arXiv 2402.09353): the magnitude of each output's weights is trained apart from direction.

    h = m * (W x + s B A dropout(x)) / ||W + s B A||     m: (out,), starts at ||W||; norms without gradient

The norm n needs no (out, in) matrix: n^2 = ||W||^2 + 2 s B.(W A^T) + s^2 B (A A^T) B^T, row by row, and W A^T is the
base layer applied to the rows of A. `<path>.lora_magnitude_vector` is m's name in PEFT's files.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.methods import base, lora, saved
from ftune.settings import DoraSettings

SMALLEST_NORM = 1e-12
"""A row of zeros has no direction; it stays zero."""


class DoraLinear(lora.LoraLinear):
    base_norm_squared: torch.Tensor

    def __init__(self, base_layer: Any, rank: int, alpha: float, settings: DoraSettings) -> None:
        super().__init__(base_layer, rank, alpha, settings)
        squared = self.matrix().float().square().sum(dim=1).detach()
        self.register_buffer("base_norm_squared", squared, persistent=False)
        self.lora_magnitude_vector = nn.Parameter(squared.clamp_min(SMALLEST_NORM**2).sqrt())

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """||W + s B A|| of each output: (out,) float32."""
        A, B = self.lora_A.weight, self.lora_B.weight
        W_A = self.base_layer(A.to(self.base_dtype)).float()  # (r, out)
        W_A = W_A if self.bias is None else W_A - self.bias.float()
        across = (B * W_A.T).sum(dim=1)
        within = ((B @ (A @ A.T)) * B).sum(dim=1)
        squared = self.base_norm_squared + 2 * self.scale * across + self.scale**2 * within
        norm: torch.Tensor = squared.clamp_min(SMALLEST_NORM**2).sqrt()
        return norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.base_layer(x)
        ratio = self.lora_magnitude_vector / self.norm()
        plain = h if self.bias is None else h - self.bias
        return h + ((ratio - 1) * plain + ratio * self.update(x)).to(h.dtype)

    def merged(self) -> nn.Module:
        matrix = self.matrix().double() + self.delta()
        norm = matrix.norm(dim=1).clamp_min(SMALLEST_NORM)
        return self.with_matrix((self.lora_magnitude_vector.double() / norm)[:, None] * matrix)


def attach(model: PreTrainedModel, settings: DoraSettings, seed: int = 0) -> None:
    base.freeze(model)
    torch.manual_seed(seed)
    for path, module, rank, alpha in lora.adapted_modules(model, settings):
        model.set_submodule(path, DoraLinear(module, rank, alpha, settings))
    saved.attach(model, settings.modules_to_save)


def peft_config(model: PreTrainedModel, settings: DoraSettings, base_name: str) -> dict[str, Any]:
    return {**lora.peft_config(model, settings, base_name), "use_dora": True}


def settings_of(config: Mapping[str, Any]) -> DoraSettings:
    return DoraSettings(**lora.common_settings(config))


METHOD = base.Method(
    attach=attach,
    set_strength=base.refuse_strength("a magnitude that replaces the base's (DoRA)"),
    merge=lora.merge,
    peft_config=peft_config,
    is_meant_by=lambda config: config["peft_type"] == "LORA" and bool(config.get("use_dora")),
    settings_of=settings_of,
)
