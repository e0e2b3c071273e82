"""What the methods share: the shape each has, which modules a recipe's `target_modules` and `layers` mean, freezing."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.errors import Problem, UserError
from ftune.model import is_linear

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


class Method(Protocol):
    """A method is a module of this shape: how it goes on and how it folds back, beside its mathematics."""

    trains_base: bool
    """Whether the base's own weights are trained (and so held in float32, and saved as a whole model)."""

    def attach(self, model: PreTrainedModel, settings: Any, seed: int = 0) -> None:
        """Freeze the base and put the method's trainable parameters on, in place."""

    def set_strength(self, model: PreTrainedModel, strength: float) -> None:
        """Scale the effect of what was trained: 0 is the base, 1 the tuned model."""

    def merge(self, model: PreTrainedModel) -> None:
        """Fold what was trained into the base's weights, in place; the model is then a plain one."""

    def adapter_config(self, model: PreTrainedModel, settings: Any, base: str) -> dict[str, Any]:
        """The adapter_config.json of PEFT's format."""

    def settings_of(self, config: dict[str, Any]) -> Any:
        """The settings that an adapter_config.json means; raises UserError for what this version cannot do."""


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the text model's transformer layers."""
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    for path, module in model.named_modules():
        inside = any(module is part for part in decoder.modules())
        if isinstance(module, nn.ModuleList) and len(module) == count and inside:
            return path, module
    raise UserError(
        f"the layers of {type(model).__name__} cannot be found", "model.base", "this architecture is not supported"
    )


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


def matches(pattern: str, path: str) -> bool:
    """Whether a name (`q_proj`), the end of a path (`self_attn.q_proj`) or a regular expression means this module."""
    return path == pattern or path.endswith("." + pattern) or re.fullmatch(pattern, path) is not None


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that means this module (rank_pattern, alpha_pattern), else the default."""
    return next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path)), default)


def find_targets(
    model: PreTrainedModel, target_modules: str | Sequence[str], layers: str | Sequence[int]
) -> dict[str, nn.Module]:
    """The linear modules to adapt, by path.

    `all-linear`, `attention` and `mlp` mean those of the transformer layers only: never the output head, never another
    tower. A pattern that matches nothing is an error that names it.
    """
    layers_path, module_list = decoder_layers(model)
    wanted = layer_indices(layers, len(module_list))
    linear = {path: module for path, module in model.named_modules() if is_linear(module)}
    inside = {path: module for path, module in linear.items() if layer_of(path, layers_path) is not None}
    if isinstance(target_modules, str):
        found = {path: module for path, module in inside.items() if _is_kind(path, layers_path, target_modules)}
        if target_modules != "attention":
            _refuse_fused_experts(model)
    else:
        found = _match_all(linear, target_modules)
        _refuse_tied_head(model, found)
    chosen = {path: module for path, module in found.items() if layer_of(path, layers_path) in wanted | {None}}
    if not chosen:
        raise UserError(
            f"no module of {type(model).__name__} is to be adapted", "method.target_modules", _available(inside)
        )
    return chosen


def _is_kind(path: str, layers_path: str, kind: str) -> bool:
    is_attention = ATTENTION.search(path[len(layers_path) :]) is not None
    return kind == "all-linear" or is_attention == (kind == "attention")


def _match_all(linear: dict[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    problems: list[Problem] = []
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        try:
            hits = {path: module for path, module in linear.items() if matches(pattern, path)}
        except re.error as error:
            problems.append(Problem(f"{pattern!r} is not a regular expression: {error}", "method.target_modules"))
            continue
        if not hits:
            problems.append(
                Problem(f"{pattern!r} matches no linear module", "method.target_modules", _available(linear))
            )
        found |= hits
    if problems:
        raise UserError.collect(problems)
    return {path: module for path, module in linear.items() if path in found}


def _available(linear: dict[str, nn.Module]) -> str:
    return "the model has " + ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linear}))


def _refuse_fused_experts(model: PreTrainedModel) -> None:
    fused = [name for name, parameter in decoder_layers(model)[1].named_parameters() if parameter.ndim > 2]
    if fused:
        raise UserError(
            f"experts are not adapted (fused parameters, such as {fused[0]})",
            "method.target_modules",
            "use target_modules: attention, or name the modules",
        )


def _refuse_tied_head(model: PreTrainedModel, found: dict[str, nn.Module]) -> None:
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if tied and (path := next((path for path, module in found.items() if module is head), None)):
        raise UserError(f"{path} shares its weight with the embeddings", "method.target_modules", "leave it out")


def modules_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Every module of a class, by path; a list first, so that they can be replaced on the way."""
    return iter([(path, module) for path, module in model.named_modules() if isinstance(module, kind)])


def like(weight: torch.Tensor) -> dict[str, Any]:
    """Where new trainable weights go: the base weight's device, float32 whatever its dtype."""
    return {"device": weight.device, "dtype": torch.float32}
