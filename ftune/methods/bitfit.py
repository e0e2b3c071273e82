"""BitFit, Ben Zaken et al. 2021 (arXiv 2106.10199): the biases alone are trained.

    h = f(x) + c      c: (out,), starts at 0; f: a linear layer or a layer norm with a bias b, whose new bias is b + c

c lies beside the frozen b, in float32 whatever the base's dtype, so it works on quantized layers too.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base
from ftune.model import decoder_layers, is_linear
from ftune.settings import BitfitSettings


class ShiftedBias(base.Adapted):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.scale = 1.0
        self.bias_change = nn.Parameter(torch.zeros(self.bias.shape, **base.like(self.bias)))

    @property
    def bias(self) -> torch.Tensor:
        bias: torch.Tensor = self.base_layer.bias  # type: ignore[assignment]
        return bias

    @property
    def weight(self) -> torch.Tensor:
        """Some models look at their layers' weights, for their dtype."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.base_layer(x)
        return h + (self.scale * self.bias_change).to(h.dtype)

    def merged(self) -> nn.Module:
        self.bias.data = (self.bias.double() + self.scale * self.bias_change.double()).to(self.bias.dtype)
        return self.base_layer


def attach(model: PreTrainedModel, settings: BitfitSettings, seed: int = 0) -> None:
    base.freeze(model)
    layers_path, module_list = decoder_layers(model)
    wanted = base.layer_indices(settings.layers, len(module_list))
    wanted_or_outside = wanted | {None} if settings.layers == "all" else wanted
    biases = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith("bias")}
    biases = {path for path in biases if base.layer_of(path, layers_path) in wanted_or_outside}
    if not biases:
        raise UserError(
            f"0 trainable parameters: {type(model).__name__} has no biases in these layers",
            "method.name",
            "take another method; ia3 and vera are about as small",
        )
    modules = dict(model.named_modules())
    for path in biases:
        module = modules.get(path, model)
        if not (is_linear(module) or isinstance(module, nn.LayerNorm)):
            raise UserError(f"the bias of {path} is not of a linear layer or layer norm", "method.name", "take lora")
        model.set_submodule(path, ShiftedBias(module))


METHOD = base.Method(attach=attach, set_strength=base.scaling(ShiftedBias), merge=base.folding(ShiftedBias))
