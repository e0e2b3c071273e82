"""The head of a classifier: trained in full and saved beside whatever method is attached, which knows nothing of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune.classifier import HEAD, plain_head
from ftune.errors import UserError
from ftune.methods import METHODS, base
from ftune.methods.base import Method
from ftune.model import is_classifier

MODULE = HEAD.partition(".")[0]
TASK = "SEQ_CLS"
"""PEFT's name for a classifier's adapter."""


def method_of(name: str, model: PreTrainedModel) -> Method:
    """A method by its name; on a classifier, with the head beside it."""
    return with_head(METHODS[name]) if is_classifier(model) else METHODS[name]


def with_head(method: Method) -> Method:
    def attach(model: PreTrainedModel, settings: Any, seed: int = 0) -> None:
        method.attach(model, settings, seed)
        if isinstance(model.score, base.Adapted):
            raise UserError(
                "score is trained in full already", "method.target_modules", "leave the classifier's head out"
            )
        model.score.requires_grad_(True)

    def set_strength(model: PreTrainedModel, strength: float) -> None:
        if strength != 1.0:
            raise UserError("a classifier's head has no strength", "--strength", "leave it at 1")

    def merge(model: PreTrainedModel) -> None:
        method.merge(model)
        plain_head(model)

    def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        with _set_aside(model):
            found = method.tensors(model)
        return {**found, _name(found): model.score.weight.detach()}

    def load_tensors(model: PreTrainedModel, found: Mapping[str, torch.Tensor]) -> None:
        name = _name(found)
        base.copy_strictly({name: model.score.weight}, {key: found[key] for key in found if key == name})
        with _set_aside(model):
            method.load_tensors(model, {key: tensor for key, tensor in found.items() if key != name})

    def peft_config(model: PreTrainedModel, settings: Any, base_name: str) -> dict[str, Any]:
        assert method.peft_config is not None
        config = method.peft_config(model, settings, base_name)
        modules = config.get("modules_to_save") or []
        return {**config, "task_type": TASK, "modules_to_save": [*modules, MODULE]}

    return replace(
        method,
        attach=attach,
        set_strength=set_strength,
        merge=merge,
        tensors=tensors,
        load_tensors=load_tensors,
        peft_config=None if method.peft_config is None else peft_config,
    )


def without_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json as the method means it, which knows nothing of the head."""
    if config.get("task_type") != TASK:
        return dict(config)
    # PEFT lists the names that a head can have, whichever of them the model has.
    modules = [name for name in config.get("modules_to_save") or [] if name not in (MODULE, "classifier")]
    return {**config, "modules_to_save": modules or None}


def head_of(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The head's weight in an adapter file: (labels, width)."""
    if (name := _name(tensors)) not in tensors:
        raise UserError(f"no {HEAD} in this classifier's adapter", "adapter_model.safetensors", "save it with its head")
    return tensors[name]


def _name(tensors: Mapping[str, torch.Tensor]) -> str:
    """The head's name in an adapter file: PEFT wraps a model once less where virtual tokens stand in front."""
    return f"base_model.{HEAD}" if "prompt_embeddings" in tensors else base.PREFIX + HEAD


@contextmanager
def _set_aside(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the head is not trainable, so that the method sees its own parameters alone."""
    was_trained = model.score.weight.requires_grad
    model.score.requires_grad_(False)
    try:
        yield
    finally:
        model.score.requires_grad_(was_trained)
