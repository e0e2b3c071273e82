"""Every method on the architectures people have: starts as it should, packs, merges, reaches the right modules."""

import pytest
from conftest import make_model
from method_kit import SETTINGS, assert_same, logits, randomize

from ftune import comparing
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.methods.targets import find_targets
from ftune.settings import METHOD_NAMES

ARCHITECTURES = {
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "phi": {},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "starcoder2": {"sliding_window": None},
}
NAMES = [
    "lora",
    "lora, pissa",
    "dora",
    "adalora",
    "vera",
    "ia3",
    "bitfit",
    "bottleneck, serial",
    "bottleneck, parallel",
    "prefix",
    "prompt",
    "prompt, deep",
]
# The linear layers of one transformer layer: of attention, of the MLP, and those that auto means for ia3.
GROUPS = {
    "qwen3": (4, 3, {"k_proj", "v_proj", "down_proj"}),
    "mistral": (4, 3, {"k_proj", "v_proj", "down_proj"}),
    "gemma": (4, 3, {"k_proj", "v_proj", "down_proj"}),
    "gemma2": (4, 3, {"k_proj", "v_proj", "down_proj"}),
    "gemma3_text": (4, 3, {"k_proj", "v_proj", "down_proj"}),
    "phi": (4, 2, {"k_proj", "v_proj", "fc2"}),
    "phi3": (2, 2, {"qkv_proj", "down_proj"}),
    "gpt_neox": (2, 2, {"query_key_value", "dense_4h_to_h"}),
    "olmo2": (4, 3, {"k_proj", "v_proj", "down_proj"}),
    "smollm3": (4, 3, {"k_proj", "v_proj", "down_proj"}),
    "granite": (4, 3, {"k_proj", "v_proj", "down_proj"}),
    "starcoder2": (4, 2, {"k_proj", "v_proj", "c_proj"}),
}


def make(kind):
    return make_model(kind, scale=2.0, **ARCHITECTURES[kind])


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_method_holds_on_this_architecture(kind, name):
    settings = SETTINGS[name]
    method, model = METHODS[settings.name], make(kind)
    if name == "bitfit" and not any(n.endswith("bias") for n, _ in model.named_parameters()):
        with pytest.raises(UserError, match="0 trainable parameters"):
            method.attach(model, settings)
        return
    base = logits(model)
    method.attach(model, settings)
    if not hasattr(settings, "virtual_tokens"):
        assert_same(logits(model), base, 0.0)
    tuned = logits(randomize(model))
    assert comparing.max_difference(tuned, base) > 1e-3
    comparing.prove_packing(model, "auto")
    if METHOD_NAMES[settings.name].abilities.merging:
        method.merge(model)
        assert_same(logits(model), tuned, comparing.tolerance(model, tuned))
        assert not trainable(model)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_named_groups_mean_the_right_modules(kind):
    """Case 55."""
    attention, mlp, scaled = GROUPS[kind]
    model = make(kind)
    assert len(find_targets(model, "attention", "all")) == 2 * attention
    assert len(find_targets(model, "mlp", "all")) == 2 * mlp
    assert len(find_targets(model, "all-linear", "all")) == 2 * (attention + mlp)
    METHODS["ia3"].attach(model, SETTINGS["ia3"])
    assert {name.rsplit(".", 2)[-2] for name in trainable(model)} == scaled


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_mixture_of_experts_is_adapted_beside_its_experts_or_refused(kind):
    """Case 56: fused experts are never left out in silence."""
    shape = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    for name in ("lora", "dora", "adalora", "vera"):
        with pytest.raises(UserError, match="experts are not adapted"):
            METHODS[name].attach(make_model(kind, **shape), SETTINGS[name])
    attention = SETTINGS["lora"].model_copy(update={"target_modules": "attention"})
    model = make_model(kind, **shape)
    METHODS["lora"].attach(model, attention)
    assert len(trainable(model)) == 2 * 8
    for name in ("bottleneck, serial", "prefix", "prompt"):
        model = make_model(kind, **shape)
        METHODS[SETTINGS[name].name].attach(model, SETTINGS[name])
        comparing.prove_packing(randomize(model), "auto")
