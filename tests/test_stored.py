"""Files that somebody changed: what fuzzing found, each once, and what is told of it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, save_base
from hostile_kit import change, seal
from method_kit import SETTINGS
from safetensors.torch import load_file, save_file

from ftune import checkpoint, folder, model, stored
from ftune.artifacts import files
from ftune.checkpoint import Keep
from ftune.engine import Engine
from ftune.errors import UserError
from ftune.methods.base import trainable
from ftune.methods.head import method_of
from ftune.recipe import ModelSection


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8 text, from byte "),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
        (b"9" * 5000, "not valid JSON: Exceeds the limit"),
        (b'{"\\ud800": 1}', "not valid JSON: 'utf-8' codec can't encode"),
        (b"[]", "not a JSON object"),
        (b"3", "not a JSON object"),
    ],
)
def test_a_file_that_is_no_object_is_told(tmp_path, content, told):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        stored.read_object(path)
    assert str(path) in caught.value.problems[0].where
    path.write_bytes(b"{}\n\n" + content + b"\n")
    if content:
        with pytest.raises(UserError, match=told) as caught:
            stored.read_json_lines(path)
        assert "line 3" in caught.value.problems[0].where or "UTF-8" in told


def test_a_folder_and_nothing_are_no_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        stored.read_json(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        stored.read_json(tmp_path / "x")


def test_what_its_use_leads_to_is_told_of_the_file_and_our_own_errors_go_on(tmp_path):
    for error in (KeyError("x"), TypeError(), ZeroDivisionError("a\nb"), ValueError(" "), IndexError("i")):
        told = rf"not what was written there \({type(error).__name__}"
        with pytest.raises(UserError, match=told), stored.as_written(tmp_path):
            raise error
    with pytest.raises(UserError, match=r"^mine$"), stored.as_written(tmp_path):
        raise UserError("mine")


def test_a_manifest_whose_list_of_files_is_none_is_told(tmp_path):
    for files_ in ([], {"x": 1}, "x"):
        (tmp_path / "manifest.json").write_text(json.dumps({"files": files_}))
        with pytest.raises(UserError, match="is no list of checksums"):
            _ = folder.RunFolder(tmp_path).recorded


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_hidden_layers": 10**15}, "config.json says num_hidden_layers: 1e.15, and no model has more than 512"),
        ({"num_local_experts": 10**9}, "num_local_experts: 1e.09"),
        ({"architectures": [0]}, "architectures"),
        ({"architectures": 1}, "architectures"),
        ({"attention_dropout": 3}, "config.json says attention_dropout: 3, which is no share"),
        ({"hidden_size": 0}, "hidden_size|cannot be loaded"),
        ({"vocab_size": None}, "vocab_size|cannot be loaded"),
        ({"rope_parameters": 3}, "cannot be loaded"),
        ({"model_type": ["x"]}, "cannot be loaded"),
    ],
)
def test_a_configuration_of_wrong_values_is_told(tmp_path, values, told):
    save_base(tmp_path / "base")
    change(tmp_path / "base" / "config.json", **values)
    with pytest.raises(UserError, match=told):
        model.load_base(ModelSection(base=tmp_path / "base"), torch.float32, torch.device("cpu"))


def test_settings_of_a_tokenizer_that_show_only_in_use_are_told(tmp_path):
    save_base(tmp_path / "base")
    change(tmp_path / "base" / "tokenizer_config.json", model_max_length={"x": 1})
    with pytest.raises(UserError, match="the tokenizer cannot be loaded: TypeError"):
        model.load_tokenizer(ModelSection(base=tmp_path / "base"))


@pytest.fixture
def tuned():
    found = make_model()
    method_of("lora", found).attach(found, SETTINGS["lora"])
    return found


@pytest.fixture
def adapter(tmp_path, tuned) -> Path:
    (tmp_path / "adapter").mkdir()
    save_file(method_of("lora", tuned).tensors(tuned), tmp_path / "adapter" / files.ADAPTER_WEIGHTS)
    config = files.peft_config(tuned, SETTINGS["lora"], "base")
    (tmp_path / "adapter" / files.ADAPTER_CONFIG).write_text(json.dumps(config))
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_of_no_floating_point_numbers_are_refused(adapter, dtype):
    tensors = load_file(adapter / files.ADAPTER_WEIGHTS)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(dtype)}, adapter / files.ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="of no floating-point numbers: "):
        files.load_adapter(make_model(), adapter)


def test_an_adapter_takes_no_more_memory_than_its_tensors_are_large(adapter):
    change(adapter / files.ADAPTER_CONFIG, r=10**9)
    with pytest.raises(UserError, match="says rank 1000000000, and no tensor of its file is that large"):
        files.load_adapter(make_model(), adapter)


@pytest.mark.parametrize("values", [{"r": "x"}, {"target_modules": 3}, {"rank_pattern": [3]}, {"peft_type": ["LORA"]}])
def test_settings_of_an_adapter_that_are_none_are_told(adapter, values):
    change(adapter / files.ADAPTER_CONFIG, **values)
    with pytest.raises(UserError, match=r"not what was written there|not an adapter configuration"):
        files.read_settings(adapter)


def test_a_checkpoint_with_fitting_checksums_must_fit_the_model_as_well(tmp_path, tuned):
    optimizer = torch.optim.AdamW(trainable(tuned).values())
    tuned(torch.tensor([[7, 8]])).logits.sum().backward()
    optimizer.step()
    snapshot = checkpoint.take(trainable(tuned), optimizer, Engine())
    path = checkpoint.save(tmp_path / "checkpoints", 3, snapshot, {}, Keep(2))

    good = load_file(path / checkpoint.OPTIMIZER)
    name = next(name for name in good if name.endswith("exp_avg"))
    for changed in ({name: torch.zeros(3)}, {"elsewhere/exp_avg": torch.zeros(3)}):
        save_file({**good, **changed}, path / checkpoint.OPTIMIZER)
        seal(path)
        found = checkpoint.latest(path.parent)
        assert found is not None
        with pytest.raises(UserError, match="is not of this model"):
            checkpoint.restore(found, trainable(tuned), copy.deepcopy(optimizer))
    for values in ({"step": 4}, {"step": "3"}, {"inputs": 3}):
        change(path / checkpoint.STATE, step=3, inputs={})
        seal(path)
        assert checkpoint.latest(path.parent) is not None
        change(path / checkpoint.STATE, **values)
        seal(path)
        with pytest.raises(UserError, match="not what was written there"):
            checkpoint.latest(path.parent)
