"""The same recipe gives the same bytes: twice, in fresh processes, with other hash seeds and workers (case 51)."""

import os
import subprocess
import sys

import pytest
from conftest import CHAT_ROWS, metrics, run, save_base, write_recipe, write_rows

from ftune import folder
from ftune.data import preparing

METHODS = {
    "lora": {"name": "lora", "rank": 4, "dropout": 0.1},
    "lora, olora": {"name": "lora", "rank": 4, "init": "olora"},
    "dora": {"name": "dora", "rank": 4, "dropout": 0.1},
    "adalora": {"name": "adalora", "initial_rank": 4, "target_rank": 2, "dropout": 0.1},
    "vera": {"name": "vera", "rank": 8, "dropout": 0.1},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "bottleneck": {"name": "bottleneck", "size": 8},
    "prefix_tuning": {"name": "prefix_tuning", "virtual_tokens": 3, "projection": True},
    "prompt_tuning": {"name": "prompt_tuning", "virtual_tokens": 3},
    "linear_probe": {"name": "linear_probe"},
    "full": {"name": "full"},
}
CHANGING = ("tokens_per_second", "memory")
"""Figures of a step that are of the machine, not of the run."""
ROWS = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "good" if i % 2 else "bad"} for i in range(16)]


def outcome(path):
    """Everything of a run that the recipe decides: weights, samples, steps, and the report's numbers."""
    weights = [*path.glob("adapter/*.safetensors"), *path.glob("merged/*.safetensors")]
    assert weights
    report = folder.read_json(path / "report.json")
    for name in ("cost", "name"):
        del report[name]
    return {
        "weights": [folder.sha256_file(file) for file in sorted(weights)],
        "samples": (path / "samples.jsonl").read_text() if (path / "samples.jsonl").exists() else None,
        "steps": [{k: v for k, v in line.items() if k not in CHANGING} for line in metrics(path)],
        "report": report,
    }


@pytest.fixture
def both(tmp_path, monkeypatch):
    """A base with biases, conversations and labelled rows, a test set of each."""
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    save_base(tmp_path / "base", "qwen2")
    write_rows(tmp_path / "train.jsonl", CHAT_ROWS)
    write_rows(tmp_path / "test.jsonl", CHAT_ROWS[:2])
    write_rows(tmp_path / "labelled.jsonl", ROWS)
    write_rows(tmp_path / "labelled-test.jsonl", ROWS[:4])
    return tmp_path


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same_bytes_twice_and_others_with_another_seed(both, name):
    sections = {"method": METHODS[name], "data": {"test": "test.jsonl"}, "evaluation": {"max_new_tokens": 2}}
    found = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        training = {"max_steps": 2, "optimizer": "adamw", "seed": seed}
        found.append(outcome(run(both, output={"dir": place}, training=training, **sections)[1]))
    assert found[0] == found[1]
    assert found[0]["weights"] != found[2]["weights"]
    assert [s["row_ids"] for s in found[0]["steps"]] != [s["row_ids"] for s in found[2]["steps"]]


@pytest.mark.parametrize("name", ["lora", "linear_probe", "full"])
def test_a_classifier_gives_the_same_bytes_twice_and_others_with_another_seed(both, name):
    """With its new head, which is drawn from the seed too."""
    sections = {
        "method": METHODS[name],
        "objective": {"name": "classification"},
        "data": {"train": "labelled.jsonl", "test": "labelled-test.jsonl"},
        "evaluation": {"metric": "accuracy"},
    }
    found = [
        outcome(run(both, output={"dir": place}, training={"max_steps": 2, "seed": seed}, **sections)[1])
        for place, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert found[0] == found[1]
    assert found[0]["weights"] != found[2]["weights"]
    assert found[0]["steps"][0]["loss"] != found[2]["steps"][0]["loss"]


def test_fresh_processes_with_other_hash_seeds_give_the_same_bytes(both):
    """Sets and dictionaries have another order under each PYTHONHASHSEED; the seed is set before anything random."""
    sections = {
        "method": {**METHODS["lora"], "target_modules": ["q_proj", "v_proj", "up_proj"]},
        "data": {"test": "test.jsonl", "validation": 0.2, "deduplicate": "near", "decontaminate": "report"},
        "evaluation": {"max_new_tokens": 2, "few_shot": 2},
    }
    found = []
    for number in ("1", "2"):
        recipe = write_recipe(both, output={"dir": f"run-{number}"}, training={"max_steps": 3}, **sections)
        environment = {**os.environ, "PYTHONHASHSEED": number}
        command = [sys.executable, "-m", "ftune", "train", str(recipe)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        found.append(outcome(both / f"run-{number}"))
    assert found[0] == found[1]


def test_number_of_processes_that_prepare_rows_changes_nothing(both, monkeypatch):
    """None beside this one, and two."""
    found = []
    for count in (1, 2):
        monkeypatch.setattr(preparing, "num_workers", lambda count=count: count)
        monkeypatch.setenv("FTUNE_CACHE", str(both / f"cache-{count}"))
        _, path = run(both, method=METHODS["lora"], output={"dir": f"run-{count}"}, training={"max_steps": 2})
        found.append(outcome(path))
    assert found[0] == found[1]


def test_manifest_says_whether_the_same_bytes_come_again(both):
    """On a CPU they do; what stands against it on a GPU is named there, and on screen."""
    import torch

    from ftune.run.training import determinism

    _, path = run(both, method=METHODS["lora"])
    manifest = folder.read_json(path / "manifest.json")
    assert (manifest["deterministic"], manifest["not_deterministic"]) == (True, [])
    on_a_gpu = determinism(torch.device("cuda"))
    assert on_a_gpu["deterministic"] is False
    assert on_a_gpu["not_deterministic"]
