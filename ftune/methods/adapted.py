"""The frozen linear layer inside an adapter, whatever stores its weight."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftune import quantized
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

    @property
    def base_dtype(self) -> torch.dtype:
        """What the base's layer computes in: its weight's dtype, unless that is a quantized one."""
        layer: Any = self.base_layer
        dtype: torch.dtype = layer.compute_dtype if quantized.is_quantized(layer) else layer.weight.dtype
        return dtype

    @torch.no_grad()
    def matrix(self) -> torch.Tensor:
        """The base's weight as (out, in), in the dtype it computes in."""
        if quantized.is_quantized(self.base_layer):
            return quantized.matrix(self.base_layer)
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight.T if self.is_transposed else weight

    @torch.no_grad()
    def with_matrix(self, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
        """The base layer, plain again, with other values: (out, in) float64, rounded once to the base's dtype.

        A quantized layer could not hold them (rounding would eat the update): a plain one takes its place.
        """
        if quantized.is_quantized(self.base_layer):
            return quantized.plain(self.base_layer, matrix, bias)
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        weight.data = (matrix.T if self.is_transposed else matrix).to(weight.dtype).contiguous()
        if bias is not None:
            assert self.bias is not None
            self.bias.data = bias.to(self.bias.dtype)
        return self.base_layer
