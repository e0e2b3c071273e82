"""Prefix tuning, Li and Liang 2021 (arXiv 2101.00190): trained keys and values in front of every layer.

    attention(q, [P_k; K], [P_v; V])    P: (v, layers * 2 * heads * size), starts as keys and values of random tokens

With `projection` an MLP makes P while training, from embeddings of the model's width: W2 tanh(W1 e + b1) + b2; what is
saved is P itself, as PEFT saves it. The prefix stands at positions 0 to v - 1; keys are stored as attention sees them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base, targets, virtual
from ftune.settings import PrefixTuningSettings


class Reparametrization(nn.Module):
    """P out of embeddings of the model's width: (v, width) -> (v, layers * 2 * heads * size)."""

    def __init__(self, count: int, width: int, size: int, weight: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width, **base.like(weight))
        self.transform = nn.Sequential(
            nn.Linear(width, width, **base.like(weight)), nn.Tanh(), nn.Linear(width, size, **base.like(weight))
        )

    def forward(self) -> torch.Tensor:
        made: torch.Tensor = self.transform(self.embedding.weight)
        return made


class Prefix:
    """Hands the prefix to the decoder: to our packed attention as an argument, to any other through the cache."""

    def __init__(self, model: PreTrainedModel, settings: PrefixTuningSettings) -> None:
        self.model, self.count = model, settings.virtual_tokens
        self.layers, self.heads, self.size = key_value_shape(model)
        self.is_cache_wanted = True
        virtual.hook(model, self.before, self.after)

    def states(self, batch: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each layer its keys and its values: (batch, heads, v, size)."""
        flat = prefix_of(self.model).to(dtype).view(self.count, self.layers * 2, self.heads, self.size)
        both = flat.permute(1, 2, 0, 3)[:, None].expand(-1, batch, -1, -1, -1)
        return [(both[2 * layer], both[2 * layer + 1]) for layer in range(self.layers)]

    def before(self, keywords: virtual.Keywords) -> virtual.Keywords:
        ids = keywords["input_ids"]
        dtype = self.model.get_input_embeddings().weight.dtype
        virtual.shift_positions(keywords, self.count)
        if keywords.get("segment_bounds") is not None:
            keywords["prefix_states"] = self.states(1, dtype)
            return keywords
        virtual.extend_mask(keywords, self.count)
        if virtual.is_first_pass(keywords):
            cache = keywords.get("past_key_values") or DynamicCache(config=self.model.config)
            for index, (keys, values) in enumerate(self.states(len(ids), dtype)):
                cache.update(keys, values, index)
            keywords["past_key_values"] = cache
            self.is_cache_wanted = keywords.get("use_cache") is not False
        return keywords

    def after(self, output: Any) -> Any:
        """Who wants no cache must not be handed the one that carried the prefix."""
        if not self.is_cache_wanted:
            output.past_key_values = None
        return output


def key_value_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, key-value heads and the size of a head."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


def prefix_of(model: PreTrainedModel) -> torch.Tensor:
    """(v, layers * 2 * heads * size): the parameter itself, or made by the MLP."""
    if hasattr(model, "prompt_encoder"):
        made: torch.Tensor = model.prompt_encoder()
        return made
    stored: torch.Tensor = model.prompt_embeddings
    return stored


def attach(model: PreTrainedModel, settings: PrefixTuningSettings, seed: int = 0) -> None:
    base.freeze(model)
    torch.manual_seed(seed)
    weight = model.get_input_embeddings().weight
    layers, heads, size = key_value_shape(model)
    flat = layers * 2 * heads * size
    if settings.projection:
        made = Reparametrization(settings.virtual_tokens, weight.shape[1], flat, weight)
        model.add_module("prompt_encoder", made)
    elif base.has_values(weight):
        ids = virtual.vocabulary_ids(model, settings.virtual_tokens, seed)
        model.register_parameter("prompt_embeddings", nn.Parameter(keys_and_values(model, ids)))
    else:
        empty = torch.empty(settings.virtual_tokens, flat, **base.like(weight))
        model.register_parameter("prompt_embeddings", nn.Parameter(empty))
    Prefix(model, settings)


@torch.no_grad()
def keys_and_values(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What every layer's attention makes of some tokens: (tokens, layers * 2 * heads * size) float32."""
    cache = model.base_model(ids[None], use_cache=True).past_key_values
    states = [states[0].transpose(0, 1) for layer in cache.layers for states in (layer.keys, layer.values)]
    return torch.stack(states, dim=1).reshape(len(ids), -1).float()


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {"prompt_embeddings": prefix_of(model).detach()}


def load_tensors(model: PreTrainedModel, found: Mapping[str, torch.Tensor]) -> None:
    if hasattr(model, "prompt_encoder"):
        raise UserError(
            "a saved prefix holds what its projection made, not the projection",
            "method.projection",
            "continue it with projection: false",
        )
    virtual.load_from_peft_name(model, found)


def peft_config(model: PreTrainedModel, settings: PrefixTuningSettings, base_name: str) -> dict[str, Any]:
    layers, heads, size = key_value_shape(model)
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "num_virtual_tokens": settings.virtual_tokens,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": layers,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
        "inference_mode": True,
    }


def settings_of(config: Mapping[str, Any]) -> PrefixTuningSettings:
    targets.refuse_keys(config, ("modules_to_save",))
    return PrefixTuningSettings(virtual_tokens=config["num_virtual_tokens"])


METHOD = base.Method(
    attach=attach,
    set_strength=base.refuse_strength("a prefix"),
    merge=base.refuse_merge("prefix_tuning"),
    peft_config=peft_config,
    is_meant_by=lambda config: config["peft_type"] == "PREFIX_TUNING",
    settings_of=settings_of,
    tensors=tensors,
    load_tensors=load_tensors,
)
