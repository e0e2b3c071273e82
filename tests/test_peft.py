"""PEFT as judge: adapters go both ways with the same logits, in fresh processes that know the other side not at all."""

import copy
import json
from itertools import product

import pytest
import torch
from conftest import KINDS, make_model, make_tokenizer, save_base
from elsewhere import ask
from method_kit import ROWS, SETTINGS, assert_same, logits, randomize
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftune import comparing
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


def as_if_pruned(model):
    """AdaLoRA's layers keep different ranks."""
    for k, layer in enumerate(module for module in model.modules() if isinstance(module, AdaloraLinear)):
        layer.keep(torch.arange(len(layer.kept)) < 1 + k % 4)


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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of every architecture, as folders."""
    place = tmp_path_factory.mktemp("interchange")
    for kind in KINDS:
        save_base(place / kind, kind)
    return place


def saved(place, kind, name):
    """Our adapter as if trained, written to a folder: the job of judging it, and its live logits."""
    settings, folder = real_name(OURS[name], kind), place / f"{kind} {name}"
    model = AutoModelForCausalLM.from_pretrained(place / kind)
    METHODS[settings.name].attach(model, settings)
    randomize(model)
    as_if_pruned(model)
    files.save_adapter(folder / "ours", model, make_tokenizer(), settings, str(place / kind), {})
    return {"base": place / kind, "adapter": folder / "ours", "theirs": folder / "theirs"}, torch.cat(logits(model))


@pytest.fixture(scope="module")
def judged(folders):
    """Live logits of our adapters, and what PEFT alone and ftune alone find in fresh processes."""
    jobs, live = [], {}
    for kind, name in product(KINDS, OURS):
        job, live[f"{kind} {name}"] = saved(folders, kind, name)
        jobs.append({**job, "name": f"{kind} {name}", "rows": ROWS})
    for name, config in THEIRS.items():
        config = copy.deepcopy(config)
        config.task_type = TaskType.CAUSAL_LM
        config.save_pretrained(folders / f"config of {name}")
        paths = {"base": folders / "llama", "config": folders / f"config of {name}", "theirs": folders / f"by {name}"}
        jobs.append({**paths, "name": f"made by PEFT, {name}", "rows": ROWS})
    return live, ask("peft", jobs, folders), ask("ftune", jobs, folders)


def without_prompt(rows, name):
    """PEFT gives the logits of a prompt's own tokens too: three in front of each row."""
    if name != "prompt":
        return rows
    lengths = [3 + len(row) for row in ROWS]
    return torch.cat([part[3:] for part in rows.split(lengths)])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_our_adapter_gives_the_same_logits_in_peft(judged, kind, name):
    """Cases 58, 62, 64, 65 and 66, in fresh processes: live == PEFT == ftune."""
    live, peft, ftune = judged
    job = f"{kind} {name}"
    assert_same([without_prompt(peft[f"{job}: ours"], name)], [live[job]])
    assert_same([ftune[f"{job}: ours"]], [live[job]])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapter_gives_the_same_logits_in_ftune(judged, kind, name):
    """PEFT trains on from our adapter, as it were, and saves; its own file gives its own logits in ftune."""
    live, peft, ftune = judged
    theirs = without_prompt(peft[f"{kind} {name}: theirs"], name)
    assert_same([ftune[f"{kind} {name}: theirs"]], [theirs])
    assert comparing.max_difference([theirs], [live[f"{kind} {name}"]]) > 1e-4


@pytest.mark.parametrize("name", THEIRS)
def test_adapter_made_by_peft_gives_the_same_logits_in_ftune(judged, name):
    _, peft, ftune = judged
    job = f"made by PEFT, {name}: theirs"
    assert_same([ftune[job]], [without_prompt(peft[job], name)])


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
