"""The frozen linear layer inside an adapter, whatever stores its weight."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftune.methods.base import Adapted


class AdaptedLinear(Adapted):
    """torch's linear layer, GPT-2's transposed one, or a quantized one, with something trained beside it."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__(base_layer)
        self.is_transposed = isinstance(base_layer, Conv1D)
        shape = base_layer.weight.shape if self.is_transposed else (base_layer.in_features, base_layer.out_features)
        self.num_in, self.num_out = shape

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    @torch.no_grad()
    def matrix(self) -> torch.Tensor:
        """The base's weight as (out, in), in its own dtype."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight.T if self.is_transposed else weight

    @torch.no_grad()
    def with_matrix(self, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
        """The base layer, plain again, with other values: (out, in) float64, rounded once to the base's dtype."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        weight.data = (matrix.T if self.is_transposed else matrix).to(weight.dtype).contiguous()
        if bias is not None:
            assert self.bias is not None
            self.bias.data = bias.to(self.bias.dtype)
        return self.base_layer
