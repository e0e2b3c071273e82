"""One contract over every method and architecture, and PEFT as judge. Numbers: trust cases."""

import json

import pytest
import torch
from conftest import SHAPES, make_model, make_tokenizer, save_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftune import model as models
from ftune.artifacts import files
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.base import PREFIX, decoder_layers, trainable
from ftune.methods.targets import find_targets
from ftune.recipe import ModelSection
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

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own

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
    "bottleneck, serial": BottleneckSettings(size=4),
    "bottleneck, parallel": BottleneckSettings(size=4, placement="parallel", activation="gelu", layers="last-half"),
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
ADAPTERS = [name for name in SETTINGS if name.startswith("lora")]
ROWS = models.proof_rows(96, 512)


def randomize(model):
    """As if trained: every trainable parameter moves."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model):
    return models.logits_of(model, ROWS)


def assert_same(ours, reference, within=1e-5):
    assert models.max_difference(ours, reference) <= within


@pytest.fixture(params=SHAPES)
def kind(request):
    return request.param


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture
def method(settings):
    return METHODS[settings.name]


def test_starts_equal_to_the_base(kind, method, settings):
    base = logits(make_model(kind))
    model = make_model(kind)
    method.attach(model, settings)
    assert_same(logits(model), base, 0.0)


def test_trains_what_it_says_and_leaves_the_rest_bit_identical(kind, method, settings):
    """Case 57: changed == trainable, after a real optimizer step on every parameter that has a gradient."""
    model = make_model(kind)
    of_the_base = {id(parameter) for parameter in model.parameters()}
    method.attach(model, settings)
    if not method.trains_base:
        assert not any(id(parameter) in of_the_base for parameter in trainable(model).values())
    randomize(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.tensor([ROWS[1]])).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainable(model))
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


def test_merge_gives_the_same_logits(kind, method, settings):
    """Cases 62 and 72."""
    model = make_model(kind)
    base = logits(model)
    method.attach(model, settings)
    tuned = logits(randomize(model))
    assert models.max_difference(tuned, base) > 1e-3
    method.merge(model)
    assert_same(logits(model), tuned)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_works_on_the_meta_device(kind, method, settings):
    with torch.device("meta"):
        model = make_model(kind)
    method.attach(model, settings)
    real = make_model(kind)
    method.attach(real, settings)
    assert {n: p.shape for n, p in trainable(model).items()} == {n: p.shape for n, p in trainable(real).items()}
    assert all(p.is_meta for p in model.parameters())


def test_gradients_are_the_same_under_gradient_checkpointing(kind, method, settings):
    """Case 43: a frozen base, and still a gradient for every trainable parameter."""

    def gradients(checkpointing):
        model = make_model(
            kind, **({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {})
        )
        method.attach(model, settings)
        randomize(model).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(torch.tensor([ROWS[1]]), use_cache=False).logits.square().mean().backward()
        return {name: p.grad for name, p in trainable(model).items()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(float(g.abs().sum()) > 0 for g in plain.values())
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_generates_with_a_cache_as_without(kind, method, settings):
    model = make_model(kind)
    method.attach(model, settings)
    randomize(model)
    prompt = torch.tensor([ROWS[0]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (model.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)


@pytest.fixture(params=ADAPTERS)
def adapter(request, kind, tmp_path):
    """A trained adapter, saved, beside its base: (base folder, adapter folder, live logits)."""
    settings = SETTINGS[request.param]
    base = save_base(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(base)
    METHODS[settings.name].attach(model, settings)
    files.save_adapter(tmp_path / "adapter", randomize(model), make_tokenizer(), settings, str(base), {})
    assert {PREFIX + name for name in trainable(model)} == set(load_file(tmp_path / "adapter" / files.ADAPTER_WEIGHTS))
    return base, tmp_path / "adapter", logits(model)


def test_saved_adapter_reloads_to_the_same_logits(adapter):
    base, path, live = adapter
    model = models.load_base(ModelSection(base=base), torch.float32, torch.device("cpu"))
    files.load_adapter(model, path)
    assert_same(logits(model), live, 0.0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_gives_the_same_logits_from_our_adapter(adapter):
    """Cases 62 and 65."""
    base, path, live = adapter
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    assert_same(logits(theirs.eval()), live)


PEFT_CONFIGS = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "regular expression": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    "rank-stabilized": {"target_modules": ["o_proj"], "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_peft_adapter_gives_the_same_logits_in_ftune(tmp_path, name):
    base = save_base(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=False, **PEFT_CONFIGS[name])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = models.load_base(ModelSection(base=base), torch.float32, torch.device("cpu"))
    files.load_adapter(model, tmp_path / "adapter")
    assert_same(logits(model), logits(theirs))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: {k.replace("layers.0.self_attn.q", "layers.0.self_attn.x"): v for k, v in t.items()},
            "missing.*unexpected",
        ),
        (lambda t: {f"x.{k}": v for k, v in t.items()}, "missing.*unexpected"),
        (lambda t: {**t, "base_model.model.extra": torch.zeros(1)}, "unexpected: extra"),
        (lambda t: dict(list(t.items())[1:]), "missing"),
        (lambda t: {k: v.T.contiguous() if "lora_A" in k else v for k, v in t.items()}, "of another shape"),
    ],
)
def test_adapter_whose_tensors_do_not_fit_is_refused(tmp_path, change, told):
    """Case 61: never a partly loaded adapter."""
    from safetensors.torch import save_file

    base = save_base(tmp_path / "base")
    model, settings = make_model(), SETTINGS["lora"]
    METHODS["lora"].attach(model, settings)
    files.save_adapter(tmp_path / "a", model, make_tokenizer(), settings, "base", {})
    weights = tmp_path / "a" / files.ADAPTER_WEIGHTS
    save_file(change(load_file(weights)), weights)
    fresh = models.load_base(ModelSection(base=base), torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=told):
        files.load_adapter(fresh, tmp_path / "a")


def test_adapter_with_what_we_cannot_honour_is_refused(tmp_path):
    settings = SETTINGS["lora"]
    model = make_model()
    METHODS["lora"].attach(model, settings)
    files.save_adapter(tmp_path / "a", model, make_tokenizer(), settings, "base", {})
    config = json.loads((tmp_path / "a" / files.ADAPTER_CONFIG).read_text())
    for change, told in [({"use_dora": True}, "DoRA"), ({"bias": "all"}, "bias"), ({"peft_type": "VERA"}, "VERA")]:
        (tmp_path / "a" / files.ADAPTER_CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=told):
            files.load_adapter(make_model(), tmp_path / "a")


@pytest.mark.parametrize(
    ("rank", "alpha", "rank_stabilized", "scale"), [(16, 16, False, 1.0), (16, 16, True, 4.0), (16, 32, False, 2.0)]
)
def test_merged_update_is_scale_times_b_times_a(rank, alpha, rank_stabilized, scale):
    """Case 62."""
    model = make_model()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    settings = LoraSettings(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    METHODS["lora"].attach(model, settings)
    layer = randomize(model).model.layers[0].mlp.up_proj
    expected = scale * layer.lora_B.weight @ layer.lora_A.weight
    assert (tuple(layer.lora_A.weight.shape), tuple(layer.lora_B.weight.shape)) == ((rank, 64), (128, rank))
    METHODS["lora"].merge(model)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight - before, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "count"), [("all-linear", 14), ("attention", 8), ("mlp", 6)])
def test_named_groups_mean_the_layers_modules_and_never_the_head(name, count):
    """Case 55."""
    targets = find_targets(make_model(), name, "all")
    assert len(targets) == count
    assert not any("lm_head" in path or "embed" in path for path in targets)
    assert len(find_targets(make_model(), name, "last-half")) == count // 2


def test_pattern_that_matches_nothing_is_named():
    """Case 54."""
    with pytest.raises(UserError, match="'typo_proj' matches no linear module") as caught:
        find_targets(make_model(), ["q_proj", "typo_proj"], "all")
    assert "q_proj" in caught.value.problems[0].hint
    assert len(find_targets(make_model(), ["q_proj"], "all")) == 2
    assert len(find_targets(make_model(), [r".*layers\.1.*(q|k)_proj"], "all")) == 2


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


def test_layers_are_found_on_every_architecture(kind):
    path, layers = decoder_layers(make_model(kind))
    assert len(layers) == 2
    assert path in ("model.layers", "transformer.h")
