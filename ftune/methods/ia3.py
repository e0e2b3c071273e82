"""(IA)^3, Liu et al. 2022 (arXiv 2205.05638): trained scales of keys, values and the MLP's inner activations.

    keys and values: h = l * (W x + b), l: (out, 1)      feed-forward: h = W (l * x) + b, l: (1, in)      l starts at 1

`<path>.ia3_l` is the name in PEFT's files. `target_modules: auto` means the key and value projections (or the one layer
that makes queries, keys and values) and the last linear layer of each MLP, which takes the inner activations.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base, targets
from ftune.methods.adapted import AdaptedLinear
from ftune.model import decoder_layers
from ftune.settings import Ia3Settings

KEY_OR_VALUE = re.compile(r"(k|v|key|value|kv)(_?proj|_lin|_b_proj)?")
FUSED = re.compile(r"c_attn|(c_)?(Wqkv|wqkv|qkv|query_key_value)(_proj)?")
UNSUPPORTED = ("modules_to_save", "exclude_modules")


class Ia3Linear(AdaptedLinear):
    def __init__(self, base_layer: Any, is_feedforward: bool) -> None:
        super().__init__(base_layer)
        self.is_feedforward = is_feedforward
        self.scale = 1.0
        shape = (1, self.num_in) if is_feedforward else (self.num_out, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, **base.like(base_layer.weight)))

    def scales(self) -> torch.Tensor:
        """(in,) or (out,): 1 where nothing is changed."""
        scales = self.ia3_l.flatten()
        return scales if self.scale == 1.0 else 1 + self.scale * (scales - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_feedforward:
            x = (x * self.scales()).to(x.dtype)
        h: torch.Tensor = self.base_layer(x)
        return h if self.is_feedforward else (h * self.scales()).to(h.dtype)

    def merged(self) -> nn.Module:
        scales = self.scales().double()
        if self.is_feedforward:
            return self.with_matrix(self.matrix().double() * scales)
        bias = None if self.bias is None else self.bias.double() * scales
        return self.with_matrix(self.matrix().double() * scales[:, None], bias)


def attach(model: PreTrainedModel, settings: Ia3Settings, seed: int = 0) -> None:
    base.freeze(model)
    if settings.target_modules == "auto":
        modules, feedforward = automatic(model, settings)
    else:
        modules = targets.find_targets(model, settings.target_modules, settings.layers)
        targets.check_patterns(modules, {"feedforward_modules": settings.feedforward_modules})
        feedforward = {path for path in modules if any(targets.matches(p, path) for p in settings.feedforward_modules)}
    targets.refuse_embeddings(modules)
    for path, module in modules.items():
        model.set_submodule(path, Ia3Linear(module, path in feedforward))


def automatic(model: PreTrainedModel, settings: Ia3Settings) -> tuple[dict[str, nn.Module], set[str]]:
    """Keys, values and the last layer of each MLP; and which of them take the MLP's inner activations."""
    layers_path, _ = decoder_layers(model)
    attention = targets.find_targets(model, "attention", settings.layers)
    chosen = {path: m for path, m in attention.items() if KEY_OR_VALUE.fullmatch(path.rsplit(".", 1)[-1])}
    chosen = chosen or {path: m for path, m in attention.items() if FUSED.fullmatch(path.rsplit(".", 1)[-1])}
    if not chosen:
        names = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in attention}))
        raise UserError(
            f"no keys and values are known by name among {names}",
            "method.target_modules",
            "name the modules, and the MLP's second layer in feedforward_modules too",
        )
    last = {base.layer_of(path, layers_path): path for path in targets.find_targets(model, "mlp", settings.layers)}
    found = targets.find_targets(model, [re.escape(path) for path in (*chosen, *last.values())], "all")
    return found, set(last.values())


def peft_config(model: PreTrainedModel, settings: Ia3Settings, base_name: str) -> dict[str, Any]:
    layers = dict(base.modules_of(model, Ia3Linear))
    names = targets.names_for_peft(model, set(layers))
    feedforward = {path for path, layer in layers.items() if layer.is_feedforward}
    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "target_modules": names,
        "feedforward_modules": [n for n in names if any(targets.matches(re.escape(n), path) for path in feedforward)],
        "fan_in_fan_out": any(layer.is_transposed for layer in layers.values()),
        "inference_mode": True,
        "modules_to_save": None,
    }


def settings_of(config: Mapping[str, Any]) -> Ia3Settings:
    targets.refuse_keys(config, UNSUPPORTED)
    feedforward = config.get("feedforward_modules") or ()
    return Ia3Settings(
        target_modules=targets.names_from_peft(config),
        feedforward_modules=(feedforward,) if isinstance(feedforward, str) else tuple(feedforward),
    )


METHOD = base.Method(
    attach=attach,
    set_strength=base.scaling(Ia3Linear),
    merge=base.folding(Ia3Linear),
    peft_config=peft_config,
    is_meant_by=lambda config: config["peft_type"] == "IA3",
    settings_of=settings_of,
)
