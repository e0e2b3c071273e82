"""Cases 107 and 108: nothing runs that lies beside weights. Each payload leaves a mark if it is loaded unsafely."""

import ast
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hostile_kit import PICKLES, change, command, pickled, refused
from transformers import dynamic_module_utils

import ftune
from ftune import folder

NEEDS_WEIGHTS = ("check", "train", "overwrite", "resume", "compare", "generate of a model", "verify a model")
LOADS_BASE = (*NEEDS_WEIGHTS, "eval", "eval an adapter", "merge", "verify", "generate")
EVERY = (*LOADS_BASE, "inspect", "plan")


# Pickles


def test_a_pickle_leaves_its_mark_where_it_is_loaded_without_care(tmp_path):
    torch.load(pickled(tmp_path / "x.bin", tmp_path / "MARK"), weights_only=False)
    assert (tmp_path / "MARK").exists()


def test_a_base_whose_weights_are_a_pickle_is_refused(lab):
    (lab.base / "model.safetensors").unlink()
    pickled(lab.base / "pytorch_model.bin", lab.mark)
    told = "no safetensors here, only what may run code when it is read: pytorch_model.bin"
    refused(lab, [name for name in LOADS_BASE if name not in ("generate", "verify a model")], told)
    refused(lab, ["generate"], "base fingerprint differs: model.safetensors")
    refused(lab, ["verify a model"], "weights are missing: model.safetensors")


def test_an_index_that_names_a_pickle_is_refused(lab):
    (lab.base / "model.safetensors").unlink()
    pickled(lab.base / "pytorch_model.bin", lab.mark)
    index = lab.base / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}')
    refused(lab, NEEDS_WEIGHTS, "it names 'pytorch_model.bin' as a file of weights")


def test_an_adapter_that_is_a_pickle_is_refused(lab):
    (lab.run / "adapter" / "adapter_model.safetensors").unlink()
    pickled(lab.run / "adapter" / "adapter_model.bin", lab.mark)
    refused(lab, ["eval an adapter", "merge", "verify", "generate"], "only a pickle (adapter_model.bin)")
    refused(lab, ["eval"], "changed since the run wrote it")


def test_pickles_that_lie_about_are_never_opened(lab):
    for path in (lab.base, lab.run, lab.run / "adapter", lab.half, *(lab.half / "checkpoints").iterdir()):
        for name in PICKLES:
            pickled(path / name, lab.mark)
    pickled(lab.run / "adapter" / "adapter_model.bin", lab.mark)
    pickled(lab.run / "adapter" / "pytorch_model.bin", lab.mark)
    for name in ("check", "inspect", "plan", "train", "eval", "merge", "verify", "generate", "report"):
        said = command(*lab.commands[name])
        assert said.code in (0, 1), (name, said)
        assert not lab.mark.exists(), name
    for name in ("resume", "generate of a model", "verify a model", "eval an adapter"):
        command(*lab.commands[name])
        assert not lab.mark.exists(), name


def test_an_adapter_inside_a_base_is_not_put_on_top(lab):
    adapter = lab.base / "adapter_config.json"
    shutil.copy(lab.run / "adapter" / "adapter_config.json", adapter)
    change(adapter, auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
    pickled(lab.base / "adapter_model.bin", lab.mark)
    refused(lab, ("check", "train", "overwrite", "resume", "compare"), "an adapter lies in this model folder too")
    refused(lab, ("generate of a model", "verify a model"), "only a pickle (adapter_model.bin)")


def test_ftune_never_unpickles():
    """By no name under which it is done; what ftune keeps for itself is safetensors, JSON, Arrow and plain numbers."""
    unsafe = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    calls = {"torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"}
    for path in Path(ftune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not {name.split(".")[0] for name in names} & unsafe, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, f"{path}:{node.lineno}"


# Code beside weights

CODE = """
open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class EvilConfig(LlamaConfig):
    model_type = "evil"

class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig

class EvilTokenizer(PreTrainedTokenizerFast):
    pass

def generate(model, **kwargs):
    return kwargs["input_ids"]
"""
CLASSES = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
FOLDERS = {
    "a model with a class of its own": lambda base: change(base / "config.json", model_type="evil", auto_map=CLASSES),
    "a model that transformers has, too": lambda base: change(base / "config.json", auto_map=CLASSES),
    "code in another repository": lambda base: change(
        base / "config.json", auto_map={name: f"evil/evil--{where}" for name, where in CLASSES.items()}
    ),
    "a model inside the model": lambda base: change(
        base / "config.json", text_config={"model_type": "clip_text_model", "auto_map": CLASSES}
    ),
    "the tokenizer": lambda base: change(
        base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    ),
    "its generation": lambda base: change(base / "generation_config.json", auto_map={"GenerationConfig": "evil.Evil"}),
    "a kernel": lambda base: change(base / "config.json", attn_implementation="evil/kernel"),
    "a kernel inside": lambda base: change(base / "config.json", text_config={"_attn_implementation": {"": "e/k"}}),
}


def with_code(base: Path, mark: Path) -> None:
    (base / "evil.py").write_text(CODE.format(mark=str(mark)))


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where transformers puts a copy of code that it runs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("where", FOLDERS)
def test_code_that_comes_with_a_model_is_refused(lab, where):
    with_code(lab.base, lab.mark)
    FOLDERS[where](lab.base)
    some = ("check", "train", "resume", "generate of a model", "plan", "inspect", "eval")
    refused(lab, EVERY if where == "a model with a class of its own" else some, "code run that comes with the model")


def test_a_generate_function_that_comes_with_a_model_is_refused(lab):
    (lab.base / "custom_generate").mkdir()
    (lab.base / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(lab.mark)))
    refused(lab, ("check", "generate of a model", "train"), "code comes with the model: custom_generate/")


def test_code_beside_an_adapter_or_a_merged_model_is_refused(lab):
    assert command("merge", lab.run).code == 0
    with_code(lab.run / "adapter", lab.mark)
    change(lab.run / "adapter" / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]})
    refused(lab, ("eval an adapter", "generate", "verify"), "code run that comes with the model")
    merged = lab.run / "merged"
    with_code(merged, lab.mark)
    change(merged / "config.json", auto_map=CLASSES)
    for arguments in (["generate", merged, "hi"], ["verify", merged], ["eval", merged, "--recipe", lab.recipe]):
        said = command(*arguments)
        assert said.code in (1, 2)
        assert "code run that comes with the model" in " ".join(said.text.split())
    assert not lab.mark.exists()


def test_code_runs_where_the_recipe_says_so_and_the_manifest_tells(lab, modules):
    """The same folder leaves its mark then: the refusals above refuse something."""
    with_code(lab.base, lab.mark)
    FOLDERS["a model with a class of its own"](lab.base)
    said = command("train", lab.recipe, "output.dir=new", "model.trust_remote_code=true")
    assert said.code in (0, 1), said.text
    assert lab.mark.exists()
    manifest = folder.read_json(lab.new / "manifest.json")
    assert manifest["trust_remote_code"] is True
    assert "evil.py" in manifest["base"]
    assert folder.read_json(lab.run / "manifest.json")["trust_remote_code"] is False
    lab.mark.unlink()
    assert command("train", lab.recipe, "output.dir=newer").code == 2, "the consent is one run's"
    assert not lab.mark.exists()
