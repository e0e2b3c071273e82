"""Adapters, checkpoints, runs and models, whatever was done to their files: they load, or an error tells what is."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from fuzz_kit import as_json, damaged, handled, inputs, mutated
from hostile_kit import seal, unchanged
from hypothesis import assume, given
from hypothesis import strategies as st
from method_kit import SETTINGS
from safetensors.torch import load_file, save_file

from ftune import checkpoint, model, plan
from ftune.artifacts import checks, files
from ftune.artifacts.checks import Expected
from ftune.checkpoint import Keep
from ftune.engine import Engine
from ftune.evaluate import previous
from ftune.folder import RunFolder
from ftune.methods.base import trainable
from ftune.methods.head import method_of
from ftune.recipe import ModelSection, load
from ftune.report import comparison
from ftune.run import targets
from ftune.run.inputs import training_plan
from ftune.run.reporting import rebuild_report
from ftune.run.verifying import _checksums

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
METHODS = [name for name in SETTINGS if name not in ("full", "full, last half", "bitfit")]
CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64]


@pytest.fixture(scope="module")
def base():
    return make_model(**SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory, base) -> Path:
    """A model's folder, an adapter of every method, and a checkpoint."""
    path = tmp_path_factory.mktemp("store")
    base.save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    for number, name in enumerate(METHODS):
        settings, tuned = SETTINGS[name], copy.deepcopy(base)
        method_of(settings.name, tuned).attach(tuned, settings)
        card = {"method": settings.model_dump(mode="json"), "base": {"config.json": "0"}, "base_name": "elsewhere"}
        files.save_adapter(path / f"adapter-{number}", tuned, make_tokenizer(), settings, str(path / "model"), card)
    return path


@st.composite
def tensors_changed(draw, path: Path) -> None:
    """A safetensors file whose tensors have another shape, dtype or name, or are gone; or damaged bytes."""
    kind = draw(st.sampled_from(["bytes", "shape", "dtype", "name", "gone", "more", "scalar", "empty"]))
    if kind == "bytes":
        path.write_bytes(draw(damaged(path.read_bytes()[: draw(st.sampled_from([8, 64, 2000, 10**9]))])))
        return
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    if kind == "dtype":
        tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)))
    elif kind == "shape":
        tensors[name] = torch.zeros([*tensor.shape[:-1], tensor.shape[-1] + 1] if tensor.ndim else [2])
    elif kind == "more":
        tensors["base_model.model.x.lora_A.weight"] = tensor.clone()
    elif kind == "scalar":
        tensors[name] = torch.tensor(1.0)
    elif kind == "empty":
        tensors[name] = torch.zeros(0)
    else:
        del tensors[name]
        if kind == "name":
            tensors[draw(st.sampled_from(["", "x", "../../x", name + ".weight", name[1:]]))] = tensor
    save_file(tensors, path)


@pytest.fixture
def place(tmp_path) -> Path:
    path = tmp_path / "inside"
    path.mkdir()
    return path


def copied(source: Path, target: Path) -> Path:
    if target.exists():
        shutil.rmtree(target)
    return Path(shutil.copytree(source, target))


def change_json(data, path: Path) -> None:
    """A JSON file with other values, or with damaged bytes."""
    document = json.loads(path.read_text(encoding="utf-8"))
    is_damaged = data.draw(st.integers(0, 2)) == 0
    path.write_bytes(data.draw(damaged(path.read_bytes()) if is_damaged else mutated(document).map(as_json)))


@inputs(60)
@given(data=st.data(), number=st.integers(0, len(METHODS) - 1))
def test_adapters(base, store, place, data, number):
    path = copied(store / f"adapter-{number}", place / "adapter")
    names = sorted(file.name for file in path.iterdir())
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        if name == files.ADAPTER_WEIGHTS:
            data.draw(tensors_changed(path / name))
        elif name.endswith(".json") and name != "tokenizer.json":
            change_json(data, path / name)
        elif data.draw(st.booleans()):
            (path / name).unlink(missing_ok=True)

    def use() -> None:
        found = targets.resolve(path, str(store / "model") if number % 2 else None)
        files.read_classes(path)
        files.check_base(files.read_card(path), {"config.json": "0"}, files.adapter_digest(path), {})
        tuned = copy.deepcopy(base)
        files.load_adapter(tuned, found.adapter)
        tuned(torch.tensor([[7, 8]]))

    with unchanged(place.parent):
        handled("adapters", use)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base):
    """A checkpoint, and the model and optimizer that it is of."""
    tuned = copy.deepcopy(base)
    method_of("lora", tuned).attach(tuned, SETTINGS["lora"])
    optimizer = torch.optim.AdamW(trainable(tuned).values())
    tuned(torch.tensor([[7, 8]])).logits.sum().backward()
    optimizer.step()
    home = tmp_path_factory.mktemp("saved") / "checkpoints"
    snapshot = checkpoint.take(trainable(tuned), optimizer, Engine())
    checkpoint.save(home, 3, snapshot, {"base": {"x": "1"}, "data": {}}, Keep(2))
    return home, tuned, optimizer


@inputs(60)
@given(data=st.data(), is_sealed=st.booleans())
def test_checkpoints(saved, place, data, is_sealed):
    home, tuned, optimizer = saved
    path = copied(home, place / "checkpoints") / "step-000003"
    name = data.draw(st.sampled_from([checkpoint.STATE, checkpoint.PARAMETERS, checkpoint.OPTIMIZER]))
    if name == checkpoint.STATE:
        change_json(data, path / name)
    else:
        data.draw(tensors_changed(path / name))
        if is_sealed:  # somebody made the checksums fit
            seal(path)
    if data.draw(st.integers(0, 9)) == 0:
        (path / data.draw(st.sampled_from([checkpoint.STATE, checkpoint.OPTIMIZER]))).unlink()

    def use() -> None:
        found = checkpoint.latest(path.parent)
        assert found is not None
        checkpoint.restore(found, trainable(tuned), optimizer)

    with unchanged(place.parent):
        handled("checkpoints", use)


RUN_FILES = ["manifest.json", "report.json", "metrics.jsonl", "samples.jsonl", "plan.json", "recipe.yaml", "lock.json"]
RUN_FILES += ["probe.jsonl", "twins.jsonl", "review.json"]


def change_lines(data, path: Path) -> None:
    lines = path.read_bytes().splitlines()
    assume(lines)
    chosen = data.draw(st.integers(0, len(lines) - 1))
    lines[chosen] = as_json(data.draw(mutated(json.loads(lines[chosen]))))
    path.write_bytes(b"\n".join(lines))


@inputs(60)
@given(data=st.data())
def test_runs(built_lab, place, data):
    kept = built_lab[1]
    path = copied(kept / "run", place / "run")
    (path / "lock.json").write_text('{"pid": 999999}')
    for name in data.draw(st.lists(st.sampled_from(RUN_FILES), min_size=1, max_size=2, unique=True)):
        if not (path / name).is_file() or data.draw(st.integers(0, 9)) == 0:
            (path / name).write_bytes(
                data.draw(st.sampled_from([b"", b"[]", b"{}", b"3", b"[[]]", b"\xff", b"{}\n{}\n"]))
            )
        elif data.draw(st.integers(0, 3)) == 0:
            (path / name).write_bytes(data.draw(damaged((path / name).read_bytes())))
        elif name.endswith(".jsonl"):
            change_lines(data, path / name)
        elif name.endswith(".json"):
            change_json(data, path / name)

    with unchanged(place.parent, without=[path]):
        handled("runs", lambda: comparison.compare_runs([kept / "run", path], path / "compared.html"))
        handled("runs", lambda: previous.read(RunFolder(path), "exact_match", "0" * 64, [("say a", "a")]))
        found = []
        handled("runs", lambda: found.append(targets.resolve(path)))
        if found:
            handled("runs", lambda: _checksums(found[0].run))
        handled("runs", lambda: rebuild_report(path))


CONFIGURATIONS = ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"]
SIZES = st.one_of(
    st.sampled_from(
        [0, 1, -1, 3, 1000, 10**15, 10**30, 0.5, None, True, "", "llama", "gpt2", "x/y", "../x", "float32"]
    ),
    st.sampled_from([[], {}, ["x"], {"rope_type": "x"}, [1, 2], {"0": 1}, ["LlamaForSequenceClassification"], "\x00"]),
)


@inputs(50)
@given(data=st.data())
def test_models(store, place, data):
    path = copied(store / "model", place / "model")
    name = data.draw(st.sampled_from([*CONFIGURATIONS, "config.json", "config.json", "model.safetensors", "index"]))
    if name == "model.safetensors":
        data.draw(tensors_changed(path / name))
    elif name == "index":
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(load_file(path / "model.safetensors"), "a.safetensors"),
        }
        (path / "model.safetensors").rename(path / "a.safetensors")
        (path / model.trust.INDEX).write_bytes(as_json(data.draw(mutated(index))))
    elif data.draw(st.integers(0, 3)) == 0:
        (path / name).write_bytes(data.draw(damaged((path / name).read_bytes())))
    else:
        document = json.loads((path / name).read_text(encoding="utf-8"))
        (path / name).write_bytes(as_json(data.draw(mutated(document, SIZES))))
    settings = ModelSection(base=path)

    def plan_it() -> None:
        (place / "recipe.yaml").write_text("model: model\nmethod: lora\ndata: {train: x.jsonl}\n")
        recipe = load(place / "recipe.yaml")
        plan.make_plan(recipe, recipe.method, training_plan(recipe, None), None, None)

    def load_it() -> None:
        found = model.load_base(settings, torch.float32, CPU)
        found(torch.tensor([[1, 2]]))

    with unchanged(place.parent, without=[place / "recipe.yaml"]):
        handled("models", lambda: model.facts(settings))
        handled("models", lambda: model.load_tokenizer(settings)("hello"))
        handled("models", lambda: checks.of_files(path, Expected(dtype=torch.float32)))
        handled("models", plan_it)
        handled("models", load_it)
