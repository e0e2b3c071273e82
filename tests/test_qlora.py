"""The method qlora, its optimizers, and runs over quantized bases. Numbers: trust cases."""

import json
import shutil

import pytest
import torch
from conftest import ftune, make_model, make_tokenizer, save_base, write_recipe, write_rows
from method_kit import randomize
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ftune import checkpoint, comparing, folder, optimizers, plan, quantized, recipe, train
from ftune import model as models
from ftune.artifacts import distance, files
from ftune.engine import Engine
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.adapted import AdaptedLinear
from ftune.methods.base import modules_of, trainable
from ftune.quantized import is_quantized
from ftune.recipe import ModelSection
from ftune.run.afterwards import evaluate_target, merge_target
from ftune.run.inputs import Collector, check_possible
from ftune.run.targets import resolve
from ftune.run.training import train_run
from ftune.run.verifying import verify_target
from ftune.settings import LoraSettings


def plain_logits(path, adapter=None):
    """Of a model in full precision, with an adapter on it or without."""
    model = models.load_base(ModelSection(base=path), torch.float32, torch.device("cpu"))
    if adapter is not None:
        files.load_adapter(model, adapter)
    return comparing.logits_of(model, comparing.proof_rows(96, 512))


def test_eight_bit_moments_continue_exactly_and_are_as_large_as_planned(tmp_path):
    """Case 80: its step is a number, not a tensor, and its moments are bytes."""
    section = recipe.TrainingSection(learning_rate=0.01, optimizer="adamw_8bit")

    def start():
        model = make_model()
        METHODS["lora"].attach(model, LoraSettings(rank=64, dropout=0.0))
        return model, optimizers.make_optimizer(model, section)

    def step(model, optimizer, number):
        torch.manual_seed(number)
        for parameter in trainable(model).values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    straight, optimizer = start()
    for number in range(3):
        step(straight, optimizer, number)
    states = [optimizer.state[p] for p in trainable(straight).values()]
    held = [t for state in states for what, t in state.items() if what not in ("step", "qmap1", "qmap2")]
    assert {t.dtype for t in held} == {torch.uint8, torch.float32}
    planned = plan.optimizer_bytes("adamw_8bit", list(trainable(straight).values()))
    assert planned == sum(t.numel() * t.element_size() for t in held)
    checkpoint.save(tmp_path, 3, checkpoint.take(trainable(straight), optimizer, Engine()), {}, checkpoint.Keep(1))
    resumed, other = start()
    checkpoint.restore(checkpoint.latest(tmp_path), trainable(resumed), other)
    for number in (3, 4):
        step(straight, optimizer, number)
        step(resumed, other, number)
    assert all(torch.equal(p, trainable(resumed)[name]) for name, p in trainable(straight).items())


def problems_of(path, *overrides):
    collector = Collector()
    check_possible(recipe.load(path, overrides), collector)
    return [problem.what for problem in collector.problems]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has paged memory")
def test_what_cannot_be_done_is_told_before_anything_is_loaded(workspace):
    path = write_recipe(workspace, method={"name": "qlora"})
    assert problems_of(path) == []
    assert problems_of(path, "training.optimizer=adamw_8bit", "model.quantization=fp4") == []
    for name in ("paged_adamw_32bit", "paged_adamw_8bit"):
        assert problems_of(path, f"training.optimizer={name}") == [f"{name} needs a GPU: there is no paged memory here"]
    assert problems_of(path, "method={name: full}", "model.quantization=int8") == [
        "full trains the base's own weights, which a quantized base cannot hold"
    ]


# qlora


def test_qlora_is_lora_over_four_bits(workspace):
    path = write_recipe(workspace, method={"name": "qlora"})
    found = recipe.load(path)
    assert (found.model.quantization, found.model.double_quantization) == ("nf4", True)
    assert found.training.optimizer == "auto"
    assert [optimizers.resolve_optimizer("auto", torch.device(d)) for d in ("cpu", "cuda")] == [
        "adamw",
        "paged_adamw_32bit",
    ]
    assert METHODS["qlora"] is METHODS["lora"]
    assert recipe.load(path, ["model.quantization=fp4"]).model.quantization == "fp4"
    with pytest.raises(UserError, match="qlora needs a quantized base"):
        recipe.load(path, ["model.quantization=none"])


def test_run_over_four_bits_merges_into_full_precision_and_tells_both_distances(workspace):
    """Cases 72, 73, 75 and 78."""
    rows = ["method={name: qlora, rank: 64}", "training.optimizer=adamw_8bit", "training.checkpoint_every=2"]
    path = write_recipe(workspace)
    report = train_run(recipe.load(path, rows))
    run = workspace / "run"
    manifest, artefact = folder.read_json(run / "manifest.json"), report["artefact"]
    assert manifest["quantization"] == "nf4"
    assert (manifest["double_quantization"], manifest["compute_dtype"]) == (True, "float32")
    assert manifest["optimizer"] == "adamw_8bit"
    assert set(manifest["changed"]) == set(manifest["trainable"])
    assert artefact["reload_max_diff"] == 0.0
    assert artefact["merged_max_diff"] <= artefact["tolerance"] <= 1e-4
    assert (
        artefact["distance_to_trained"]["full_precision"]
        > 1e-3
        > 1e-5
        >= artefact["distance_to_trained"]["dequantized"]
    )
    config = json.loads((run / "adapter" / files.ADAPTER_CONFIG).read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 64)

    alone = shutil.copytree(run / "adapter", workspace / "alone")  # its card says what it was trained over
    for target in (run, alone):
        merged = merge_target(resolve(target), run / "merged", 1.0, overwrite=True)
        assert merged["merged_into"] == "full_precision"
        assert merged["distance_to_trained"] == pytest.approx(artefact["distance_to_trained"], rel=1e-3, abs=1e-6)
        assert merged["merged_max_diff"] <= 1e-5
    wanted = plain_logits(workspace / "base", run / "adapter")
    assert comparing.max_difference(plain_logits(run / "merged"), wanted) <= 1e-5
    manifest["files"] |= {f"merged/{name}": digest for name, digest in folder.checksums(run / "merged").items()}
    folder.write_json(run / "manifest.json", manifest)
    verified = verify_target(resolve(run))
    assert verified["passed"], verified
    assert {check["name"] for check in verified["checks"]} >= {"merge", "merged_folder", "adapter_live"}


FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)]


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}{', double' * form[1]}")
def test_quantized_merge_is_the_trained_weights_rounded_again_and_tells_what_that_costs(tmp_path, kind, form):
    """Case 73: the figures are those of the very weights in the folder, which transformers loads as it is."""
    section = ModelSection(base=save_base(tmp_path / "base", kind), quantization=form[0], double_quantization=form[1])
    model = models.load_base(section, torch.float32, torch.device("cpu"))
    settings = LoraSettings(rank=4, alpha=8)
    METHODS["lora"].attach(model, settings)
    trained = distance.reference(randomize(model))
    card = {"method": settings.model_dump(), "trained_over": {"quantization": form[0], "double_quantization": form[1]}}
    files.save_adapter(tmp_path / "adapter", model, make_tokenizer(), settings, str(section.base), card)
    before = {path: layer.matrix() for path, layer in modules_of(model, AdaptedLinear)}
    METHODS["lora"].merge(model)
    told = merge_target(resolve(tmp_path / "adapter"), tmp_path / "merged", 1.0, False, is_quantized=True)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert is_quantized(theirs.get_submodule(next(iter(before))))
    quantized.settle(theirs, section, torch.float32)
    error = change = 0.0
    for path, matrix in before.items():
        wanted = model.get_submodule(path).weight
        error += float((quantized.matrix(theirs.get_submodule(path)) - wanted).abs().sum())
        change += float((wanted - matrix).abs().sum())
    assert told["error_over_change"] == pytest.approx(error / change, rel=1e-4)
    assert 0.001 < told["error_over_change"] < (0.1 if form[0] == "int8" else 2)
    logits = distance.reference(theirs)
    away = distance.between(logits, trained)
    assert told["distance_to_trained"]["quantized"] == pytest.approx(away.max_difference, rel=1e-3)
    assert told["kl_to_trained"]["quantized"] == pytest.approx(away.kl, rel=1e-3)
    assert told["kl_to_trained"]["quantized"] < distance.between(logits_of_base(section), trained).kl
    assert verify_target(resolve(tmp_path / "merged"))["passed"]
    with pytest.raises(UserError, match="already contains adapter"):
        merge_target(resolve(tmp_path / "adapter", str(tmp_path / "merged")), tmp_path / "twice", 1.0, False, True)


def logits_of_base(section):
    return distance.reference(models.load_base(section, torch.float32, torch.device("cpu")))


def test_quantized_merge_of_a_run_is_asked_for_and_told(workspace):
    path = write_recipe(workspace, method={"name": "qlora", "rank": 8})
    train_run(recipe.load(path, ["output.save=both"]))
    told = ftune("merge", workspace / "run", "--quantized")
    assert told.returncode == 0, told.stderr
    assert "of what the adapter changes" in " ".join(told.stdout.split())
    assert verify_target(resolve(workspace / "run"))["passed"]
    plain, small = (workspace / "run" / name / "model.safetensors" for name in ("merged", "merged-nf4"))
    assert small.stat().st_size < 0.6 * plain.stat().st_size
    train_run(recipe.load(path, ["output.dir=plain", "method={name: lora, rank: 8}"]))
    refused = ftune("merge", workspace / "plain", "--quantized")
    assert refused.returncode == 2
    assert "trained over a base in full precision" in " ".join(refused.stderr.split())
    assert not (workspace / "plain" / "merged-none").exists()


def test_classifier_over_four_bits_is_trained_proved_and_merged(workspace):
    """Cases 58, 72 and 73."""
    write_rows(workspace / "train.jsonl", [{"text": "abc"[i % 3] * (1 + i % 4), "label": i % 3} for i in range(24)])
    sections = {"objective": {"name": "classification"}, "method": {"name": "qlora", "rank": 8, "dropout": 0.0}}
    sections |= {"data": {"train": "train.jsonl", "test": "train.jsonl"}, "training": {"max_steps": 20}}
    report = train_run(recipe.load(write_recipe(workspace, **sections, output={"dir": "run", "save": "both"})))
    assert all(gate["passed"] for gate in report["gates"])
    assert report["task"]["tuned"] > 0.9
    assert (
        report["artefact"]["kl_to_trained"]["dequantized"]
        < 1e-9
        < report["artefact"]["kl_to_trained"]["full_precision"]
    )
    verified = verify_target(resolve(workspace / "run"))
    assert verified["passed"], verified
    assert models.is_classifier(models.load_config(ModelSection(base=workspace / "run" / "merged")))
    told = merge_target(resolve(workspace / "run"), None, 1.0, False, is_quantized=True)
    assert told["kl_to_trained"]["quantized"] < 0.1
    assert evaluate_target(resolve(workspace / "run"))["task"]["tuned"] == report["task"]["tuned"]
    small = AutoModelForSequenceClassification.from_pretrained(workspace / "run" / "merged-nf4")
    assert not is_quantized(small.score)


def test_run_over_four_bits_that_was_killed_ends_with_the_same_bytes(workspace, monkeypatch):
    """Case 80, with 8-bit moments."""
    rows = [
        "method={name: qlora, rank: 64, dropout: 0.1}",
        "training.optimizer=adamw_8bit",
        "training.checkpoint_every=2",
    ]
    path = write_recipe(workspace)
    train_run(recipe.load(path, [*rows, "output.dir=clean"]))
    plain = train.train

    def dying(*arguments):
        for step in plain(*arguments):
            yield step
            if step.step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", dying)
        with pytest.raises(KeyboardInterrupt):
            train_run(recipe.load(path, rows))
    train_run(recipe.load(path, rows), resume=True)
    clean, resumed = (workspace / name / "adapter" / files.ADAPTER_WEIGHTS for name in ("clean", "run"))
    assert clean.read_bytes() == resumed.read_bytes()
