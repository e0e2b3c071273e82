"""Prompt tuning, Lester et al. 2021 (arXiv 2104.08691): trained embeddings in front of the text.

    shallow: x_1 .. x_n -> p_1 .. p_v x_1 .. x_n      p: (v, width), starts as embeddings of a text or of random tokens
    deep: the states of the v tokens are replaced before every layer      p: (layers, v, width)

Deep prompts are P-tuning v2's (Liu et al. 2021, arXiv 2110.07602). PEFT has a form for the shallow prompt only.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base, targets, virtual
from ftune.model import decoder_layers, load_tokenizer
from ftune.settings import PromptTuningSettings


def attach(model: PreTrainedModel, settings: PromptTuningSettings, seed: int = 0) -> None:
    base.freeze(model)
    weight = model.get_input_embeddings().weight
    ids = starting_ids(model, settings, seed)
    _, layers = decoder_layers(model)
    width, count = weight.shape[1], settings.virtual_tokens
    if not base.has_values(weight):
        shape = (count, width) if settings.depth == "shallow" else (len(layers), count, width)
        start = torch.empty(shape, **base.like(weight))
    elif settings.depth == "shallow":
        start = model.get_input_embeddings()(ids).detach().float()
    else:
        start = states_of(model, ids)
    model.register_parameter("prompt_embeddings", nn.Parameter(start))
    in_front = virtual.InFront(model, count)
    if settings.depth == "deep":
        for index, layer in enumerate(layers):
            if index:
                layer.register_forward_pre_hook(replace_states(in_front, index))


def starting_ids(model: PreTrainedModel, settings: PromptTuningSettings, seed: int) -> torch.Tensor:
    """The tokens whose embeddings the prompt starts as: of `init_text`, repeated as needed, or random ones."""
    if settings.init_text is None:
        return virtual.vocabulary_ids(model, settings.virtual_tokens, seed)
    ids = load_tokenizer(model.made_from)(settings.init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("this text has no tokens", "method.init_text", "write what the task is about")
    repeated = (ids * settings.virtual_tokens)[: settings.virtual_tokens]
    return torch.tensor(repeated, device=model.get_input_embeddings().weight.device)


@torch.no_grad()
def states_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What each layer is given for some tokens: (layers, tokens, width) float32."""
    output = model.base_model(ids[None], use_cache=False, output_hidden_states=True)
    count = len(decoder_layers(model)[1])
    return torch.cat([states.float() for states in output.hidden_states[:count]])


def replace_states(in_front: virtual.InFront, index: int) -> Any:
    """A hook before layer `index` that gives its virtual tokens their own trained states."""

    def before(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states = arguments[0]  # (batch, tokens, width)
        if in_front.virtual is None:
            return arguments
        own = in_front.model.prompt_embeddings[index].to(states.dtype)
        own = own.repeat(len(in_front.virtual) // in_front.count, 1).expand(len(states), -1, -1)
        return (states.index_copy(1, in_front.virtual, own), *arguments[1:])

    return before


def peft_config(model: PreTrainedModel, settings: PromptTuningSettings, base_name: str) -> dict[str, Any]:
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "num_virtual_tokens": settings.virtual_tokens,
        "token_dim": model.get_input_embeddings().weight.shape[1],
        "num_transformer_submodules": 1,
        "num_layers": len(decoder_layers(model)[1]),
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }


def settings_of(config: Mapping[str, Any]) -> PromptTuningSettings:
    targets.refuse_keys(config, ("modules_to_save",))
    return PromptTuningSettings(virtual_tokens=config["num_virtual_tokens"])


METHOD = base.Method(
    attach=attach,
    set_strength=base.refuse_strength("a prompt"),
    merge=base.refuse_merge("prompt_tuning"),
    peft_config=peft_config,
    is_meant_by=lambda config: config["peft_type"] == "PROMPT_TUNING",
    settings_of=settings_of,
    tensors=virtual.save_under_peft_name,
    load_tensors=virtual.load_from_peft_name,
)
