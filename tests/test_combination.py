"""`ftune merge A B` of runs, from outside and in: the result measured beside each parent. Numbers: trust cases."""

import json

import pytest
from conftest import CHAT_ROWS, chat, ftune, run, save_base, write_rows
from safetensors.torch import load_file, save_file

from ftune import evaluate, folder
from ftune.artifacts import files
from ftune.artifacts.combined import RECORD
from ftune.artifacts.combining import combination
from ftune.data import Example
from ftune.run.afterwards import evaluate_target, merge_target
from ftune.run.combination import merge_several
from ftune.run.targets import resolve
from ftune.statistics import paired_difference


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on one base: one answers with `a`s and has a probe, the other with `b`s."""
    place = tmp_path_factory.mktemp("runs")
    save_base(place / "base")
    write_rows(place / "probe.jsonl", [{"suite": "s", **chat(f"q{i}", "a")} for i in range(6)] + [{"text": "words"}])
    found = {}
    for letter in "ab":
        write_rows(place / f"{letter}.jsonl", [chat(f"say {'xyz'[i % 3]}{i % 5}", letter) for i in range(24)])
        found[letter] = run(
            place,
            data={"train": f"{letter}.jsonl", "test": f"{letter}.jsonl"},
            evaluation={
                "few_shot": 0,
                "max_new_tokens": 4,
                "metric": "contains",
                **({"probe": "probe.jsonl"} if letter == "a" else {}),
            },
            training={"max_steps": 30, "batch_size": 8, "learning_rate": 0.02, "optimizer": "adamw"},
            output={"dir": f"run-{letter}"},
        )[1]
    return found


def test_each_parents_task_is_measured_on_both_with_a_paired_interval(runs, tmp_path):
    """The parent's score is what its own report says; the combined one what an evaluation of the folder says."""
    targets = [resolve(runs["a"]), resolve(runs["b"] / "adapter")]
    told = merge_several(targets, tmp_path / "both", combination(2, "0.9,0.2", "linear"), overwrite=False)
    assert folder.read_json(tmp_path / "both" / RECORD) == {key: told[key] for key in told if key != "output"}
    for letter, parent in zip("ab", told["adapters"], strict=True):
        report, task = folder.read_json(runs[letter] / "report.json"), parent["task"]
        assert (task["metric"], task["n"], task["parent"]) == ("contains", 24, report["task"]["tuned"])
        again = evaluate_target(resolve(tmp_path / "both", recipe_path=runs[letter] / "recipe.yaml"))
        assert task["combined"] == again["task"]["tuned"]
        assert task["gain"] == pytest.approx(task["combined"] - task["parent"])
        low, high = task["ci95"]
        assert low <= task["gain"] <= high
        assert not parent["reason"]
    assert told["adapters"][0]["task"]["parent"] == 1.0
    assert told["adapters"][0]["forgetting"]["worst_drop"] is not None
    assert told["adapters"][1]["forgetting"] is None
    assert told["adapters"][1]["task"]["gain"] < 0 <= told["adapters"][0]["task"]["parent"]


def test_the_interval_is_that_of_the_paired_scores(runs, tmp_path, monkeypatch):
    """Scored by hand: the parent has all right, the combined model every third item."""
    real = evaluate.score

    def scored(model, tokenizer, examples, metric, tokens, description, shots=()):
        found = real(model, tokenizer, examples, metric, tokens, description, shots)
        is_parent = "base" in description
        assert all(isinstance(example, Example) for example in examples)
        scores = [1.0 if is_parent or i % 3 == 0 else 0.0 for i in range(len(examples))]
        return type(found)(**{**vars(found), "scores": scores})

    monkeypatch.setattr(evaluate, "score", scored)
    targets = [resolve(runs["a"] / "adapter"), resolve(runs["b"])]
    told = merge_several(targets, tmp_path / "both", combination(2, "1,1", "ties"), overwrite=False)
    expected = paired_difference([1.0] * 24, [1.0, 0.0, 0.0] * 8)
    for parent in told["adapters"]:
        assert (parent["task"]["parent"], parent["task"]["combined"]) == (1.0, pytest.approx(1 / 3))
        assert parent["task"]["ci95"] == pytest.approx([-expected.ci95[1], -expected.ci95[0]])


def test_what_cannot_be_measured_says_why(runs, tmp_path):
    adapter = tmp_path / "alone"
    adapter.mkdir()
    for file in (runs["a"] / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    rows = runs["b"].parent / "b.jsonl"
    content = rows.read_bytes()
    rows.unlink()
    try:
        targets = [resolve(adapter), resolve(runs["b"])]
        told = merge_several(targets, tmp_path / "both", combination(2, "1,1", "dare"), overwrite=False)
    finally:
        rows.write_bytes(content)
    reasons = [parent["reason"] for parent in told["adapters"]]
    assert reasons[0] == "no run, so it has no task to measure"
    assert reasons[1].startswith("its data cannot be read any more: no such file")
    assert all(parent["task"] is None for parent in told["adapters"])


def test_command_line_combines_tells_and_refuses(runs, tmp_path):
    both = [runs["a"], runs["b"]]
    arguments = ["--weights", "0.7,0.3", "--combine", "ties", "--density", "0.3", "--output", tmp_path / "both"]
    done = ftune("merge", *both, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["combine"], told["density"], len(told["adapters"])) == ("ties", 0.3, 2)
    assert ftune("verify", tmp_path / "both").returncode == 0
    assert ftune("merge", *both, *arguments).returncode == 2
    shown = ftune("merge", *both, *arguments, "--overwrite")
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.split())
    assert all(part in words for part in ("ties, density 0.3", "How far from each parent", "left of their skills"))
    for wrong, what in [
        ([*both, "--output", tmp_path / "x"], "several adapters need a weight each"),
        ([both[0], "--weights", "1"], "only one adapter is named, and --weights is for several"),
        ([*both, "--weights", "1,1", "--output", tmp_path / "x", "--strength", "0.5"], "cannot be combined with this"),
        ([*both, "--weights", "1,1"], "name the folder to write"),
    ]:
        refused = ftune("merge", *wrong)
        assert refused.returncode == 2
        assert what in " ".join(refused.stderr.split())
        assert not (tmp_path / "x").exists()


def test_classifier_runs_are_measured_by_their_labels(tmp_path):
    save_base(tmp_path / "base", "qwen2")
    found = []
    for name, shift in (("one", 0), ("two", 1)):
        rows = [{"text": "abc"[i % 3] * (1 + i % 4), "label": (i + shift) % 3} for i in range(24)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        sections = {"objective": {"name": "classification"}, "evaluation": {"metric": "accuracy", "probe": "off"}}
        sections |= {"data": {"train": f"{name}.jsonl", "test": f"{name}.jsonl"}, "output": {"dir": f"run-{name}"}}
        found.append(run(tmp_path, training={"max_steps": 20, "learning_rate": 0.02}, **sections)[1])
    targets = [resolve(path) for path in found]
    told = merge_several(targets, tmp_path / "both", combination(2, "1,0.1", "linear"), overwrite=False)
    for path, parent in zip(found, told["adapters"], strict=True):
        report, task = folder.read_json(path / "report.json"), parent["task"]
        assert (task["metric"], task["n"], task["parent"]) == ("accuracy", 24, report["task"]["tuned"])
        assert task["ci95"][0] <= task["gain"] <= task["ci95"][1]
    assert told["adapters"][0]["task"]["combined"] > told["adapters"][1]["task"]["combined"]


# Another base, in an evaluation (case 75), and which adapter was measured (case 101)


def test_evaluation_names_the_adapter_and_marks_a_forced_base(tmp_path):
    save_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", CHAT_ROWS)
    write_rows(tmp_path / "test.jsonl", CHAT_ROWS[:2])
    report, path = run(tmp_path, data={"train": "train.jsonl", "test": "test.jsonl"})
    digest = files.adapter_digest(path / "adapter")
    assert report["artefact"]["adapter_sha256"] == digest
    again = evaluate_target(resolve(path))
    assert again["artefact"]["adapter_sha256"] == digest
    assert "forced_base" not in again["artefact"]
    other = save_base(tmp_path / "other", seed=1)
    target = resolve(path / "adapter", str(other), path / "recipe.yaml", is_forced=True)
    measured = evaluate_target(target)
    assert measured["artefact"]["forced_base"] == ["model.safetensors"]
    assert measured["artefact"]["adapter_sha256"] == digest


def test_ten_times_the_adapter_scores_otherwise_and_has_another_sum(runs, tmp_path):
    """Case 101: the report's sha256 and loss follow the file that was measured."""
    recipe = runs["a"] / "recipe.yaml"
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (runs["a"] / "adapter").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    weights = changed / files.ADAPTER_WEIGHTS
    tensors = load_file(weights)
    save_file({name: t * 10 if "lora_B" in name else t for name, t in tensors.items()}, weights)
    found = [evaluate_target(resolve(path, recipe_path=recipe)) for path in (runs["a"] / "adapter", changed)]
    assert found[0]["artefact"]["adapter_sha256"] != found[1]["artefact"]["adapter_sha256"]
    assert found[0]["artefact"]["keys_loaded"] == found[1]["artefact"]["keys_loaded"] == "28/28"
    assert found[0]["task"]["tuned"] != found[1]["task"]["tuned"]
    assert found[0]["forgetting"]["kl_to_base"] != found[1]["forgetting"]["kl_to_base"]


def test_one_target_is_merged_as_before(runs, tmp_path):
    told = merge_target(resolve(runs["a"]), tmp_path / "merged", 1.0, overwrite=False)
    assert not (tmp_path / "merged" / RECORD).exists()
    assert "combination" not in files.read_card(tmp_path / "merged")
    assert told["merged_max_diff"] <= told["tolerance"]
