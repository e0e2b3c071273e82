"""The MLP of the last decoder layer at the positions whose state is wanted alone: nothing reads the others' output.

Hooks cut what the layer's parts behind the attention are given, and put 0 in the place of what they did not compute.
That is exact wherever these parts work position by position. `comparing.prove_packing` compares the outcome on the
very model; without that proof every position is computed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

ATTRIBUTE = "_cut_last_layer"
KEYWORD = "wanted_positions"
"""Of a forward pass: the positions whose last hidden state is wanted, (n,). It reaches every layer's attention."""


class _Cut:
    """The hooks on a last layer. Its attention, which comes first, tells which positions the other parts compute.

    A layer that is computed again for its gradients calls the same modules with the same keyword arguments.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.positions: torch.Tensor | None = None
        self.tokens = 0
        self.has_cut = False
        self.handles = []
        for child in layer.children():
            if _is_attention(child):
                self.handles.append(child.register_forward_pre_hook(self._begin, with_kwargs=True))
            elif any(parameter.ndim > 1 for parameter in child.parameters()):
                self.handles.append(child.register_forward_pre_hook(self._cut, with_kwargs=True))
                self.handles.append(child.register_forward_hook(self._fill))

    def _begin(self, child: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        self.positions = keywords.get(KEYWORD)

    def _cut(self, child: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if self.positions is None:
            return None
        return _changed(self._at_positions, arguments), {k: self._at_positions(v) for k, v in keywords.items()}

    def _fill(self, child: nn.Module, arguments: Any, output: Any) -> Any:
        return output if self.positions is None else _changed(self._among_zeros, output)

    def _at_positions(self, value: Any) -> Any:
        """(1, tokens, width) -> (1, n, width); some architectures lay the batch out flat, without the 1."""
        if not _is_of_states(value):
            return value
        self.tokens, self.has_cut = value.shape[-2], True
        return value[..., self.positions, :]

    def _among_zeros(self, value: Any) -> Any:
        """The way back, with 0 at all other positions."""
        if not _is_of_states(value):
            return value
        whole = value.new_zeros(*value.shape[:-2], self.tokens, value.shape[-1])
        return whole.index_copy(-2, self.positions, value)


def _is_of_states(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim in (2, 3)


def _is_attention(module: nn.Module) -> bool:
    """It knows its layer's number, by which it finds its part of a cache."""
    return any(hasattr(part, "layer_idx") for part in module.modules())


def _changed(change: Callable[[Any], Any], values: Any) -> Any:
    return tuple(map(change, values)) if isinstance(values, tuple) else change(values)


def cut(model: PreTrainedModel, layer: nn.Module) -> None:
    """From now on the model's last layer heeds KEYWORD; again after parts of it were wrapped."""
    leave_whole(model)
    setattr(model, ATTRIBUTE, _Cut(layer))


def leave_whole(model: PreTrainedModel) -> None:
    if (found := getattr(model, ATTRIBUTE, None)) is not None:
        for handle in found.handles:
            handle.remove()
        setattr(model, ATTRIBUTE, None)


def heeds(model: PreTrainedModel) -> bool:
    return getattr(model, ATTRIBUTE, None) is not None


def has_cut(model: PreTrainedModel) -> bool:
    """Whether anything was left out in a pass so far."""
    found = getattr(model, ATTRIBUTE, None)
    return found is not None and found.has_cut
