"""Runs end to end, in process: what they leave behind. Numbers: trust cases."""

import pytest
from conftest import (
    CHAT_ROWS,
    DROPOUT,
    adapter_bytes,
    metrics,
    run,
    save_base,
    write_rows,
)
from safetensors.torch import load_file

from ftune import folder
from ftune.artifacts import files
from ftune.errors import UserError
from ftune.methods.base import PREFIX


def test_run_leaves_what_the_contract_says(workspace):
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:4])
    report, path = run(workspace, data={"test": "test.jsonl", "validation": "test.jsonl"}, evaluation={"few_shot": 2})
    names = {entry.name for entry in path.iterdir()}
    assert names == {
        "recipe.yaml", "manifest.json", "plan.json", "metrics.jsonl", "adapter", "checkpoints", "samples.jsonl",
        "twins.jsonl",
        "report.json", "report.md", "report.html", "review.html", "junit.xml",
    }  # fmt: skip
    assert report == folder.read_json(path / "report.json")
    assert {"metric", "n", "zero_shot", "few_shot", "tuned", "gain", "ci95"} <= report["task"].keys()
    assert report["artefact"]["adapter_live"] is True
    assert report["artefact"]["reload_max_diff"] == 0.0
    assert report["artefact"]["merged_max_diff"] <= 1e-5
    assert {
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "supervised_tokens",
        "tokens_per_second",
        "memory",
        "row_ids",
    } <= metrics(path)[0].keys()
    assert len(folder.read_json_lines(path / "samples.jsonl")) == 4
    plan = folder.read_json(path / "plan.json")
    assert plan["parameters"]["trainable"] == sum(
        t.numel() for t in load_file(path / "adapter" / files.ADAPTER_WEIGHTS).values()
    )
    assert plan["measured"].keys() <= plan.keys()


def test_manifest_tells_what_was_trained_changed_and_saved(workspace):
    """Cases 44, 51, 53, 57: one set of names; the base's files keep their bytes; every checksum holds."""
    before = folder.checksums(workspace / "base")
    _, path = run(workspace)
    manifest = folder.read_json(path / "manifest.json")
    saved = {name.removeprefix(PREFIX) for name in load_file(path / "adapter" / files.ADAPTER_WEIGHTS)}
    assert set(manifest["trainable"]) == set(manifest["changed"]) == set(manifest["saved"]) == saved
    assert manifest["dtypes"] == ["float32"]
    assert folder.checksums(workspace / "base") == before == manifest["base"]
    assert folder.changed_files(path, manifest["files"]) == []
    assert {"adapter/adapter_model.safetensors", "report.html", "recipe.yaml"} <= manifest["files"].keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapter_weights_are_float32_and_small_updates_arrive(workspace, dtype):
    """Case 44."""
    _, path = run(
        workspace, model={"dtype": dtype}, training={"learning_rate": 1e-5, "max_steps": 5, "optimizer": "adamw"}
    )
    manifest = folder.read_json(path / "manifest.json")
    assert manifest["dtypes"] == ["float32"]
    assert set(manifest["changed"]) == set(manifest["trainable"])


def test_same_recipe_gives_the_same_bytes_and_another_seed_others(workspace):
    """Case 51."""
    outcomes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, path = run(workspace, method=DROPOUT, training={"seed": seed}, output={"dir": name})
        outcomes.append((adapter_bytes(path), [line["row_ids"] for line in metrics(path)]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] != outcomes[2][0]
    assert outcomes[0][1] != outcomes[2][1]


def test_evaluating_on_the_way_changes_nothing(workspace):
    """Case 47: mode and random state are as if it had not been."""
    write_rows(workspace / "validation.jsonl", CHAT_ROWS[:3])
    _, plain = run(workspace, method=DROPOUT, output={"dir": "plain"})
    sections = {
        "data": {"validation": "validation.jsonl"},
        "training": {"evaluate_every": 1},
        "output": {"dir": "watched"},
    }
    _, watched = run(workspace, method=DROPOUT, **sections)
    assert adapter_bytes(plain) == adapter_bytes(watched)


def test_packing_that_cannot_apply_is_an_error_and_row_by_row_works(tmp_path):
    """Case 21."""
    save_base(tmp_path / "base", "bloom", n_layer=2, n_head=4)
    write_rows(tmp_path / "train.jsonl", CHAT_ROWS)
    with pytest.raises(UserError, match=r"set data.packing: false"):
        run(tmp_path)
    assert not (tmp_path / "run").exists()
    report, _ = run(tmp_path, data={"packing": False})
    assert report["artefact"]["merged_max_diff"] <= 1e-5


def test_adapter_folder_keeps_template_and_tokenizer(workspace):
    """Case 17."""
    from transformers import AutoTokenizer

    template = (
        "{% for m in messages %}[{{m.role}}]{{m.content}}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (workspace / "mine.jinja").write_text(template)
    _, path = run(workspace, model={"chat_template": "mine.jinja"})
    assert AutoTokenizer.from_pretrained(path / "adapter").chat_template == template
