"""The table that `ftune methods` prints, cell by cell: each yes works, each no is refused by name."""

from contextlib import contextmanager

import pytest
import torch
from conftest import make_model, make_tokenizer, run, save_base, write_recipe
from method_kit import ROWS, SETTINGS, logits, randomize

from ftune import comparing, engine, quantized, recipe
from ftune import model as models
from ftune.artifacts import files
from ftune.artifacts.serving import obstacle_in_vllm
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.recipe import ModelSection
from ftune.run.inputs import check_abilities
from ftune.settings import METHOD_NAMES, DoraSettings, LinearProbeSettings, LoraSettings, QloraSettings
from ftune.settings.table import ABILITIES

PLAIN = {settings.name: settings for name, settings in SETTINGS.items() if "," not in name} | {
    "linear_probe": LinearProbeSettings(),
    "qlora": QloraSettings(rank=4),
    "bottleneck": SETTINGS["bottleneck, serial"],
}
"""Each method as it is by default, but small."""


def attached(name):
    """A Qwen2, which has biases, with the method on it as if trained."""
    model = make_model("qwen2")
    METHODS[name].attach(model, PLAIN[name])
    return randomize(model)


def is_refused(workspace, name, **sections):
    """Before anything is loaded, with the method's name in the text."""
    loaded = recipe.load(write_recipe(workspace, method={"name": name}, **sections))
    try:
        check_abilities(loaded)
    except UserError as error:
        return name in str(error)
    return False


def merging(workspace, name):
    refused = is_refused(workspace, name, output={"dir": "run", "save": "merged"})
    model = attached(name)
    tuned = logits(model)
    if refused:
        with pytest.raises(UserError, match=f"an adapter of {name} cannot be merged"):
            METHODS[name].merge(model)
        return False
    METHODS[name].merge(model)
    return comparing.max_difference(logits(model), tuned) <= 1e-5


def quantized_base(workspace, name):
    if is_refused(workspace, name, model={"base": "base", "quantization": "nf4"}):
        return False
    section = ModelSection(base=save_base(workspace / "quantized", "qwen2"), quantization="nf4")
    model = models.load_base(section, torch.float32, torch.device("cpu"))
    base = logits(model)
    METHODS[name].attach(model, PLAIN[name])
    return bool(list(quantized.layers(model))) and comparing.max_difference(logits(randomize(model)), base) > 1e-3


def checkpointing(workspace, name):
    """Without packing, which is the harder case for what travels in a cache."""
    if is_refused(
        workspace, name, training={"gradient_checkpointing": True}, data={"train": "train.jsonl", "packing": False}
    ):
        assert not is_refused(workspace, name, training={"gradient_checkpointing": True})
        return False
    found = []
    for is_checkpointed in (False, True):
        model = attached(name).train()
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(torch.tensor([ROWS[1]]), use_cache=False).logits.square().mean().backward()
        found.append({parameter: p.grad for parameter, p in trainable(model).items()})
    assert all(float(gradient.abs().sum()) > 0 for gradient in found[0].values())
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
    return True


def packing(workspace, name):
    model = attached(name)
    comparing.prove_packing(model, "auto")
    return True


def sharding(workspace, name):
    """The gradients of a model held in parts, here all of them in one process, are those of the whole model."""
    if is_refused(workspace, name, training={"parallel": "fsdp"}):
        return False
    found = []
    with only_process():
        for is_sharded in (False, True):
            model = attached(name)
            if is_sharded:
                engine.shard(model, torch.device("cpu"))
            model(torch.tensor([ROWS[1]]), use_cache=False).logits.square().mean().backward()
            found.append({parameter: engine.whole(p.grad) for parameter, p in trainable(model).items()})
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
    return True


@contextmanager
def only_process():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def saved(workspace, name):
    """The adapter_config.json that is written beside the weights; None where there is none."""
    if METHODS[name].trains_base:
        return None
    card = {"method": PLAIN[name].model_dump(mode="json")}
    files.save_adapter(workspace / "a", attached(name), make_tokenizer(), PLAIN[name], "base", card)
    assert files.read_settings(workspace / "a").name in (name, "lora")
    return files.read_adapter_config(workspace / "a") or None


def peft(workspace, name):
    return saved(workspace, name) is not None


def vllm(workspace, name):
    return METHODS[name].trains_base or not obstacle_in_vllm(saved(workspace, name))


CELLS = {"merging": merging, "quantized": quantized_base, "checkpointing": checkpointing, "packing": packing}
CELLS |= {"sharding": sharding, "peft": peft, "vllm": vllm}


@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_cell_is_what_happens(workspace, name, ability):
    assert CELLS[ability](workspace, name) == getattr(METHOD_NAMES[name].abilities, ability)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (LoraSettings(), ""),
        (LoraSettings(rank_stabilized=True), ""),
        (LoraSettings(init="pissa", rank=4), ""),
        (LoraSettings(target_modules=["q_proj"], layers=[1]), ""),
        (LoraSettings(modules_to_save=["lm_head"]), "trained in full (lm_head)"),
        (LoraSettings(rank_pattern={"q_proj": 2}), "does not read rank_pattern"),
        (LoraSettings(alpha_pattern={"q_proj": 2}), "does not read alpha_pattern"),
        (DoraSettings(), "magnitudes"),
    ],
)
def test_what_vllm_refuses_or_would_scale_wrongly_is_known(settings, told):
    model = make_model()
    METHODS[settings.name].attach(model, settings)
    obstacle = obstacle_in_vllm(files.peft_config(model, settings, "base"))
    assert (told in obstacle) if told else obstacle == ""


def test_run_whose_adapter_vllm_cannot_serve_says_so(workspace, capfd):
    run(workspace, method={"name": "lora", "rank": 4, "rank_pattern": {"q_proj": 2}})
    assert "vLLM cannot serve this adapter as it is" in " ".join(capfd.readouterr().err.split())
    run(workspace, overwrite=True)
    assert "vLLM" not in capfd.readouterr().err
