"""The linear probe: a head alone is trained, on features that are computed once and never reused wrongly."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import CHAT_ROWS, make_model, make_tokenizer, save_base, write_recipe, write_rows
from safetensors.torch import load_file
from test_methods import randomize
from transformers import AutoModelForCausalLM

from ftune import attention, batches, classifier, comparing, data, features, folder, model, optimizers, recipe, train
from ftune.artifacts import files
from ftune.classifier import Classes
from ftune.data import Rules
from ftune.engine import Engine
from ftune.methods.base import trainable
from ftune.methods.head import method_of
from ftune.objectives import OBJECTIVES, classification, sft
from ftune.recipe import ModelSection, TrainingSection
from ftune.run import training
from ftune.settings import LinearProbeSettings

SETTINGS = LinearProbeSettings()
DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
LABELLED = [{"text": "abcdef"[i % 3] * (2 + i % 5), "label": i % 3} for i in range(24)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def attached(kind="llama", **changes):
    base = make_model(kind, **changes)
    method_of("linear_probe", base).attach(base, SETTINGS)
    return base


def chat_examples(tmp_path):
    return data.load(make_tokenizer(), [data.Source(write_rows(tmp_path / "rows.jsonl", CHAT_ROWS))], Rules()).examples


def labelled_examples(tmp_path, rows=LABELLED):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = data.load(make_tokenizer(), [data.Source(path)], Rules(format="labelled"))
    return data.with_class_ids(found, data.sorted_labels(found.examples), "rows").examples


def plan_of(steps=3, **training):
    section = TrainingSection(**({"learning_rate": 0.05, "max_steps": steps, "batch_size": 8} | training))
    return train.TrainingPlan(section, steps, True, "auto", 0)


def source(probed, objective=sft, plan=None, **made_from):
    return features.Source(probed, objective, plan or plan_of(), {"base": {"model.safetensors": "0"}, **made_from})


@pytest.fixture
def passes(monkeypatch):
    """How many feature passes there were."""
    done = []
    compute = features._compute
    monkeypatch.setattr(features, "_compute", lambda *arguments: (done.append(1), compute(*arguments)))
    return done


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_head_of_a_language_model_is_an_untied_copy_that_merges(kind, is_tied, tmp_path):
    """Cases 57, 60 and 70."""
    changes = {"tie_word_embeddings": is_tied, "eos_token_id": 2}
    path = save_base(tmp_path / "base", kind, **changes)
    base = model.load_base(ModelSection(base=path), torch.float32, torch.device("cpu"))
    rows = comparing.proof_rows(96, 512)
    before = comparing.logits_of(base, rows)
    probed = attached(kind, **changes)
    assert list(trainable(probed)) == ["lm_head.weight"]
    assert comparing.max_difference(comparing.logits_of(probed, rows), before) == 0
    embeddings = probed.get_input_embeddings().weight.clone()
    tuned = comparing.logits_of(randomize(probed), rows)
    assert torch.equal(probed.get_input_embeddings().weight, embeddings)
    files.save_adapter(tmp_path / "a", probed, make_tokenizer(), SETTINGS, str(path), {"method": SETTINGS.model_dump()})
    assert list(load_file(tmp_path / "a" / files.ADAPTER_WEIGHTS)) == ["base_model.model.lm_head.weight"]
    assert not (tmp_path / "a" / files.ADAPTER_CONFIG).exists()
    files.load_adapter(base, tmp_path / "a")
    assert comparing.max_difference(comparing.logits_of(base, rows), tuned) == 0
    method_of("linear_probe", base).merge(base)
    base.save_pretrained(tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not merged.config.tie_word_embeddings
    assert comparing.max_difference(comparing.logits_of(merged.eval(), rows), tuned) == 0


def test_head_of_a_half_precision_base_is_float32_until_it_is_merged():
    probed = make_model(tie_word_embeddings=True).to(torch.bfloat16)
    method_of("linear_probe", probed).attach(probed, SETTINGS)
    assert probed.lm_head.weight.dtype == torch.float32
    tuned = comparing.logits_of(probed, [[7, 8, 9]])
    method_of("linear_probe", probed).merge(probed)
    assert {parameter.dtype for parameter in probed.parameters()} == {torch.bfloat16}
    assert comparing.max_difference(comparing.logits_of(probed, [[7, 8, 9]]), tuned) <= 0.05


@pytest.mark.parametrize("name", ["sft", "classification"])
@pytest.mark.parametrize("packing", [True, False])
def test_features_are_the_states_that_predict_in_the_order_of_the_examples(tmp_path, name, packing):
    """Case 70: also of a model with dropout that stands in training mode."""
    objective = OBJECTIVES[name]
    probed = make_model("gpt2", **DROPOUT)
    examples = chat_examples(tmp_path) if name == "sft" else labelled_examples(tmp_path)
    if name == "classification":
        probed = classifier.build(probed, Classes(("0", "1", "2"), 0))
    plan = replace(plan_of(micro_batch_tokens=60), packing=packing)
    found = features.features_of(source(probed.train(), objective, plan), examples)
    assert probed.training
    probed.eval()
    for indices in ([3], [5, 0, 17], range(len(examples))):
        batch = found.micro_batch(indices)
        whole = batches.collate([examples[i] for i in indices])
        positions, targets = objective.places(whole)
        with attention.packed(probed), torch.no_grad():
            states = model.hidden_states(probed, whole, True)[positions]
        torch.testing.assert_close(batch.features, states, atol=1e-5, rtol=1e-5)
        assert torch.equal(batch.labels[0], targets)
        assert (objective.weight(batch), len(batch), batch.row_ids) == (len(targets), len(whole), whole.row_ids)


@pytest.mark.parametrize("objective", [sft, classification], ids=["sft", "classification"])
def test_training_on_features_is_training_through_the_frozen_body(tmp_path, objective):
    examples = chat_examples(tmp_path) if objective is sft else labelled_examples(tmp_path)

    def run(on_features):
        probed = make_model()
        if objective is classification:
            probed = classifier.build(probed, Classes(("0", "1", "2"), 0))
        method = method_of("linear_probe", probed)
        method.attach(probed, SETTINGS)
        body = [(name, p.clone()) for name, p in probed.named_parameters() if not p.requires_grad]
        plan = plan_of(steps=5)
        found = features.features_of(source(probed, objective), examples) if on_features else None
        optimizer = optimizers.make_optimizer(probed, plan.training)
        job = train.Job(probed, method, objective, optimizer, Engine(), found)
        steps = list(train.train(job, examples, plan))
        assert all(torch.equal(dict(probed.named_parameters())[name], p) for name, p in body)
        loss = train.mean_loss(probed, examples, plan, objective.token_losses, found)
        return [(s.loss, s.tokens, s.supervised_tokens) for s in steps], loss

    (through, through_loss), (cached, cached_loss) = run(False), run(True)
    assert through[0][0] > through[-1][0]
    assert cached_loss == pytest.approx(through_loss, rel=1e-4)
    for one, other in zip(through, cached, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_pass_is_skipped_only_where_everything_that_shaped_the_features_is_the_same(tmp_path, passes):
    examples, probed = chat_examples(tmp_path), attached()
    first = features.features_of(source(probed), examples)
    assert torch.equal(features.features_of(source(probed), examples).values, first.values)
    assert len(passes) == 1
    tokens = examples[3].tokens
    other_id = replace(tokens, input_ids=[*tokens.input_ids[:-1], 7])
    start = tokens.supervised.index(True)
    moved = [i == start - 1 or (wanted and i != start) for i, wanted in enumerate(tokens.supervised)]
    other_mask = replace(tokens, supervised=moved)
    for changed in (other_id, other_mask):
        features.features_of(source(probed), [*examples[:3], replace(examples[3], tokens=changed), *examples[4:]])
    features.features_of(source(probed), examples[:-1])
    features.features_of(source(probed), examples[::-1])
    assert len(passes) == 5
    features.features_of(source(probed, base={"model.safetensors": "1"}), examples)
    features.features_of(source(probed, template="other"), examples)
    features.features_of(source(probed, objective=classification), labelled_examples(tmp_path))
    features.features_of(source(probed, plan=replace(plan_of(), attention="eager")), examples)
    features.features_of(source(make_model().to(torch.bfloat16)), examples)
    assert len(passes) == 10


def test_changed_label_reuses_the_features_and_changes_the_target(tmp_path, passes):
    probed = classifier.build(make_model(), Classes(("0", "1", "2"), 0))
    first = features.features_of(source(probed, classification), labelled_examples(tmp_path))
    rows = [{**LABELLED[0], "label": 2}, *LABELLED[1:]]
    second = features.features_of(source(probed, classification), labelled_examples(tmp_path, rows))
    assert len(passes) == 1
    assert (first.targets[0], second.targets[0]) == (0, 2)
    assert torch.equal(first.values, second.values)


@pytest.mark.parametrize("damage", ["flipped bit", "shortened", "other shape", "no facts", "broken facts"])
def test_damaged_cache_is_computed_again(tmp_path, cache, passes, damage, capfd):
    examples, probed = chat_examples(tmp_path), attached()
    first = features.features_of(source(probed), examples).values.clone()
    [path] = cache.iterdir()
    values, facts = path / features.VALUES, path / features.FACTS
    content = values.read_bytes()
    if damage == "flipped bit":
        values.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    elif damage == "shortened":
        values.write_bytes(content[:-4])
    elif damage == "other shape":
        folder.write_json(facts, {**folder.read_json(facts), "shape": [1, 64]})
    elif damage == "no facts":
        facts.unlink()
    else:
        facts.write_text("{")
    assert torch.equal(features.features_of(source(probed), examples).values, first)
    assert len(passes) == 2
    assert features.is_whole(path, {k: v for k, v in folder.read_json(facts).items() if k != "sha256"})


def test_interrupted_pass_leaves_nothing_that_looks_complete(tmp_path, cache, passes):
    examples, probed = chat_examples(tmp_path), attached()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features.features_of(replace(source(probed), after_batch=stop), examples)
    assert list(cache.iterdir()) == []
    killed, running = cache / f"{folder.IN_PROGRESS}999999999-x", cache / f"{folder.IN_PROGRESS}1-x"
    killed.mkdir()
    running.mkdir()
    features.features_of(source(probed), examples)
    assert not killed.exists()
    assert running.exists()
    assert len(passes) == 2


@pytest.mark.parametrize("name", ["sft", "classification"])
def test_same_recipe_run_twice_skips_the_pass_and_gives_the_same_bytes(tmp_path, capfd, name, passes):
    save_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", CHAT_ROWS if name == "sft" else LABELLED)
    sections = {"data": {"validation": "train.jsonl", "test": "train.jsonl"}, "objective": {"name": name}}
    found = []
    for output in ("one", "two"):
        path = write_recipe(tmp_path, **sections, output={"dir": output, "save": "both"})
        text = path.read_text().replace("alpha: 8", "").replace("rank: 4", "").replace("dropout: 0.0", "")
        path.write_text(text.replace("name: lora", "name: linear_probe"))
        report = training.train_run(recipe.load(path))
        assert all(gate["passed"] for gate in report["gates"])
        found.append((tmp_path / output / "adapter" / files.ADAPTER_WEIGHTS).read_bytes())
        manifest = json.loads((tmp_path / output / "manifest.json").read_text())
        assert manifest["trainable"] == manifest["changed"] == manifest["saved"]
    assert found[0] == found[1]
    assert len(passes) == 1  # the validation rows are the training rows
    assert "the pass is skipped" in capfd.readouterr().err
