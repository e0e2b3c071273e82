"""Every method with settings that differ from its defaults, and what the tests of methods share."""

import torch
from conftest import KINDS

from ftune import comparing
from ftune.methods.base import trainable
from ftune.settings import (
    AdaloraSettings,
    BitfitSettings,
    BottleneckSettings,
    DoraSettings,
    FullSettings,
    Ia3Settings,
    LoraSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
    VeraSettings,
)

SETTINGS = {
    "full": FullSettings(),
    "full, last half": FullSettings(layers="last-half"),
    "dora": DoraSettings(rank=4, alpha=8, dropout=0.0),
    "dora, patterns": DoraSettings(rank=4, alpha=8, dropout=0.0, rank_pattern={".*mlp.*": 2}, layers="last-half"),
    "adalora": AdaloraSettings(initial_rank=4, target_rank=2, alpha=8),
    "vera": VeraSettings(rank=8),
    "vera, attention": VeraSettings(rank=8, target_modules="attention", layers=[1]),
    "ia3": Ia3Settings(),
    "bitfit": BitfitSettings(),
    "bottleneck, serial": BottleneckSettings(size=16),
    "bottleneck, parallel": BottleneckSettings(size=16, placement="parallel", activation="gelu", layers="last-half"),
    "prefix": PrefixTuningSettings(virtual_tokens=3),
    "prefix, projection": PrefixTuningSettings(virtual_tokens=3, projection=True),
    "prompt": PromptTuningSettings(virtual_tokens=3),
    "prompt, deep": PromptTuningSettings(virtual_tokens=3, depth="deep"),
    "lora, pissa": LoraSettings(rank=4, alpha=8, init="pissa"),
    "lora, olora, rank-stabilized": LoraSettings(rank=4, alpha=8, init="olora", rank_stabilized=True),
    "lora, plus": LoraSettings(rank=4, alpha=8, learning_rate_ratio=16.0),
    "lora": LoraSettings(rank=4, alpha=8),
    "lora, rank-stabilized": LoraSettings(rank=4, alpha=8, rank_stabilized=True),
    "lora, attention of one layer": LoraSettings(rank=4, target_modules="attention", layers=[1]),
    "lora, patterns": LoraSettings(rank=4, alpha=8, rank_pattern={".*mlp.*": 2}, alpha_pattern={"layers.0.*|h.0.*": 3}),
}
CONTRACT = [(kind, name) for kind in KINDS for name in SETTINGS if not ("llama" in kind and name == "bitfit")]
"""Llama has no biases to train."""
ROWS = comparing.proof_rows(96, 512)


def randomize(model):
    """As if trained: every trainable parameter moves."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model):
    return comparing.logits_of(model, ROWS)


def assert_same(ours, reference, within=1e-5):
    assert comparing.max_difference(ours, reference) <= within
