"""What other tools lose without a word when they train, save, load or merge. Numbers: trust cases."""

import json
import shutil

import elsewhere
import pytest
import torch
from conftest import CHAT_ROWS, make_model, make_tokenizer, run, save_base, write_rows
from hostile_kit import seal
from method_kit import ROWS, SETTINGS, assert_same, logits, randomize
from safetensors.torch import load_file, save_file
from test_run_resume import Killed, kill_after
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ftune import checkpoint, comparing, folder
from ftune import model as models
from ftune.artifacts import files
from ftune.errors import RunError, UserError
from ftune.methods import METHODS
from ftune.methods.base import modules_of, trainable
from ftune.methods.dora import DoraLinear
from ftune.recipe import ModelSection
from ftune.run.afterwards import evaluate_target, merge_target
from ftune.run.targets import resolve
from ftune.run.verifying import verify_target
from ftune.settings import DoraSettings, LoraSettings

CPU = torch.device("cpu")
LORA = {"name": "lora", "rank": 4}


def load(path, dtype=torch.float32):
    return models.load_base(ModelSection(base=path), dtype, CPU)


# Tied embeddings


@pytest.mark.parametrize(
    "method",
    [{**LORA, "modules_to_save": ["lm_head"]}, {**LORA, "modules_to_save": ["embed_tokens"]}, {"name": "full"}],
    ids=["head", "embeddings", "full"],
)
def test_tied_base_is_saved_merged_and_resumed_as_it_was_trained(workspace, method, monkeypatch):
    """Case 60: either still one tensor, in the file too, or the written configuration says that there are two."""
    save_base(workspace / "base", "llama tied")
    sections = {"method": method, "training": {"max_steps": 4, "checkpoint_every": 1, "optimizer": "adamw"}}
    report, path = run(workspace, output={"dir": "run", "save": "both"}, **sections)
    assert all(gate["passed"] for gate in report["gates"])
    merged = AutoModelForCausalLM.from_pretrained(path / "merged")
    stored = load_file(path / "merged" / "model.safetensors")
    is_tied = merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert (
        is_tied == merged.config.tie_word_embeddings == ("lm_head.weight" not in stored) == (method["name"] == "full")
    )
    if method["name"] != "full":
        adapted = load(workspace / "base")
        files.load_adapter(adapted, path / "adapter")
        assert_same(logits(merged), logits(adapted))
        assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run(workspace, output={"dir": "killed", "save": "both"}, **sections)
    _, killed = run(workspace, resume=True, output={"dir": "killed", "save": "both"}, **sections)
    assert (killed / "merged" / "model.safetensors").read_bytes() == (
        path / "merged" / "model.safetensors"
    ).read_bytes()


def test_low_rank_embeddings_of_a_tied_base_are_refused():
    """Case 60."""
    with pytest.raises(UserError, match="shares its weight"):
        METHODS["lora"].attach(make_model("llama tied"), LoraSettings(target_modules=["embed_tokens"]))


# Files that do not fit


def renamed(tensors):
    return {name.replace("layers.0.self_attn.q", "layers.0.self_attn.x"): tensor for name, tensor in tensors.items()}


def misshapen(tensors):
    return {name: tensor.T.contiguous() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}


CHANGES = {
    "one renamed": renamed,
    "all renamed": lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()},
    "one more": lambda tensors: {**tensors, "base_model.model.extra": torch.zeros(1)},
    "one less": lambda tensors: dict(list(tensors.items())[1:]),
    "other shapes": misshapen,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with a checkpoint after each."""
    place = tmp_path_factory.mktemp("finished")
    save_base(place / "base")
    write_rows(place / "train.jsonl", CHAT_ROWS)
    write_rows(place / "test.jsonl", CHAT_ROWS[:2])
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    return run(place, method={**LORA, "alpha": 8}, data=data, training={"max_steps": 4, "checkpoint_every": 1})[1]


def change(file, how):
    save_file(how(load_file(file)), file)


@pytest.mark.parametrize("name", CHANGES)
def test_eval_merge_verify_and_start_from_refuse_tensors_that_do_not_fit(finished, tmp_path, name):
    """Case 61: never a partly loaded adapter, and nothing is written."""
    shutil.copytree(finished.parent, tmp_path / "place")
    adapter = tmp_path / "place" / "run" / "adapter"
    change(adapter / files.ADAPTER_WEIGHTS, CHANGES[name])
    told = "missing|unexpected|of another shape"
    with pytest.raises(UserError, match=told):
        evaluate_target(resolve(adapter))
    with pytest.raises(UserError, match=told):
        merge_target(resolve(adapter), tmp_path / "merged", 1.0, overwrite=False)
    assert not (tmp_path / "merged").exists()
    assert not verify_target(resolve(adapter))["passed"]
    method = {**LORA, "alpha": 8, "start_from": str(adapter)}
    with pytest.raises(UserError, match=told):
        run(tmp_path / "place", method=method, output={"dir": "second"})


@pytest.mark.parametrize("name", CHANGES)
def test_resume_refuses_tensors_that_do_not_fit(workspace, monkeypatch, name):
    """Case 61, with checksums that hold."""
    sections = {"method": LORA, "training": {"max_steps": 4, "checkpoint_every": 1}}
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run(workspace, **sections)
    newest = checkpoint.latest(workspace / "run" / "checkpoints").path
    change(newest / checkpoint.PARAMETERS, CHANGES[name])
    seal(newest)
    with pytest.raises(UserError, match="the checkpoint's tensors are not this model's"):
        run(workspace, resume=True, **sections)


# DoRA, BitFit, switching off


def test_dora_trains_float32_magnitudes_and_stands_a_row_of_zeros():
    """Case 63: bfloat16 base, one row of W is 0."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    model.to(torch.bfloat16)
    base = logits(model)
    METHODS["dora"].attach(model, DoraSettings(rank=4, alpha=8, dropout=0.0))
    assert comparing.max_difference(logits(model), base) == 0
    layers = dict(modules_of(model, DoraLinear))
    started = {path: layer.lora_magnitude_vector.detach().clone() for path, layer in layers.items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    ids = torch.tensor([ROWS[1]])
    for _ in range(3):
        loss = functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert bool(loss.isfinite())
    for path, layer in layers.items():
        magnitude = layer.lora_magnitude_vector
        assert magnitude.dtype == torch.float32
        assert magnitude.shape == (layer.num_out,)
        assert bool(magnitude.isfinite().all())
        assert not torch.equal(magnitude, started[path])
    tuned = logits(model)
    METHODS["dora"].merge(model)
    assert_same(logits(model), tuned, comparing.tolerance(model, tuned))


def test_bitfit_without_biases_is_refused_and_with_them_trains_and_saves_nothing_else(workspace):
    """Case 68."""
    with pytest.raises(UserError, match="0 trainable parameters"):
        run(workspace, method={"name": "bitfit"})
    assert not (workspace / "run").exists()
    save_base(workspace / "base", attention_bias=True)
    _, path = run(workspace, method={"name": "bitfit"}, output={"dir": "run", "save": "both"})
    before, after = (load_file(place / "model.safetensors") for place in (workspace / "base", path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("bias")}
    assert len(load_file(path / "adapter" / files.ADAPTER_WEIGHTS)) == len(changed)


@pytest.mark.parametrize("name", [name for name in SETTINGS if SETTINGS[name].name != "full"])
def test_switched_off_an_adapter_is_the_base_or_says_that_it_cannot_be(name):
    """Case 71."""
    settings, model = SETTINGS[name], make_model("qwen2")
    base = logits(model)
    METHODS[settings.name].attach(model, settings)
    randomize(model)
    if hasattr(settings, "virtual_tokens") or settings.name == "dora":  # whose magnitude takes the base's place
        with pytest.raises(UserError, match="has no strength"):
            METHODS[settings.name].set_strength(model, 0.0)
        return
    METHODS[settings.name].set_strength(model, 0.0)
    assert_same(logits(model), base, 1e-6)


# Merges


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama tied", "qwen3_moe"])
def test_merged_folder_is_whole_in_the_base_dtype_and_gives_the_adapters_logits_elsewhere(tmp_path, kind):
    """Cases 69, 72, 74, 76 and 77: a bfloat16 base, in fresh processes."""
    mixture = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    model = make_model(kind, eos_token_id=2, scale=2.0, **(mixture if kind == "qwen3_moe" else {})).bfloat16()
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    settings = LoraSettings(rank=4, alpha=8, target_modules="attention")
    base = load(tmp_path / "base")
    METHODS["lora"].attach(base, settings)
    randomize(base)
    card = {"method": settings.model_dump(mode="json")}
    files.save_adapter(tmp_path / "adapter", base, make_tokenizer(), settings, str(tmp_path / "base"), card)
    for name in ("merged", "again"):
        merge_target(resolve(tmp_path / "adapter"), tmp_path / name, 1.0, overwrite=False)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert before.keys() == after.keys()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "merged")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "merged")]
    assert config[0] == config[1]
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("base", "merged")]
    assert names[1] - names[0] <= {files.CARD}
    assert names[0] <= names[1]
    assert folder.checksums(tmp_path / "merged") == folder.checksums(tmp_path / "again")
    job = {"name": "a", "base": tmp_path / "base", "adapter": tmp_path / "adapter", "rows": ROWS}
    adapted = elsewhere.ask("ftune", [job], tmp_path)["a: ours"]
    merged = elsewhere.ask("whole", [{"name": "m", "base": tmp_path / "merged", "rows": ROWS}], tmp_path)["m: whole"]
    untouched = torch.cat(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)))
    assert comparing.max_difference([merged], [untouched]) >= 1e-3
    rounded = load(tmp_path / "merged", torch.bfloat16)
    assert comparing.max_difference([merged], [adapted]) <= comparing.tolerance(rounded, logits(rounded))


def test_values_that_overflow_are_never_written(tmp_path):
    """Case 76."""
    save_base(tmp_path / "base")
    model, settings = load(tmp_path / "base"), LoraSettings(rank=4, alpha=8)
    METHODS["lora"].attach(model, settings)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.fill_(1e20 if "layers.1.mlp.up_proj" in name else 0.01)
    card = {"method": settings.model_dump(mode="json")}
    files.save_adapter(tmp_path / "adapter", model, make_tokenizer(), settings, str(tmp_path / "base"), card)
    with pytest.raises(RunError):
        merge_target(resolve(tmp_path / "adapter"), tmp_path / "merged", 1.0, overwrite=False)
    assert not (tmp_path / "merged").exists()
    METHODS["lora"].merge(model)
    with pytest.raises(RunError, match="non-finite values in model"):
        files.save_model(tmp_path / "merged", model, make_tokenizer(), {})
    assert not (tmp_path / "merged").exists()


def test_changed_base_is_named_by_eval_too(finished, tmp_path):
    """Case 75: one tensor by 1e-3, at the same path."""
    shutil.copytree(finished.parent, tmp_path / "place")
    weights = tmp_path / "place" / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    target = resolve(finished / "adapter", str(tmp_path / "place" / "base"), finished.parent / "recipe.yaml")
    for use in (evaluate_target, lambda found: merge_target(found, tmp_path / "merged", 1.0, overwrite=False)):
        with pytest.raises(UserError, match=r"base fingerprint differs: model\.safetensors"):
            use(target)
