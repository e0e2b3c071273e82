"""Every method through whole runs: proved, resumable to the byte, continued from an adapter. Numbers: trust cases."""

import copy

import pytest
import torch
from conftest import CHAT_ROWS, adapter_bytes, metrics, run, save_base, write_recipe, write_rows
from method_kit import logits, randomize
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from test_run_resume import Killed, kill_after
from transformers import AutoModelForCausalLM

from ftune import comparing, folder, recipe
from ftune import model as models
from ftune.artifacts import files
from ftune.errors import UserError
from ftune.recipe import ModelSection
from ftune.run.inputs import check_abilities
from ftune.settings import METHOD_NAMES

METHODS = {
    "lora, pissa": {"name": "lora", "rank": 4, "init": "pissa"},
    "lora, plus": {"name": "lora", "rank": 4, "learning_rate_ratio": 4},
    "lora, head saved": {"name": "lora", "rank": 4, "modules_to_save": ["lm_head"]},
    "lora, embeddings": {"name": "lora", "rank": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"name": "dora", "rank": 4},
    "adalora": {"name": "adalora", "initial_rank": 4, "target_rank": 2},
    "vera": {"name": "vera", "rank": 16},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "bottleneck": {"name": "bottleneck", "size": 8},
    "prefix_tuning": {"name": "prefix_tuning", "virtual_tokens": 3, "projection": True},
    "prompt_tuning": {"name": "prompt_tuning", "virtual_tokens": 3, "init_text": "say it again"},
    "prompt_tuning, deep": {"name": "prompt_tuning", "virtual_tokens": 3, "depth": "deep"},
}
TRAINING = {"max_steps": 6, "batch_size": 4, "optimizer": "adamw", "checkpoint_every": 2, "schedule": "cosine"}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def place(workspace, method):
    """A base that has biases where the method needs them."""
    if method["name"] == "bitfit":
        save_base(workspace / "base", "qwen2")
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:3])
    return workspace


def test_run_is_proved_and_resumes_to_the_same_bytes(place, method, monkeypatch):
    """Cases 57, 58, 61, 67 and 80: changed == trainable, every tensor loaded, reload equal; and after a kill too."""
    sections = {"method": method, "training": TRAINING, "data": {"train": "train.jsonl", "test": "test.jsonl"}}
    report, clean = run(place, output={"dir": "clean"}, **sections)
    artefact, manifest = report["artefact"], folder.read_json(clean / "manifest.json")
    assert artefact["adapter_live"]
    assert artefact["reload_max_diff"] <= artefact["tolerance"]
    assert (artefact["merged_max_diff"] is not None) == METHOD_NAMES[method["name"]].abilities.merging
    pruned = {name for name in manifest["trainable"] if name.endswith("lora_E")}  # they end where they began, at 0
    assert set(manifest["trainable"]) - pruned <= set(manifest["changed"]) <= set(manifest["trainable"])
    assert all(line["loss"] < 20 for line in metrics(clean))
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run(place, output={"dir": "killed"}, **sections)
    _, killed = run(place, resume=True, output={"dir": "killed"}, **sections)
    assert adapter_bytes(killed) == adapter_bytes(clean)


def test_training_goes_on_from_an_adapter(place, method):
    """`start_from`: the first loss is the one the adapter had reached, and another shape is refused."""
    if method["name"] == "lora" and "init" in method:
        pytest.skip("what was saved is a plain LoRA of twice the rank")
    if method.get("projection"):
        _, first = run(place, method=method, training=TRAINING)
        with pytest.raises(UserError, match="holds what its projection made"):
            run(place, method={**method, "start_from": str(first / "adapter")}, output={"dir": "b"})
        return
    one = {**TRAINING, "max_steps": 1, "batch_size": 24, "learning_rate": 1e-2}
    _, first = run(place, method={**method, "dropout": 0.0} if "rank" in method else method, training=one)
    before = load_file(first / "adapter" / files.ADAPTER_WEIGHTS)
    zero = {**one, "learning_rate": 1e-30}
    again = {**method, "start_from": str(first / "adapter")}
    if again.pop("init_text", None):
        with pytest.raises(UserError, match=r"leave method\.init_text out"):
            run(place, method={**method, "start_from": str(first / "adapter")}, output={"dir": "b"})
    _, second = run(place, method=again, training=zero, output={"dir": "second"})
    after = load_file(second / "adapter" / files.ADAPTER_WEIGHTS)
    assert before.keys() == after.keys()
    if method["name"] != "adalora":  # which prunes at its last allocation
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_adapter_of_another_method_is_no_start(workspace):
    _, first = run(workspace)
    with pytest.raises(UserError, match="is an adapter of lora"):
        run(workspace, method={"name": "dora", "rank": 4, "start_from": str(first / "adapter")}, output={"dir": "b"})
    with pytest.raises(UserError, match=r"alpha of model\S*q_proj: 8\.0 there, 32\.0 here"):
        run(workspace, method={"name": "lora", "rank": 4, "start_from": str(first / "adapter")}, output={"dir": "b"})
    other = {"name": "lora", "rank": 8, "alpha": 8, "start_from": str(first / "adapter")}
    with pytest.raises(UserError, match="of another shape"):
        run(workspace, method=other, output={"dir": "b"})
    save_base(workspace / "other", seed=1)
    same = {"name": "lora", "rank": 4, "alpha": 8, "start_from": str(first / "adapter")}
    with pytest.raises(UserError, match=r"base fingerprint differs: model\.safetensors"):
        run(workspace, model={"base": "other"}, method=same, output={"dir": "b"})
    for key, told in [
        ({"init": "pissa"}, r"leave method\.init out"),
        ({"alpha_pattern": {"v_proj": 3}}, r"v_proj: 8\.0 there, 3\.0 here"),
    ]:
        again = {"name": "lora", "rank": 4, "alpha": 8, "start_from": str(first / "adapter"), **key}
        with pytest.raises(UserError, match=told):
            run(workspace, method=again, output={"dir": "b"})
    assert not (workspace / "b").exists()


BY_PEFT = {
    "lora": (LoraConfig(target_modules="all-linear", r=4, lora_alpha=8), {"rank": 4, "alpha": 8}),
    "lora, rank-stabilized": (
        LoraConfig(target_modules=["q_proj", "o_proj"], r=4, lora_alpha=8, use_rslora=True),
        {"rank": 4, "alpha": 8, "rank_stabilized": True, "target_modules": ["q_proj", "o_proj"]},
    ),
    "lora, patterns and head": (
        LoraConfig(
            target_modules="all-linear", r=4, lora_alpha=8, modules_to_save=["lm_head"],
            rank_pattern={"q_proj": 2}, alpha_pattern={".*mlp.*": 3},
        ),
        {
            "rank": 4, "alpha": 8, "modules_to_save": ["lm_head"],
            "rank_pattern": {".*q_proj": 2}, "alpha_pattern": {"layers.*mlp.*": 3},
        },
    ),
    "dora": (LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, use_dora=True), {"rank": 4, "alpha": 8}),
    "adalora": (
        AdaLoraConfig(target_modules=["q_proj", "v_proj"], init_r=4, target_r=2, total_step=9, lora_alpha=8),
        {"initial_rank": 4, "target_rank": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
    "vera": (VeraConfig(target_modules=["q_proj", "v_proj"], r=8), {"rank": 8, "target_modules": ["q_proj", "v_proj"]}),
    "ia3": (
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "prefix_tuning": (PrefixTuningConfig(num_virtual_tokens=3), {"virtual_tokens": 3}),
    "prompt_tuning": (PromptTuningConfig(num_virtual_tokens=3), {"virtual_tokens": 3}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore::UserWarning")  # PEFT's own
@pytest.mark.parametrize("name", BY_PEFT)
def test_training_goes_on_from_an_adapter_that_peft_made(workspace, name):
    """At a rate of nothing it stays what PEFT made, logits and all; at a real one it moves and its loss falls."""
    config, settings = BY_PEFT[name]
    config = copy.deepcopy(config)
    config.task_type = TaskType.CAUSAL_LM
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(workspace / "base"), config)
    randomize(theirs).eval().save_pretrained(workspace / "theirs")
    method = {"name": name.partition(",")[0], "start_from": str(workspace / "theirs"), **settings}
    if "rank" in settings or "initial_rank" in settings:
        method["dropout"] = 0.0
    once = {"max_steps": 1, "batch_size": 24, "learning_rate": 1e-30}
    _, still = run(workspace, method=method, training=once, output={"dir": "still"})
    wanted = [rows[3:] for rows in logits(theirs)] if name == "prompt_tuning" else logits(theirs)
    found = models.load_base(ModelSection(base=workspace / "base"), torch.float32, torch.device("cpu"))
    files.load_adapter(found, still / "adapter")
    if name != "adalora":  # which prunes at its last allocation
        assert comparing.max_difference(logits(found), wanted) <= 1e-5
    more = {"max_steps": 6, "batch_size": 24, "learning_rate": 1e-2, "optimizer": "adamw"}
    _, further = run(workspace, method=method, training=more, output={"dir": "further"})
    losses = [line["loss"] for line in metrics(further)]
    assert losses[0] == pytest.approx(metrics(still)[0]["loss"], rel=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": {"name": "bottleneck"}, "output": {"save": "merged"}}, "an adapter of bottleneck cannot be merged"),
        ({"method": {"name": "prefix_tuning"}, "output": {"save": "both"}}, "an adapter of prefix_tuning cannot be"),
        (
            {
                "method": {"name": "prefix_tuning"},
                "data": {"train": "train.jsonl", "packing": False},
                "training": {"gradient_checkpointing": True},
            },
            "loses its prefix",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(workspace, sections, told):
    with pytest.raises(UserError, match=told):
        check_abilities(recipe.load(write_recipe(workspace, **sections)))


def test_rows_must_leave_room_for_virtual_tokens(workspace):
    """Case 67: a row of the model's whole context has no place for a prompt."""
    write_rows(workspace / "train.jsonl", [{"prompt": "a" * 490, "completion": "b"}])
    long = {"train": "train.jsonl", "max_length": 512}
    run(workspace, data=long)
    with pytest.raises(UserError, match="tokens, more than the 492"):
        run(workspace, data=long, method={"name": "prompt_tuning"}, output={"dir": "b"})


def test_b_learns_at_its_own_rate(workspace):
    """LoRA+: after one plain step from 0, B is as many times larger as its learning rate is."""
    one = {"max_steps": 1, "batch_size": 24, "optimizer": "sgd", "max_grad_norm": 1e9}
    moved = {}
    for ratio in (1, 4):
        method = {"name": "lora", "rank": 4, "dropout": 0.0, "learning_rate_ratio": ratio}
        _, path = run(workspace, method=method, training=one, output={"dir": f"ratio-{ratio}"})
        moved[ratio] = load_file(path / "adapter" / files.ADAPTER_WEIGHTS)
    for name, after in moved[4].items():
        torch.testing.assert_close(after, moved[1][name] * (4 if "lora_B" in name else 1))
