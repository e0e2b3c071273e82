"""Runs end to end, in process: what they leave behind, resuming, numbers. Numbers: trust cases."""

import json
import shutil

import pytest
import torch
from conftest import CHAT_ROWS, chat, make_model, make_tokenizer, save_base, write_recipe, write_rows
from safetensors.torch import load_file, save_file

from ftune import folder, recipe, train
from ftune.artifacts import files
from ftune.errors import Interrupted, RunError, UserError
from ftune.methods.base import PREFIX
from ftune.run import fitting
from ftune.run.training import train_run

DROPOUT = {"name": "lora", "rank": 4, "dropout": 0.1}


def run(workspace, resume=False, overwrite=False, **sections):
    loaded = recipe.load(write_recipe(workspace, **sections))
    return train_run(loaded, resume, overwrite), loaded.output.dir


def adapter_bytes(path):
    return (path / "adapter" / files.ADAPTER_WEIGHTS).read_bytes()


def metrics(path):
    return [line for line in folder.read_json_lines(path / "metrics.jsonl") if "loss" in line]


def test_run_leaves_what_the_contract_says(workspace):
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:4])
    report, path = run(workspace, data={"test": "test.jsonl", "validation": "test.jsonl"}, evaluation={"few_shot": 2})
    names = {entry.name for entry in path.iterdir()}
    assert names == {
        "recipe.yaml", "manifest.json", "plan.json", "metrics.jsonl", "adapter", "checkpoints", "samples.jsonl",
        "report.json", "report.md", "report.html", "junit.xml",
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


class Killed(BaseException):
    """Nothing may catch this."""


def kill_after(monkeypatch, step):
    """The process is gone right after this step's line was written: no checkpoint, no clean-up."""
    plain = train.train

    def dying(*args, **kwargs):
        for done in plain(*args, **kwargs):
            yield done
            if done.step == step:
                raise Killed

    monkeypatch.setattr(fitting.train, "train", dying)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_resumed_run_ends_with_the_bytes_of_an_undisturbed_one(workspace, monkeypatch, name):
    """Case 80, for a kill after each of the steps, mid-epoch and at epoch ends, with dropout, shuffling and AdamW."""
    sections = {
        "method": DROPOUT if name == "lora" else {"name": "full"},
        "training": {
            "max_steps": 12,
            "batch_size": 4,
            "micro_batch_tokens": 60,
            "optimizer": "adamw",
            "checkpoint_every": 3,
            "schedule": "cosine",
        },
    }
    _, clean = run(workspace, output={"dir": "clean"}, **sections)
    weights = "adapter/adapter_model.safetensors" if name == "lora" else "merged/model.safetensors"
    for step in (1, 3, 4, 8, 11, 12):
        with monkeypatch.context() as patch:
            kill_after(patch, step)
            with pytest.raises(Killed):
                run(workspace, output={"dir": f"killed-{step}"}, **sections)
        _, path = run(workspace, resume=True, output={"dir": f"killed-{step}"}, **sections)
        assert (path / weights).read_bytes() == (clean / weights).read_bytes()
        same = [[line[k] for k in ("step", "loss", "grad_norm", "learning_rate", "row_ids")] for line in metrics(path)]
        assert same == [
            [line[k] for k in ("step", "loss", "grad_norm", "learning_rate", "row_ids")] for line in metrics(clean)
        ]


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


def test_signal_saves_a_checkpoint_and_the_run_goes_on(workspace, monkeypatch):
    """Case 85."""
    import os
    import signal

    plain = train.train

    def with_signal(*args, **kwargs):
        for done in plain(*args, **kwargs):
            if done.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield done

    sections = {"training": {"checkpoint_every": 100}}
    _, clean = run(workspace, output={"dir": "clean"}, **sections)
    with monkeypatch.context() as patch:
        patch.setattr(fitting.train, "train", with_signal)
        with pytest.raises(Interrupted, match="after step 2 of 4; checkpoint saved") as caught:
            run(workspace, **sections)
    assert caught.value.exit_code == 130
    _, path = run(workspace, resume=True, **sections)
    assert adapter_bytes(path) == adapter_bytes(clean)


def test_damaged_checkpoint_is_found(workspace, monkeypatch):
    """Case 82: one flipped bit."""
    sections = {"training": {"checkpoint_every": 1}}
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        run(workspace, **sections)
    file = workspace / "run" / "checkpoints" / "step-000003" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"checksum mismatch: optimizer.safetensors"):
        run(workspace, resume=True, **sections)


def test_resume_refuses_what_would_bend_the_run(workspace, monkeypatch):
    """Case 87; an evaluation setting may change."""
    kill_after(monkeypatch, 3)
    sections = {"training": {"checkpoint_every": 1}}
    with pytest.raises(Killed):
        run(workspace, **sections)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"training.learning_rate: 0.01 -> 0.02"):
        run(workspace, resume=True, training={"checkpoint_every": 1, "learning_rate": 0.02})
    write_rows(workspace / "train.jsonl", CHAT_ROWS[1:])
    with pytest.raises(UserError, match="changed since this run began: data"):
        run(workspace, resume=True, **sections)
    write_rows(workspace / "train.jsonl", CHAT_ROWS)
    run(workspace, resume=True, evaluation={"max_new_tokens": 9}, **sections)


def test_folder_of_another_run_is_left_alone(workspace):
    """Case 86."""
    _, path = run(workspace)
    before = folder.checksums(path)
    with pytest.raises(UserError, match="holds a run already"):
        run(workspace)
    assert run(workspace, resume=True)[0]["already_complete"] is True
    assert folder.checksums(path) == before
    run(workspace, overwrite=True, training={"max_steps": 2})
    assert len(metrics(path)) == 2
    (workspace / "other").mkdir()
    (workspace / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        run(workspace, overwrite=True, output={"dir": "other"})


def test_folder_in_use_by_a_living_process_is_refused(workspace):
    """Case 86; the lock of a dead process is taken over."""
    path = workspace / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text("x: 1")
    (path / folder.LOCK).write_text(json.dumps({"pid": 1}))
    with pytest.raises(UserError, match="in use by pid 1"), folder.lock(path):
        pass
    (path / folder.LOCK).write_text(json.dumps({"pid": 2**22 - 1}))
    with folder.lock(path):
        assert folder.read_json(path / folder.LOCK)["pid"] != 2**22 - 1


def test_non_finite_loss_stops_the_run_and_names_step_and_rows(workspace):
    """Case 46."""
    weights = workspace / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"non-finite loss at step 1, rows \[train.jsonl:"):
        run(workspace, data={"packing": False})
    assert (
        not list((workspace / "run" / "checkpoints").glob("*"))
        if (workspace / "run" / "checkpoints").exists()
        else True
    )


def test_learning_rate_that_explodes_stops_the_run(workspace):
    """Case 46."""
    with pytest.raises(RunError, match="non-finite"):
        run(workspace, training={"learning_rate": 1e20, "max_grad_norm": 1e30, "max_steps": 50, "optimizer": "sgd"})


def test_fewer_rows_than_a_batch_are_one_step(workspace):
    """Case 30."""
    write_rows(workspace / "train.jsonl", CHAT_ROWS[:3])
    _, path = run(workspace, training={"max_steps": None, "epochs": 1, "batch_size": 8})
    [step] = metrics(path)
    assert sorted(step["row_ids"]) == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert folder.read_json(path / "manifest.json")["changed"]


def test_logged_rates_follow_the_schedule(workspace):
    """Case 41: by optimizer step, however many micro-batches."""
    for tokens in (40, 4000):
        _, path = run(
            workspace, overwrite=True,
            training={"schedule": "linear", "max_steps": 8, "micro_batch_tokens": tokens, "learning_rate": 0.008},
        )  # fmt: skip
        assert [line["learning_rate"] for line in metrics(path)] == pytest.approx(
            [0.008 * (1 - k / 8) for k in range(8)]
        )


def test_gradient_checkpointing_changes_nothing(workspace):
    """Case 43, with and without dropout."""
    for dropout in (0.0, 0.1):
        adapters = []
        for checkpointing in (False, True):
            _, path = run(
                workspace, overwrite=True, method={"name": "lora", "rank": 4, "dropout": dropout},
                training={"gradient_checkpointing": checkpointing, "max_steps": 5},
            )  # fmt: skip
            adapters.append(load_file(path / "adapter" / files.ADAPTER_WEIGHTS))
        torch.testing.assert_close(adapters[0], adapters[1], atol=1e-6, rtol=1e-5)
        assert all(float(tensor.norm()) > 0 for name, tensor in adapters[1].items() if "lora_B" in name)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_overfitted_model_stops_where_it_was_taught_to(tmp_path, pad):
    """Cases 4 and 5: pad and eos may be one token; generation from saved files ends at the trained end of turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = make_tokenizer(pad=pad)
    save_base(tmp_path / "base", tokenizer=tokenizer)
    write_rows(tmp_path / "train.jsonl", [chat("hi", "abc")])
    _, path = run(
        tmp_path,
        method={"name": "full"},
        training={"max_steps": 60, "batch_size": 1, "learning_rate": 0.003, "optimizer": "adamw"},
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in GenerationConfig.from_pretrained(path / "merged").eos_token_id
    saved = AutoTokenizer.from_pretrained(path / "merged")
    prompt = saved.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = AutoModelForCausalLM.from_pretrained(path / "merged").generate(**prompt, max_new_tokens=50)
    assert saved.decode(answer[0, prompt["input_ids"].shape[1] :]) == "abc<|im_end|>"


def test_model_learns_the_next_token_and_not_the_one_after(tmp_path):
    """Case 14: labels are shifted once."""
    save_base(tmp_path / "base", tokenizer=make_tokenizer(None))
    letters = "abcdefghijklmnopqrstuvwxyz"
    write_rows(tmp_path / "train.jsonl", [{"text": (letters * 2)[i : i + 20]} for i in range(26)])
    _, path = run(
        tmp_path,
        method={"name": "full"},
        training={"max_steps": 80, "batch_size": 8, "learning_rate": 0.003, "optimizer": "adamw"},
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path / "merged")
    ids = torch.tensor(make_tokenizer(None)((letters * 2)[5:25])["input_ids"])
    guesses = model(ids[None]).logits[0].argmax(-1)
    assert (guesses[2:-2] == ids[3:-1]).float().mean() > 0.99
    assert (guesses[2:-2] == ids[4:]).float().mean() < 0.05


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


def test_probe_tells_nothing_forgotten_for_an_untouched_model(workspace):
    """Case 106: what moves the probe is training alone."""
    from ftune import probe
    from ftune.run.inputs import require

    write_rows(
        workspace / "probe.jsonl", [{"suite": "s", **chat(f"q{i}", "a")} for i in range(5)] + [{"text": "some words"}]
    )
    inputs = require(recipe.load(write_recipe(workspace, evaluation={"probe": "probe.jsonl"})))
    model = make_model(eos_token_id=2)
    answers = [probe.ask(model, inputs.tokenizer, inputs.probe, inputs.plan, "base") for _ in range(2)]
    assert answers[0] == answers[1]
    found = probe.compare(answers[0], answers[1], probe.kl_to_base(model, model, inputs.probe.everything, inputs.plan))
    assert found["worst_drop"] == 0.0
    assert found["kl_to_base"] == 0.0
    assert found["general_loss"]["before"] == found["general_loss"]["after"]


def test_probe_row_that_is_trained_on_is_refused(workspace):
    """Case 35."""
    write_rows(workspace / "probe.jsonl", [{"suite": "s", **chat("SAY  bb ", "b")}])
    with pytest.raises(UserError, match="probe_overlap: 1"):
        run(workspace, evaluation={"probe": "probe.jsonl"})


def test_left_over_temporary_folders_are_removed(workspace):
    """Case 84."""
    _, path = run(workspace)
    junk = path / "checkpoints" / ".tmp-step-000001-abc"
    junk.mkdir()
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "checkpoints" / "step-000004")
    run(workspace, resume=True)
    assert not junk.exists()
