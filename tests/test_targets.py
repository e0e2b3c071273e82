"""Which modules a recipe's target_modules and layers mean, on any architecture."""

import re

import pytest
import torch
from conftest import SHAPES, make_model
from pydantic import ValidationError

from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.methods.targets import find_targets
from ftune.model import decoder_layers
from ftune.settings import DoraSettings, Ia3Settings, LoraSettings


@pytest.mark.parametrize(("name", "count"), [("all-linear", 14), ("attention", 8), ("mlp", 6)])
def test_named_groups_mean_the_layers_modules_and_never_the_head(name, count):
    """Case 55."""
    targets = find_targets(make_model(), name, "all")
    assert len(targets) == count
    assert not any("lm_head" in path or "embed" in path for path in targets)
    assert len(find_targets(make_model(), name, "last-half")) == count // 2


@pytest.mark.parametrize(
    ("patterns", "in_text", "in_tower"),
    [
        ("all-linear", 14, 0),
        ("attention", 8, 0),
        (["q_proj", "v_proj"], 4, 0),
        (["self_attn.q_proj"], 2, 0),
        ([r"model\.layers\..*q_proj"], 2, 0),
        ([r"model\.vision_tower\..*q_proj", "q_proj"], 2, 2),
        (["model.vision_tower.0.q_proj"], 0, 1),
    ],
)
def test_another_tower_is_adapted_only_where_it_is_asked_for(patterns, in_text, in_tower):
    """Case 55: modules of the same names, beside the text model's layers."""
    model = make_model()
    model.model.vision_tower = torch.nn.ModuleList(
        torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64), "proj": torch.nn.Linear(64, 64)}) for _ in range(2)
    )
    targets = find_targets(model, patterns, "all")
    assert sum("vision_tower" in path for path in targets) == in_tower
    assert len(targets) == in_text + in_tower
    if not in_tower:
        METHODS["lora"].attach(model, LoraSettings(target_modules=patterns))
        assert not any("vision_tower" in name for name in trainable(model))


def test_pattern_that_matches_nothing_is_named():
    """Case 54."""
    with pytest.raises(UserError, match="'typo_proj' matches no linear module") as caught:
        find_targets(make_model(), ["q_proj", "typo_proj"], "all")
    assert "q_proj" in caught.value.problems[0].hint
    assert len(find_targets(make_model(), ["q_proj"], "all")) == 2
    assert len(find_targets(make_model(), [r".*layers\.1.*(q|k)_proj"], "all")) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (LoraSettings(rank_pattern={"typo_proj": 2}), r"'typo_proj' matches no adapted module .*method\.rank_pattern"),
        (LoraSettings(target_modules=["q_proj"], alpha_pattern={"v_proj": 2}), "'v_proj' matches no adapted module"),
        (DoraSettings(layers=[0], rank_pattern={r".*layers\.1.*": 2}), "matches no adapted module"),
        (Ia3Settings(target_modules=["k_proj"], feedforward_modules=["down_proj"]), "'down_proj' matches no adapted"),
    ],
)
def test_pattern_that_would_have_no_effect_is_named(settings, told):
    """Case 54, also of the patterns beside target_modules."""
    with pytest.raises(UserError) as caught:
        METHODS[settings.name].attach(make_model(), settings)
    [problem] = caught.value.problems
    assert re.search(told, f"{problem.what} {problem.where}")


def test_feedforward_modules_need_named_targets():
    with pytest.raises(ValidationError, match=r"some of method\.target_modules"):
        Ia3Settings(feedforward_modules=["down_proj"])


def test_layer_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="layer 7 does not exist"):
        find_targets(make_model(), "all-linear", [0, 7])


def test_fused_experts_are_refused_by_name():
    """Case 56."""
    mixture = make_model("qwen3_moe", head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    with pytest.raises(UserError, match="experts are not adapted"):
        find_targets(mixture, "all-linear", "all")
    assert len(find_targets(mixture, "attention", "all")) == 8


def test_tied_head_is_refused():
    """Case 60."""
    with pytest.raises(UserError, match="shares its weight"):
        find_targets(make_model(tie_word_embeddings=True), ["lm_head"], "all")


@pytest.mark.parametrize("kind", SHAPES)
def test_layers_are_found_on_every_architecture(kind):
    path, layers = decoder_layers(make_model(kind))
    assert len(layers) == 2
    assert path in ("model.layers", "transformer.h")
