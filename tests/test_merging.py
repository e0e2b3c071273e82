"""Merged folders against the adapters they were made from, in fresh processes. Numbers: trust cases."""

import json
import shutil

import elsewhere
import pytest
import torch
from conftest import ftune, make_model, make_tokenizer, save_base
from merge_kit import load, make_adapter, with_adapter
from method_kit import ROWS, SETTINGS, logits
from safetensors.torch import load_file, save_file

from ftune import comparing, folder
from ftune.artifacts import files
from ftune.errors import RunError, UserError
from ftune.methods import METHODS
from ftune.run.afterwards import merge_target
from ftune.run.targets import resolve
from ftune.run.verifying import verify_target
from ftune.settings import LinearProbeSettings, LoraSettings

KINDS = ("qwen2", "qwen2 tied", "gpt2")
NAMES = ("lora", "lora, pissa", "lora, patterns", "dora", "adalora", "vera", "ia3", "bitfit")
MERGEABLE = {name: SETTINGS[name] for name in NAMES} | {
    "linear_probe": LinearProbeSettings(),
    "lora, head in full": LoraSettings(rank=4, alpha=8, modules_to_save=["lm_head"]),
}
BY_PEFT = ("lora", "lora, pissa", "dora", "adalora", "vera", "ia3")
CASES = [(kind, name) for kind in KINDS for name in MERGEABLE]


def merge(adapter, output, **options):
    return merge_target(resolve(adapter, **options), output, 1.0, overwrite=False)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Every method merged on every kind; logits by ftune, by PEFT and by transformers, in a process of its own each."""
    place, ours, theirs, whole = tmp_path_factory.mktemp("merged"), [], [], []
    for kind in KINDS:
        save_base(place / kind / "base", kind, scale=2.0)
        for name, settings in MERGEABLE.items():
            adapter = make_adapter(place / kind / name, place / kind / "base", settings)
            told = merge(adapter, place / kind / f"{name} merged")
            assert all(check["passed"] for check in told["checks"])
            key = f"{kind}, {name}"
            job = {"name": key, "base": place / kind / "base", "adapter": adapter, "rows": ROWS}
            ours.append(job)
            if kind == "qwen2" and name in BY_PEFT:
                theirs.append({**job, "theirs": place / f"{name} by PEFT"})
            whole.append({"name": key, "base": place / kind / f"{name} merged", "rows": ROWS})
        whole.append({"name": kind, "base": place / kind / "base", "rows": ROWS})
    found = [elsewhere.ask(side, jobs, place) for side, jobs in (("ftune", ours), ("peft", theirs), ("whole", whole))]
    return place, *found


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_merged_model_elsewhere_is_the_adapter_and_not_the_base(merged, kind, name):
    """Cases 72 and 77: ftune has the adapter, transformers alone the merged folder, in processes of their own."""
    _, ours, theirs, whole = merged
    key = f"{kind}, {name}"
    plain = whole[f"{key}: whole"]
    assert comparing.max_difference([plain], [ours[f"{key}: ours"]]) <= 1e-5
    assert comparing.max_difference([plain], [whole[f"{kind}: whole"]]) >= 1e-3
    if kind == "qwen2" and name in BY_PEFT:
        assert comparing.max_difference([plain], [theirs[f"{key}: ours"]]) <= 1e-5


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_merged_folder_holds_what_the_base_holds(merged, kind, name):
    """Cases 76 and 77: the same files, tensors, dtype, prompt and stops; tied where the base is, unless told apart."""
    place, _, _, whole = merged
    base, path = place / kind / "base", place / kind / f"{name} merged"
    names = [{file.name for file in folder_.iterdir()} for folder_ in (base, path)]
    assert names[0] <= names[1] <= names[0] | {files.CARD}
    before, after = (load_file(folder_ / "model.safetensors") for folder_ in (base, path))
    is_apart = name in ("linear_probe", "lora, head in full") and "lm_head.weight" not in before
    assert after.keys() - before.keys() == ({"lm_head.weight"} if is_apart else set())
    assert before.keys() <= after.keys()
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}
    configurations = [json.loads((folder_ / "config.json").read_text()) for folder_ in (base, path)]
    differing = {key for key in configurations[0] if configurations[0][key] != configurations[1].get(key)}
    assert differing == ({"tie_word_embeddings"} if is_apart else set())
    assert torch.equal(whole[f"{kind}, {name}: prompt"], whole[f"{kind}: prompt"])
    ends = make_tokenizer().convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    assert whole[f"{kind}, {name}: ends"].tolist() == ends


@pytest.mark.parametrize("name", ["dora", "vera", "linear_probe"])
def test_merging_twice_gives_the_same_bytes_and_merging_into_the_merge_is_refused(merged, tmp_path, name):
    """Case 74, even with another base forced."""
    place = merged[0] / "qwen2"
    merge(place / name, tmp_path / "again")
    assert folder.checksums(tmp_path / "again") == folder.checksums(place / f"{name} merged")
    for is_forced in (False, True):
        with pytest.raises(UserError, match="already contains adapter"):
            merge(place / name, tmp_path / "twice", base=str(place / f"{name} merged"), is_forced=is_forced)
    assert not (tmp_path / "twice").exists()


# Another base (case 75)


@pytest.fixture
def moved(tmp_path):
    """An adapter, and a base at the same path whose norm was moved by 1e-3 since."""
    base = save_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, SETTINGS["lora"])
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base, adapter


def test_another_base_is_refused_unless_forced_and_then_marked(moved, tmp_path, capsys):
    _, adapter = moved
    with pytest.raises(UserError, match=r"base fingerprint differs: model\.safetensors"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    told = merge(adapter, tmp_path / "merged", is_forced=True)
    assert told["forced_base"] == ["model.safetensors"]
    assert files.read_card(tmp_path / "merged")["forced_base"] == ["model.safetensors"]
    warned = " ".join(capsys.readouterr().err.split())
    assert "going on with another base than was trained on (model.safetensors differs)" in warned


def test_forced_merge_is_of_the_base_that_was_given(moved, tmp_path):
    base, adapter = moved
    merge(adapter, tmp_path / "merged", is_forced=True)
    assert comparing.max_difference(logits(load(tmp_path / "merged")), logits(with_adapter(base, adapter))) <= 1e-5


def test_nothing_is_marked_where_force_was_not_needed(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, SETTINGS["lora"])
    assert "forced_base" not in merge(adapter, tmp_path / "merged", is_forced=True)
    assert "forced_base" not in files.read_card(tmp_path / "merged")
    assert "another base" not in capsys.readouterr().err


def test_verify_of_another_base_fails_unless_forced_and_tells_it(moved):
    _, adapter = moved
    assert not verify_target(resolve(adapter))["passed"]
    found = verify_target(resolve(adapter, is_forced=True))
    assert found["passed"], found
    assert found["forced_base"] == ["model.safetensors"]
    [told] = [check["told"] for check in found["checks"] if check["name"] == "base"]
    assert "another than was trained on (model.safetensors differs)" in told


def test_force_is_an_option_of_the_command_line(moved, tmp_path):
    _, adapter = moved
    assert ftune("verify", adapter).returncode == 1
    assert ftune("verify", adapter, "--force").returncode == 0
    assert ftune("merge", adapter, "--output", tmp_path / "merged").returncode == 2
    done = ftune("merge", adapter, "--output", tmp_path / "merged", "--force")
    assert done.returncode == 0, done.stderr
    assert "another base" in " ".join(done.stderr.split())
    assert "not the one trained on: model.safetensors; forced" in " ".join(done.stdout.split())


# What a merge refuses to write without: each fault by itself


def test_merge_refuses_a_tokenizer_that_is_not_the_one_trained_with(tmp_path):
    """Case 77: a template or vocabulary that was changed beside the adapter."""
    base = save_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, SETTINGS["lora"])
    make_tokenizer("{{ messages[0].content }}").save_pretrained(adapter)
    with pytest.raises(RunError, match="chat_template: another than was trained with"):
        merge(adapter, tmp_path / "merged")
    larger = make_tokenizer()
    larger.add_tokens(["word"])
    larger.save_pretrained(adapter)
    with pytest.raises(RunError, match="tokenizer: another vocabulary"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


FAULTS = {
    "untied": ("qwen2 tied", "head and embeddings: they load as two tensors, but were one tensor when trained"),
    "half precision": ("qwen2", "dtype: the weights are F16 and config.json says float16, but the base is float32"),
    "no generation settings": ("qwen2", "files: no generation settings"),
    "stops elsewhere": ("qwen2", r"generation_config.json does not name <\|im_end\|> \(4\)"),
    "an adapter inside": ("qwen2", "files: an adapter lies in it too"),
}


def test_settings_of_images_are_taken_along_from_the_base(tmp_path):
    """Case 77."""
    base = save_base(tmp_path / "base")
    (base / "preprocessor_config.json").write_text('{"size": 3}')
    adapter = make_adapter(tmp_path / "adapter", base, SETTINGS["lora"])
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == '{"size": 3}'


@pytest.mark.parametrize("fault", FAULTS)
def test_merge_refuses_to_write_a_folder_with_a_fault(tmp_path, monkeypatch, fault):
    """Planted where the folder is written: nothing is left of it."""
    kind, told = FAULTS[fault]
    base = save_base(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", base, SETTINGS["lora"])
    save = files.save_companions

    def plant(path, model, tokenizer):
        save(path, model, tokenizer)
        if fault == "untied":
            tensors = load_file(path / "model.safetensors")
            embeddings = tensors["model.embed_tokens.weight"]
            save_file({**tensors, "lm_head.weight": embeddings.clone()}, path / "model.safetensors", {"format": "pt"})
            change(path / "config.json", tie_word_embeddings=False)
        elif fault == "half precision":
            tensors = {name: tensor.half() for name, tensor in load_file(path / "model.safetensors").items()}
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
            change(path / "config.json", dtype="float16")
        elif fault == "no generation settings":
            (path / "generation_config.json").unlink()
        elif fault == "stops elsewhere":
            change(path / "generation_config.json", eos_token_id=2)
        else:
            shutil.copy(adapter / files.ADAPTER_CONFIG, path)
            shutil.copy(adapter / files.ADAPTER_WEIGHTS, path)

    monkeypatch.setattr(files, "save_companions", plant)
    with pytest.raises(RunError, match=told):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()
    merge(adapter, tmp_path / "merged")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_base_whose_configuration_names_no_dtype_is_merged_in_that_of_its_files(tmp_path):
    """Case 76: not doubled to float32."""
    base = save_base(tmp_path / "base")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    change(base / "config.json", dtype=None)
    adapter = make_adapter(tmp_path / "adapter", base, SETTINGS["lora"])
    merge(adapter, tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


# The reference with the adapter switched off (case 93)


@pytest.mark.parametrize("name", [name for name in SETTINGS if SETTINGS[name].name != "full"])
def test_after_training_the_switched_off_adapter_is_the_frozen_base_to_the_bit(name, tmp_path):
    """Case 93, its half about disabled adapters: after five steps from a non-zero start, with dropout configured.

    Where switching off cannot give the base (full fine-tuning, virtual tokens, DoRA's magnitudes) it is refused.
    """
    settings = SETTINGS[name]
    if "dropout" in type(settings).model_fields:
        settings = settings.model_copy(update={"dropout": 0.1})
    base = save_base(tmp_path / "base", "qwen2")
    frozen = logits(load(base))
    model = with_adapter(base, make_adapter(tmp_path / "adapter", base, settings)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    started = logits(model)
    for _ in range(5):
        model(torch.tensor([ROWS[1]])).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert comparing.max_difference(logits(model), started) > 1e-3
    method = METHODS[settings.name]
    if hasattr(settings, "virtual_tokens") or settings.name == "dora":
        with pytest.raises(UserError, match="has no strength"):
            method.set_strength(model, 0.0)
        return
    method.set_strength(model, 0.0)
    assert all(torch.equal(off, on) for off, on in zip(logits(model), frozen, strict=True))


def test_what_is_trained_in_full_cannot_be_switched_off():
    """Case 93: of these the reference must be a copy."""
    for settings in (SETTINGS["full"], LinearProbeSettings(), MERGEABLE["lora, head in full"]):
        model = make_model()
        METHODS[settings.name].attach(model, settings)
        with pytest.raises(UserError, match="strength"):
            METHODS[settings.name].set_strength(model, 0.0)
