"""Which modules a recipe's `target_modules` means, on any architecture."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import regex
from torch import nn
from transformers import PreTrainedModel

from ftune.errors import Problem, UserError
from ftune.methods.base import layer_indices, layer_of
from ftune.model import decoder_layers, is_linear, is_tied

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
PATIENCE = 2.0
"""Seconds that an expression may take over one module's path: those of adapters come from other people."""


def matches(pattern: str, path: str) -> bool:
    """Whether a name (`q_proj`), the end of a path (`self_attn.q_proj`) or a regular expression means this module."""
    return path == pattern or path.endswith("." + pattern) or _fits(pattern, path)


def _fits(pattern: str, path: str) -> bool:
    try:
        return regex.fullmatch(pattern, path, timeout=PATIENCE) is not None
    except TimeoutError as error:
        hint = "repeat nothing that is repeated inside"
        raise UserError(f"the expression {pattern!r} comes to no end over {path}", "method", hint) from error


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that means this module (rank_pattern, alpha_pattern), else the default."""
    return next((value for pattern, value in patterns.items() if is_meant(pattern, path)), default)


def is_meant(pattern: str, path: str) -> bool:
    """Whether a pattern is a module's whole path, or its end from a dot on."""
    return _fits(rf"(.*\.)?({pattern})", path)


def check_patterns(adapted: Iterable[str], patterns: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError for a pattern that means none of the adapted modules: it would have no effect."""
    paths = list(adapted)
    idle = [
        Problem(f"{pattern!r} matches no adapted module", f"method.{key}", _available(paths))
        for key, wanted in patterns.items()
        for pattern in wanted
        if not any(is_meant(pattern, path) for path in paths)
    ]
    if idle:
        raise UserError.collect(idle)


def find_targets(
    model: PreTrainedModel, target_modules: str | Sequence[str], layers: str | Sequence[int]
) -> dict[str, nn.Module]:
    """The linear modules to adapt, by path; the input embeddings too, where a pattern names them.

    `all-linear`, `attention` and `mlp` mean those of the transformer layers only: never the output head, never another
    tower. The name of a module means the text model's; what lies elsewhere is meant by its whole path or a regular
    expression. A pattern that matches nothing is an error that names it.
    """
    layers_path, module_list = decoder_layers(model)
    wanted = layer_indices(layers, len(module_list))
    linear = {path: module for path, module in model.named_modules() if is_linear(module)}
    embeddings = model.get_input_embeddings()
    adaptable = {path: m for path, m in model.named_modules() if path in linear or m is embeddings}
    inside = {path: module for path, module in linear.items() if layer_of(path, layers_path) is not None}
    if isinstance(target_modules, str):
        found = {path: module for path, module in inside.items() if _is_kind(path, layers_path, target_modules)}
        if target_modules != "attention":
            _refuse_fused_experts(model)
    else:
        own = set(inside) | {path for path, m in adaptable.items() if m in (embeddings, model.get_output_embeddings())}
        found = _match_all(adaptable, target_modules, own)
        _refuse_tied(model, found)
    chosen = {path: module for path, module in found.items() if layer_of(path, layers_path) in wanted | {None}}
    if not chosen:
        raise UserError(
            f"no module of {type(model).__name__} is to be adapted", "method.target_modules", _available(inside)
        )
    return chosen


def _is_kind(path: str, layers_path: str, kind: str) -> bool:
    is_attention = ATTENTION.search(path[len(layers_path) :]) is not None
    return kind == "all-linear" or is_attention == (kind == "attention")


def _match_all(linear: dict[str, nn.Module], patterns: Sequence[str], own: set[str]) -> dict[str, nn.Module]:
    problems: list[Problem] = []
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        try:
            meant = {path: module for path, module in linear.items() if matches(pattern, path)}
            hits = {path: m for path, m in meant.items() if path in own or _fits(pattern, path)}
        except regex.error as error:
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


def _available(linear: Iterable[str]) -> str:
    return "the model has " + ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linear}))


def _refuse_fused_experts(model: PreTrainedModel) -> None:
    fused = [name for name, parameter in decoder_layers(model)[1].named_parameters() if parameter.ndim > 2]
    if fused:
        raise UserError(
            f"experts are not adapted (fused parameters, such as {fused[0]})",
            "method.target_modules",
            "use target_modules: attention, or name the modules",
        )


def _refuse_tied(model: PreTrainedModel, found: dict[str, nn.Module]) -> None:
    """One weight that is both embeddings and head cannot be changed in one of the two places."""
    if not is_tied(model):
        return
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if path := next((path for path, module in found.items() if module in (head, embeddings)), None):
        other = "embeddings" if found[path] is head else "output head"
        raise UserError(f"{path} shares its weight with the {other}", "method.target_modules", "leave it out")


def names_for_peft(model: nn.Module, adapted: set[str]) -> list[str]:
    """The shortest names that mean exactly the adapted modules: `q_proj` where all of them are, else full paths."""
    names = {path.rsplit(".", 1)[-1] for path in adapted}
    meant = {path for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in names}
    return sorted(names if meant == adapted else adapted)


def names_from_peft(config: Mapping[str, Any]) -> Any:
    """`target_modules` of an adapter_config.json as our settings have it."""
    targets = config.get("target_modules")
    if not targets:
        raise UserError("adapter_config.json names no target_modules", "target_modules", "was it written by PEFT?")
    if targets == "all-linear":
        return "all-linear"
    return (targets,) if isinstance(targets, str) else tuple(targets)


def refuse_keys(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse what an adapter_config.json asks for and this version cannot honour."""
    if refused := [key for key in keys if config.get(key)]:
        what = f"this adapter uses {', '.join(refused)}, which this version cannot load"
        raise UserError(what, "adapter_config.json")


def refuse_embeddings(modules: Mapping[str, nn.Module]) -> None:
    """Only LoRA adapts embeddings."""
    for path, module in modules.items():
        if isinstance(module, nn.Embedding):
            raise UserError(f"{path} is no linear layer", "method.target_modules", "only lora adapts embeddings")
