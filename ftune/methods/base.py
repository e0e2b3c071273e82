"""What the methods share: the shape each has, which layers a recipe means, freezing, and tensors for a file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.settings import METHOD_NAMES

PREFIX = "base_model.model."
"""PEFT writes the names of a model's own parameters below its two wrappers."""


class Attach(Protocol):
    def __call__(self, model: PreTrainedModel, settings: Any, seed: int = 0) -> None: ...


def _never(config: Mapping[str, Any]) -> bool:
    return False


def _no_penalty(model: PreTrainedModel) -> torch.Tensor | None:
    return None


def _nothing(model: PreTrainedModel, step: int, total_steps: int) -> dict[str, float]:
    return {}


def adapter_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Exactly the trainable parameters, by the names PEFT gives them."""
    return {PREFIX + name: parameter.detach() for name, parameter in trainable(model).items()}


def load_adapter_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    copy_strictly({PREFIX + name: parameter for name, parameter in trainable(model).items()}, tensors)


@dataclass(frozen=True)
class Method:
    """What a method's file offers: how it goes on and how it folds back, beside its mathematics."""

    attach: Attach
    """Freeze the base and put the method's trainable parameters on, in place."""
    set_strength: Callable[[PreTrainedModel, float], None]
    """Scale the effect of what was trained: 0 is the base, 1 the tuned model."""
    merge: Callable[[PreTrainedModel], None]
    """Fold what was trained into the base's weights, in place; the model is then a plain one."""
    trains_base: bool = False
    """Whether the base's own weights are trained (and so held in float32, and saved as a whole model)."""
    trains_head_alone: bool = False
    """Whether what lies below the head never changes, so that its states can be computed once."""
    peft_config: Callable[[PreTrainedModel, Any, str], dict[str, Any]] | None = None
    """The adapter_config.json of PEFT's format, where PEFT has the method."""
    is_meant_by: Callable[[Mapping[str, Any]], bool] = _never
    """Whether an adapter_config.json describes this method."""
    settings_of: Callable[[Mapping[str, Any]], Any] | None = None
    """The settings that an adapter_config.json means; raises UserError for what this version cannot do."""
    tensors: Callable[[PreTrainedModel], dict[str, torch.Tensor]] = adapter_tensors
    """What the adapter file holds, by the names it has there."""
    load_tensors: Callable[[PreTrainedModel, Mapping[str, torch.Tensor]], None] = load_adapter_tensors
    """Put an adapter file's tensors on an attached model, strictly."""
    penalty: Callable[[PreTrainedModel], torch.Tensor | None] = _no_penalty
    """What is added to the loss of a step: a scalar with a gradient."""
    after_step: Callable[[PreTrainedModel, int, int], dict[str, float]] = _nothing
    """Called after optimizer step `step` of `total_steps`, gradients still there; returns figures to log."""


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def training_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of the model: trainable parameters, and the buffers of adapted modules."""
    buffers = {
        f"{path}.{name}": buffer
        for path, module in modules_of(model, Adapted)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {**trainable(model), **buffers}


class Adapted(nn.Module):
    """A frozen module of the base, `base_layer`, with something trained beside it."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.train(base_layer.training)


@torch.no_grad()
def copy_strictly(wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a file's tensors into parameters; missing, unexpected, misshapen ones are an error that lists them."""
    wrong = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys()),
        "of another shape": sorted(
            name for name in tensors.keys() & wanted.keys() if tensors[name].shape != wanted[name].shape
        ),
        "of no floating-point numbers": sorted(
            name for name in tensors.keys() & wanted.keys() if not tensors[name].is_floating_point()
        ),
    }
    if told := "; ".join(
        f"{kind}: {', '.join(name.removeprefix(PREFIX) for name in names)}" for kind, names in wrong.items() if names
    ):
        raise UserError(
            f"the adapter's tensors do not fit the model: {told}",
            "adapter_model.safetensors",
            "is this the base it was trained on?",
        )
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])


def layer_indices(layers: str | Sequence[int], count: int) -> set[int]:
    """The indices that `method.layers` means, of a model with `count` layers."""
    if layers == "all":
        return set(range(count))
    if layers == "last-half":
        return set(range(count // 2, count))
    if outside := [i for i in layers if not 0 <= int(i) < count]:
        raise UserError(
            f"layer {outside[0]} does not exist, the model has {count}", "method.layers", f"use 0 to {count - 1}"
        )
    return {int(i) for i in layers}


def layer_of(path: str, layers_path: str) -> int | None:
    """Which layer a module or parameter lies in; None outside of them."""
    if not path.startswith(layers_path + "."):
        return None
    return int(path[len(layers_path) + 1 :].split(".")[0])


def modules_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Every module of a class, by path; a list first, so that they can be replaced on the way."""
    return iter([(path, module) for path, module in model.named_modules() if isinstance(module, kind)])


def attached(model: nn.Module) -> list[str]:
    """The paths of all modules of the base that a method goes on: adapted, or trained in full beside an adapter."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, Adapted) or getattr(module, "is_saved_whole", False)
    ]


def like(weight: torch.Tensor) -> dict[str, Any]:
    """Where new trainable weights go: the base weight's device, float32 whatever its dtype."""
    return {"device": weight.device, "dtype": torch.float32}


def has_values(tensor: torch.Tensor) -> bool:
    """False on the meta device and for fake tensors, whose contents nobody can read."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or isinstance(tensor.data, FakeTensor))


def scaling(*kinds: type[nn.Module]) -> Callable[[PreTrainedModel, float], None]:
    """A `set_strength` for layers whose `scale` multiplies what was trained."""

    def set_strength(model: PreTrainedModel, strength: float) -> None:
        for kind in kinds:
            for _, layer in modules_of(model, kind):
                layer.scale *= strength

    return set_strength


def folding(*kinds: type[nn.Module]) -> Callable[[PreTrainedModel], None]:
    """A `merge` for layers that give their base layer back with the change in it (`merged`)."""

    @torch.no_grad()
    def merge(model: PreTrainedModel) -> None:
        for kind in kinds:
            for path, layer in modules_of(model, kind):
                model.set_submodule(path, layer.merged())

    return merge


def refuse_strength(what: str) -> Callable[[PreTrainedModel, float], None]:
    """A `set_strength` for what has no scale."""

    def set_strength(model: PreTrainedModel, strength: float) -> None:
        if strength != 1.0:
            raise UserError(f"{what} has no strength that could be scaled", "--strength", "leave it at 1")

    return set_strength


def check_merging(name: str) -> None:
    """Raise UserError for a method that cannot be folded into weights."""
    if obstacle := METHOD_NAMES[name].abilities.obstacle_to_merging:
        raise UserError(f"an adapter of {name} cannot be merged: {obstacle}", "merge", "serve the adapter itself")


def refuse_merge(name: str) -> Callable[[PreTrainedModel], None]:
    """A `merge` for what cannot be folded into weights."""
    return lambda model: check_merging(name)
