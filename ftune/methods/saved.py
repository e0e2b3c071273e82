"""`modules_to_save`: modules of the base that are trained in full beside an adapter, and saved with it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune import model as models
from ftune import quantized
from ftune.errors import Problem, UserError
from ftune.methods import base


def attach(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Replace each named module by a trainable float32 copy; the base's own parameters stay untouched.

    A copy of a tied head or of tied embeddings is no longer tied, which the model's configuration then says.
    """
    problems = []
    for name in names:
        paths = [path for path, _ in model.named_modules() if path == name or path.endswith("." + name)]
        if not paths:
            hint = "name a module such as lm_head or embed_tokens"
            problems.append(Problem(f"{name!r} matches no module", "method.modules_to_save", hint))
        for path in paths:
            _train_copy(model, path)
    if problems:
        raise UserError.collect(problems)


def _train_copy(model: PreTrainedModel, path: str) -> None:
    original = model.get_submodule(path)
    if any(isinstance(module, base.Adapted) for module in original.modules()):
        raise UserError(f"{path} is adapted and trained in full at once", "method.modules_to_save", "choose one")
    if next(quantized.layers(original), None) is not None:
        hint = "with a quantized base name lm_head, embed_tokens or a norm, which stay as they are"
        raise UserError(f"{path} is quantized and cannot be trained in full", "method.modules_to_save", hint)
    dtypes = {parameter.dtype for parameter in original.parameters()}
    if not dtypes:
        raise UserError(f"{path} has no weights to train", "method.modules_to_save")
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    is_tied = models.is_tied(model) and original in ends
    # Its parameters are copied here, into float32; what copies them in deepcopy cannot do so for the plan's fake ones.
    own = {id(p): nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in original.parameters()}
    copied = copy.deepcopy(original, own)
    if dtypes != {torch.float32}:
        dtype = next(iter(dtypes))
        copied.register_forward_pre_hook(_into_float32)
        copied.register_forward_hook(lambda module, inputs, output: output.to(dtype))
    copied.is_saved_whole, copied.base_dtype = True, next(iter(dtypes))
    model.set_submodule(path, copied)
    if is_tied:
        model.config.tie_word_embeddings = False


def _into_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if value.is_floating_point() else value for value in inputs)


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """What was trained in full becomes plain modules again: no hooks, the base's dtype, float32 rounded once."""
    for path, module in base.modules_of(model, nn.Module):
        if getattr(module, "is_saved_whole", False):
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            module.is_saved_whole = False
            model.set_submodule(path, module.to(module.base_dtype).requires_grad_(False))


def unties(model: PreTrainedModel) -> bool:
    """Whether the head or the embeddings are trained in full: in a tied base these are two tensors from then on."""
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    return any(getattr(module, "is_saved_whole", False) for module in ends)


def set_strength(model: PreTrainedModel, strength: float) -> None:
    if strength != 1.0 and any(getattr(module, "is_saved_whole", False) for module in model.modules()):
        raise UserError("modules trained in full (modules_to_save) have no strength", "--strength", "leave it at 1")
