"""PEFT as judge: adapters go both ways with the same logits."""

import copy
import json
import re

import pytest
import torch
from conftest import KINDS, make_model, make_tokenizer, save_base
from method_kit import SETTINGS, assert_same, logits, randomize
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftune import model as models
from ftune.artifacts import files
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.adalora import AdaloraLinear
from ftune.recipe import ModelSection
from ftune.settings import (
    AdaloraSettings,
    DoraSettings,
    Ia3Settings,
    LoraSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
    VeraSettings,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own


OURS = {
    "lora": LoraSettings(rank=4, alpha=8),
    "lora, rank-stabilized": LoraSettings(rank=4, alpha=8, rank_stabilized=True),
    "lora, patterns": LoraSettings(rank=4, alpha=8, rank_pattern={".*mlp.*": 2}, alpha_pattern={"layers.0.*|h.0.*": 3}),
    "lora, pissa": LoraSettings(rank=4, alpha=8, init="pissa", rank_pattern={".*mlp.*": 2}),
    "lora, olora": LoraSettings(rank=4, alpha=8, init="olora", rank_stabilized=True),
    "lora, head saved": LoraSettings(rank=4, modules_to_save=["lm_head"]),
    "lora, embeddings saved": LoraSettings(rank=4, modules_to_save=["embed_tokens|wte"]),
    "dora": DoraSettings(rank=4, alpha=8, rank_pattern={".*mlp.*": 2}),
    "dora, head saved": DoraSettings(rank=4, modules_to_save=["lm_head"]),
    "adalora": AdaloraSettings(initial_rank=6, target_rank=2, alpha=8),
    "vera": VeraSettings(rank=8),
    "vera, attention": VeraSettings(rank=8, target_modules="attention", layers=[1]),
    "ia3": Ia3Settings(),
    "prefix": PrefixTuningSettings(virtual_tokens=3),
    "prefix, projection": PrefixTuningSettings(virtual_tokens=3, projection=True),
    "prompt": PromptTuningSettings(virtual_tokens=3),
}
"""What PEFT has too."""


def real_name(settings, kind):
    """`embed_tokens|wte` as this architecture calls it."""
    names = getattr(settings, "modules_to_save", ())
    if not names or "|" not in names[0]:
        return settings
    return settings.model_copy(update={"modules_to_save": (names[0].split("|")["gpt2" in kind],)})


def without_prompt(found, settings):
    """PEFT gives the logits of a prompt's own tokens too."""
    return [rows[3:] for rows in found] if settings.name == "prompt_tuning" else found


def as_if_pruned(model):
    """AdaLoRA's layers keep different ranks."""
    for k, layer in enumerate(module for module in model.modules() if isinstance(module, AdaloraLinear)):
        layer.keep(torch.arange(len(layer.kept)) < 1 + k % 4)


@pytest.fixture(params=[(kind, name) for kind in KINDS for name in OURS], ids=" ".join)
def trained(request, tmp_path):
    """(settings, base folder, adapter folder, live logits) of a trained adapter that was saved."""
    kind, name = request.param
    settings = real_name(OURS[name], kind)
    base = save_base(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(base)
    METHODS[settings.name].attach(model, settings)
    randomize(model)
    as_if_pruned(model)
    files.save_adapter(tmp_path / "adapter", model, make_tokenizer(), settings, str(base), {})
    return settings, base, tmp_path / "adapter", logits(model)


WARNINGS_OF_PEFT = ("ignore::UserWarning", "ignore:The following rank_pattern keys:RuntimeWarning")


@pytest.mark.filterwarnings(*WARNINGS_OF_PEFT)
def test_our_adapter_gives_the_same_logits_in_peft(trained):
    """Cases 58, 62, 64, 65 and 66."""
    settings, base, adapter, live = trained
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert_same(without_prompt(logits(theirs), settings), live)


@pytest.mark.filterwarnings(*WARNINGS_OF_PEFT)
def test_peft_adapter_gives_the_same_logits_in_ftune(trained, tmp_path):
    """PEFT trains on from our adapter, as it were, and saves; its own file gives its own logits in ftune."""
    settings, base, adapter, _ = trained
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if re.search("lora_|vera_|ia3_|prompt_encoder|modules_to_save", name) and "ranknum" not in name:
                parameter.mul_(1.1)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = models.load_base(ModelSection(base=base), torch.float32, torch.device("cpu"))
    files.load_adapter(ours, tmp_path / "theirs")
    assert_same(logits(ours), without_prompt(logits(theirs), settings))


THEIRS = {
    "all-linear": LoraConfig(target_modules="all-linear"),
    "names": LoraConfig(target_modules=["q_proj", "down_proj"]),
    "regular expression": LoraConfig(target_modules=r".*layers\.1\..*(q|v)_proj"),
    "rank-stabilized": LoraConfig(target_modules=["o_proj"], use_rslora=True),
    "patterns": LoraConfig(
        target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}
    ),
    "dora": LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["lm_head"]),
    "embeddings": LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "adalora": AdaLoraConfig(target_modules=["q_proj", "down_proj"], init_r=5, target_r=2, total_step=10, lora_alpha=8),
    "vera": VeraConfig(target_modules=["q_proj", "v_proj"], r=8),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prefix, projection": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=64),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", THEIRS)
def test_adapter_made_by_peft_gives_the_same_logits_in_ftune(tmp_path, name):
    base = save_base(tmp_path / "base")
    config = copy.deepcopy(THEIRS[name])
    config.task_type = TaskType.CAUSAL_LM
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    model = models.load_base(ModelSection(base=base), torch.float32, torch.device("cpu"))
    files.load_adapter(model, tmp_path / "adapter")
    assert_same(logits(model), [rows[3:] for rows in logits(theirs)] if name == "prompt" else logits(theirs))


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
    for change, told in [
        ({"lora_bias": True}, "LoRA biases"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "OFT"}, "OFT"),
    ]:
        (tmp_path / "a" / files.ADAPTER_CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=told):
            files.load_adapter(make_model(), tmp_path / "a")
