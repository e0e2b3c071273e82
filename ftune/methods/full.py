"""Full fine-tuning: every weight of the chosen layers; with `layers: all` also embeddings, norms and head."""

from typing import Any, NoReturn

from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base
from ftune.settings import FullSettings

trains_base = True


def attach(model: PreTrainedModel, settings: FullSettings, seed: int = 0) -> None:
    base.freeze(model)
    layers_path, module_list = base.decoder_layers(model)
    wanted = base.layer_indices(settings.layers, len(module_list))
    for name, parameter in model.named_parameters():
        layer = base.layer_of(name, layers_path)
        parameter.requires_grad_(settings.layers == "all" or layer in wanted)


def set_strength(model: PreTrainedModel, strength: float) -> None:
    if strength != 1.0:
        raise UserError("a fully fine-tuned model has no adapter to scale", "--strength", "leave it at 1")


def merge(model: PreTrainedModel) -> None:
    """Nothing to fold: what was trained is the model."""


def adapter_config(model: PreTrainedModel, settings: FullSettings, base_name: str) -> NoReturn:
    raise UserError("full fine-tuning makes a model, not an adapter", "method.name")


def settings_of(config: dict[str, Any]) -> NoReturn:
    raise UserError("full fine-tuning makes a model, not an adapter", "adapter_config.json")
