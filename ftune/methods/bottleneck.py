"""Bottleneck adapters: small layers down, a nonlinearity, and up again.

    serial (Houlsby et al. 2019, arXiv 1902.00751), after attention and after the MLP:   h = f(x);  h + U g(D h + d) + u
    parallel (He et al. 2021, arXiv 2110.04366), beside the MLP:                         f(x) + 4 (U g(D x + d) + u)

D: (size, width)   U: (width, size), starts at 0, so the model starts equal to the base. They compute on activations,
which no weight of the base can hold: there is no merge.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base
from ftune.methods.targets import ATTENTION
from ftune.model import decoder_layers, is_linear
from ftune.settings import BottleneckSettings

PARALLEL_SCALE = 4.0
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


class Bottleneck(base.Adapted):
    """A block of a transformer layer with a bottleneck after or beside it."""

    def __init__(self, base_layer: nn.Module, width: int, settings: BottleneckSettings, weight: torch.Tensor) -> None:
        super().__init__(base_layer)
        self.is_parallel = settings.placement == "parallel"
        self.scale = PARALLEL_SCALE if self.is_parallel else 1.0
        self.activation = ACTIVATIONS[settings.activation]
        self.down = nn.Linear(width, settings.size, **base.like(weight))
        self.up = nn.Linear(settings.size, width, **base.like(weight))
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.train(base_layer.training)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.up(self.activation(self.down(x.to(self.down.weight.dtype))))
        return (self.scale * change).to(x.dtype)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        output = self.base_layer(*arguments, **keywords)
        h = output[0] if isinstance(output, tuple) else output
        x = arguments[0] if arguments else keywords["hidden_states"]
        h = h + self.change(x if self.is_parallel else h)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def __getattr__(self, name: str) -> Any:
        """What the layer around reads from its block (an index, a head size) is the block's own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def blocks(layer: nn.Module, kinds: tuple[str, ...]) -> dict[str, nn.Module]:
    """The attention and the MLP of a transformer layer, by their names in it."""
    found = {}
    for name, child in layer.named_children():
        is_block = any(True for part in child.children() for _ in part.parameters()) and not is_linear(child)
        kind = "attention" if ATTENTION.search(name) else "mlp"
        if is_block and kind in kinds:
            found[name] = child
    return found


def attach(model: PreTrainedModel, settings: BottleneckSettings, seed: int = 0) -> None:
    base.freeze(model)
    torch.manual_seed(seed)
    layers_path, module_list = decoder_layers(model)
    kinds = ("mlp",) if settings.placement == "parallel" else ("attention", "mlp")
    width = model.get_input_embeddings().weight.shape[1]
    for index in sorted(base.layer_indices(settings.layers, len(module_list))):
        found = blocks(module_list[index], kinds)
        if len(found) != len(kinds):
            raise UserError(
                f"the {' and '.join(kinds)} of {type(module_list[index]).__name__} are not modules of their own",
                "method.name",
                "take lora, which adapts single layers",
            )
        for name, block in found.items():
            weight = next(block.parameters())
            model.set_submodule(f"{layers_path}.{index}.{name}", Bottleneck(block, width, settings, weight))


METHOD = base.Method(
    attach=attach,
    set_strength=base.scaling(Bottleneck),
    merge=base.refuse_merge("bottleneck"),
)
