"""Classification: labels, pooling, the head beside every method, and what is said of it. Numbers: trust cases."""

import json
import os
import subprocess
import sys

import elsewhere
import pytest
import torch
from conftest import make_model, make_tokenizer, save_base, write_recipe, write_rows
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_methods import SETTINGS, randomize
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from ftune import attention, batches, classifier, comparing, data, recipe
from ftune.artifacts import files
from ftune.classifier import Classes
from ftune.data import Rules
from ftune.errors import UserError
from ftune.methods.base import trainable
from ftune.methods.head import method_of
from ftune.objectives import classification
from ftune.run import afterwards, preview, targets, training, verifying
from ftune.settings import LinearProbeSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # of AdaLoRA's own form
]

LABELS = ("neg", "neu", "pos")
TEXTS = ["so bad", "it is a thing", "good good", "not bad at all", "fine", "worse than all the others"]
ROWS = [{"text": text * (1 + i % 3), "label": LABELS[i % 3]} for i, text in enumerate(TEXTS * 4)]
ALL = {
    **{name: SETTINGS[name] for name in SETTINGS if name != "prefix, projection"},
    "linear probe": LinearProbeSettings(),
}
IN_PEFT = ["lora", "lora, patterns", "dora", "ia3", "adalora", "vera", "prefix", "prompt"]


def read(tokenizer, tmp_path, rows=ROWS, **rules):
    classifier.choose_pad(tokenizer)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = data.load(tokenizer, [data.Source(path)], Rules(format="labelled", **rules))
    return data.with_class_ids(found, data.sorted_labels(found.examples), "rows").examples


def make_classifier(kind="llama", pad=0, **changes):
    return classifier.build(make_model(kind, **changes), Classes(LABELS, pad)).eval()


def packed_logits(model, examples):
    with attention.packed(model), torch.no_grad():
        return classification.row_logits(model, batches.collate(examples), True)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_labels_are_sorted_whatever_the_order_of_rows_and_the_hash_seed(hash_seed):
    """Case 33."""
    code = """
from ftune.data.labels import in_order
for labels in (["neg", "pos", "neu"], ["pos", "neu", "neg"], [10, 9, 1], [1, "b", "a"]):
    print(",".join(in_order(labels)))
"""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert told.stdout.split() == ["neg,neu,pos", "neg,neu,pos", "1,9,10", "1,a,b"]


@pytest.mark.parametrize("label", [1.0, True, None, [1], "", "  "])
def test_only_text_and_whole_numbers_are_labels(tmp_path, label):
    """Case 33: a number with a point is never cast to a class id."""
    with pytest.raises(UserError, match=r"rows.jsonl:2.*label"):
        read(make_tokenizer(), tmp_path, [{"text": "a", "label": "x"}, {"text": "b", "label": label}])


def test_label_that_training_lacks_is_told_with_its_row(tmp_path):
    tokenizer = make_tokenizer()
    found = data.load(tokenizer, [data.Source(write_rows(tmp_path / "test.jsonl", ROWS[:3]))], Rules(format="labelled"))
    with pytest.raises(UserError, match=r"data.test \(row test.jsonl:3\): label 'pos' is in no training row"):
        data.with_class_ids(found, ("neg", "neu"), "data.test")
    with pytest.raises(UserError, match="at least two labels"):
        data.sorted_labels(found.examples[:1])


def test_class_id_stands_at_the_last_token_and_the_text_is_plain(tmp_path):
    """Also with a chat template; a cut row keeps its label."""
    tokenizer = make_tokenizer()
    rows = read(tokenizer, tmp_path, max_length=5, too_long="truncate")
    for example, row in zip(rows, ROWS, strict=True):
        assert example.tokens.input_ids == tokenizer(row["text"])["input_ids"][:5]
        assert example.tokens.labels == [-100] * (len(example.tokens) - 1) + [LABELS.index(row["label"])]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(
    "tokens",
    [{}, {"pad": None}, {"pad": "<eos>"}, {"pad": "<eos>", "eos": "<eos>", "add_bos": True}],
    ids=["pad", "no pad", "pad is eos", "pad is eos, bos in front"],
)
def test_last_real_token_is_pooled_whatever_the_padding(kind, tokens, tmp_path):
    """Case 105: packed, alone, and padded on either side; also rows that end with the end-of-sequence token."""
    tokenizer = make_tokenizer(**tokens)
    texts = [*TEXTS, "ends<eos>", "a<eos><eos>"]
    rows = [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(texts)]
    examples = read(tokenizer, tmp_path, rows)
    assert [example.tokens.input_ids for example in examples] == tokenizer(texts)["input_ids"]
    model = make_classifier(kind, tokenizer.pad_token_id)
    ours = packed_logits(model, examples)
    by_mask = [
        model.score(model.base_model(torch.tensor([e.tokens.input_ids])).last_hidden_state[0, -1]) for e in examples
    ]
    torch.testing.assert_close(ours, torch.stack(by_mask).detach(), atol=1e-6, rtol=1e-5)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        padded = tokenizer(texts, padding=True, return_tensors="pt")
        positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        theirs = model(padded["input_ids"], attention_mask=padded["attention_mask"], position_ids=positions).logits
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-5)


def test_padding_that_ends_a_text_is_not_pooled_where_there_is_no_other_token(tmp_path):
    """Case 105: one special token for everything, as GPT-2 has it."""
    tokenizer = make_tokenizer(pad=None, eos="<eos>")
    tokenizer.bos_token = tokenizer.unk_token = "<eos>"
    [example, _] = read(tokenizer, tmp_path, [{"text": "ab<eos>", "label": 0}, {"text": "c", "label": 1}])
    assert tokenizer.pad_token == "<eos>"
    assert tokenizer.decode(example.tokens.input_ids) == "ab"


def test_loss_is_cross_entropy_of_each_row(tmp_path):
    model, examples = make_classifier(), read(make_tokenizer(), tmp_path)
    wanted = torch.tensor([LABELS.index(row["label"]) for row in ROWS])
    by_hand = functional.cross_entropy(packed_logits(model, examples), wanted, reduction="sum")
    parts = list(batches.micro_batches(examples, 40))
    with attention.packed(model):
        ours = sum(classification.summed_loss(model, part, True) for part in parts)
    torch.testing.assert_close(ours, by_hand, atol=1e-4, rtol=1e-5)
    assert len(parts) > 1
    assert sum(map(classification.weight, parts)) == len(ROWS)


def test_head_is_new_and_drawn_from_the_seed():
    heads = [classifier.build(make_model(), Classes(LABELS, 0), seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    body = dict(make_model().base_model.named_parameters())
    assert all(torch.equal(p, body[name]) for name, p in make_classifier().base_model.named_parameters())
    with pytest.raises(UserError, match="a classifier already"):
        classifier.build(make_classifier(), Classes(LABELS, 0))


@pytest.fixture(params=ALL)
def trained(request, tmp_path):
    """A classifier as if trained by a method: base folder, settings, model, its folder."""
    settings, base = ALL[request.param], save_base(tmp_path / "base", "qwen2")
    model = load(base, Classes(LABELS, 0))
    method_of(settings.name, model).attach(model, settings)
    randomize(model)
    if settings.name == "full":
        files.save_model(tmp_path / "saved", model, make_tokenizer(), {})
    else:
        card = {"method": settings.model_dump(mode="json")}
        files.save_adapter(tmp_path / "saved", model, make_tokenizer(), settings, str(base), card)
    return base, settings, model, tmp_path / "saved"


def load(base, classes):
    return classifier.load(recipe.ModelSection(base=base), torch.float32, torch.device("cpu"), classes)


def difference(model, reference):
    rows = comparing.proof_rows_for(reference)
    return comparing.max_difference(comparing.logits_of(model, rows), comparing.logits_of(reference, rows))


def test_every_method_trains_and_saves_the_head_and_keeps_the_labels(trained):
    """Cases 33, 57 and 58."""
    base, settings, model, path = trained
    assert "score.weight" in trainable(model)
    assert files.read_classes(path) == Classes(LABELS, 0)
    card = json.loads((path / ("config.json" if settings.name == "full" else files.CARD)).read_text())
    assert card.get("labels", card)["id2label"] == {"0": "neg", "1": "neu", "2": "pos"}
    if settings.name == "full":
        reloaded = load(path, None)
    else:
        reloaded = load(base, files.read_classes(path))
        files.load_adapter(reloaded, path)
    assert torch.equal(reloaded.score.weight, model.score.weight)
    assert difference(reloaded, model) <= 1e-5


def test_merged_classifier_is_a_plain_one_with_the_same_logits(trained, tmp_path):
    _, settings, model, _ = trained
    rows = comparing.proof_rows_for(model)
    before = comparing.logits_of(model, rows)
    method = method_of(settings.name, model)
    if settings.name in ("prefix_tuning", "prompt_tuning", "bottleneck"):
        with pytest.raises(UserError, match="cannot be merged"):
            method.merge(model)
        return
    method.merge(model)
    model.save_pretrained(tmp_path / "merged")
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config.id2label == dict(enumerate(LABELS))
    assert comparing.max_difference(comparing.logits_of(plain.eval(), rows), before) <= 1e-5


BY_TRANSFORMERS = ["lora", "lora, patterns", "ia3", "adalora"]
"""Adapters whose folder transformers loads itself: neither vera nor virtual tokens, and of dora (5.23, PEFT's own files
too) it silently leaves the magnitudes where they started."""


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Live logits of classifiers, and what PEFT alone and ftune alone find in fresh processes."""
    place, jobs, live = tmp_path_factory.mktemp("judged"), [], {}
    base = save_base(place / "base", "qwen2")
    for name in IN_PEFT:
        settings, path = ALL[name], place / name
        model = load(base, Classes(LABELS, 0))
        method_of(settings.name, model).attach(model, settings)
        files.save_adapter(path, randomize(model), make_tokenizer(), settings, str(base), {})
        rows = comparing.proof_rows_for(model)
        live[name] = torch.stack(comparing.logits_of(model, rows))
        job = {"name": name, "base": base, "adapter": path, "theirs": place / f"{name} by PEFT", "rows": rows}
        jobs.append({**job, "labels": len(LABELS), "by transformers": name in BY_TRANSFORMERS})
    return live, elsewhere.ask("peft", jobs, place), elsewhere.ask("ftune", jobs, place), place


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_transformers_and_ftune_give_the_same_logits_from_the_adapter(judged, name):
    """Case 58, in fresh processes. There may be no config.json, beside which transformers looks for a whole model."""
    live, peft, ftune, place = judged
    config = json.loads((place / name / files.ADAPTER_CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    found = [peft[f"{name}: ours"], ftune[f"{name}: ours"]]
    found += [peft[f"{name}: by transformers"]] if name in BY_TRANSFORMERS else []
    for logits in found:
        assert comparing.max_difference([logits], [live[name]]) <= 1e-6
    theirs = peft[f"{name}: theirs"]
    assert comparing.max_difference([ftune[f"{name}: theirs"]], [theirs]) <= 1e-6
    assert comparing.max_difference([theirs], [live[name]]) > 1e-3


def test_peft_classifier_is_loaded_with_its_head_or_refused(tmp_path):
    base = save_base(tmp_path / "base")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
    theirs = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "a")
    classes = files.read_classes(tmp_path / "a")
    assert classes.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    model = load(base, classes)
    files.load_adapter(model, tmp_path / "a")
    assert difference(theirs, model) <= 1e-5
    weights = load_file(tmp_path / "a" / files.ADAPTER_WEIGHTS)
    save_file({k: v for k, v in weights.items() if "score" not in k}, tmp_path / "a" / files.ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="missing: score"):
        files.load_adapter(load(base, classes), tmp_path / "a")


@pytest.fixture
def workspace(tmp_path):
    save_base(tmp_path / "base", tokenizer=make_tokenizer(pad=None), pad_token_id=None)
    write_rows(tmp_path / "train.jsonl", [*ROWS, {"text": "and more", "label": "neg"}])
    write_rows(tmp_path / "test.jsonl", ROWS[:9])
    return tmp_path


def write(folder, **sections):
    own = {"objective": {"name": "classification"}, "data": {"train": "train.jsonl", "test": "test.jsonl"}}
    return recipe.load(write_recipe(folder, **{**own, **sections}))


@pytest.mark.parametrize("method", [{"rank": 4, "dropout": 0.0}, {"name": "full"}], ids=["lora", "full"])
def test_run_leaves_a_classifier_and_its_evidence(workspace, method):
    settings = write(workspace, method=method, training={"max_steps": 60}, output={"dir": "run", "save": "both"})
    report = training.train_run(settings)
    task, run = report["task"], workspace / "run"
    assert task["metric"] == "accuracy"
    assert (task["zero_shot"], task["few_shot"]) == (pytest.approx(1 / 3), None)
    assert "'neg'" in task["reason"]
    assert task["tuned"] > 0.9
    assert sum(map(sum, task["confusion"]["counts"])) == 9
    assert all(gate["passed"] for gate in report["gates"])
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert (sample["prompt"], sample["expected"], sample["base"]) == ("so bad", "neg", None)
    config = json.loads((run / "merged" / "config.json").read_text())
    assert (config["pad_token_id"], config["id2label"]["2"]) == (1, "pos")
    assert "| neg | 3 | 0 | 0 |" in (run / "report.md").read_text()
    page = (run / "report.html").read_text()
    assert "neg taken for neg: 3 of 3" in page
    assert "nats per row" in page
    assert "per supervised token" not in page
    for path in (run, run / "merged"):
        target = targets.resolve(path)
        assert verifying.verify_target(target)["passed"]
        assert afterwards.generate_from(target, "so bad", 8).startswith("neg  ")
    assert afterwards.evaluate_target(targets.resolve(run))["task"]["tuned"] == task["tuned"]


def test_plan_counts_the_labels_of_the_rows_and_says_when_there_are_none_to_read(workspace, capfd):
    settings = write(workspace)

    def trainable_of(methods=None):
        return [found["parameters"]["trainable"] for found in preview.plan_methods(settings, methods)]

    [three], every = trainable_of(), trainable_of("lora,ia3")
    assert capfd.readouterr().err == ""
    (workspace / "train.jsonl").unlink()
    assert trainable_of() == [three - 64]
    assert trainable_of("lora,ia3") == [count - 64 for count in every]
    assert "planned with 2 labels, as its rows were not read: no such file" in " ".join(capfd.readouterr().err.split())


def test_what_a_classifier_cannot_do_is_refused_by_name(workspace):
    write_rows(workspace / "test.jsonl", [{"text": "x", "label": "other"}])
    sections = {"evaluation": {"metric": "exact_match", "probe": "probe.jsonl"}}
    problems = preview.check(write(workspace, **sections))["problems"]
    told = {(problem["where"], problem["what"]) for problem in problems}
    assert {where for where, _ in told} == {"evaluation.metric", "evaluation.probe", "data.test (row test.jsonl:1)"}
    labels = {"data": {"train": "train.jsonl", "format": "labelled"}, "evaluation": {"metric": "f1"}}
    found = preview.check(write(workspace, objective={"name": "sft"}, **labels))["problems"]
    assert {problem["where"] for problem in found} == {"data.format", "evaluation.metric"}
