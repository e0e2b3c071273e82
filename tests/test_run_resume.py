"""Runs that were stopped, killed or damaged, and folders that hold one already. Numbers: trust cases."""

import json
import shutil

import pytest
from conftest import CHAT_ROWS, DROPOUT, adapter_bytes, metrics, run, write_rows

from ftune import folder, lock, train
from ftune.errors import Interrupted, UserError
from ftune.run import fitting


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


def test_resumed_run_ends_with_the_bytes_of_an_undisturbed_one(workspace, monkeypatch):
    """Case 80 through whole runs, killed between checkpoints, at one, and at the last step; every step, method and
    objective: test_resume_exact.py."""
    sections = {
        "method": DROPOUT,
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
    weights = "adapter/adapter_model.safetensors"
    for step in (4, 6, 12):
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
    (path / lock.NAME).write_text(json.dumps({"pid": 1}))
    with pytest.raises(UserError, match="in use by pid 1"), lock.hold(path):
        pass
    (path / lock.NAME).write_text(json.dumps({"pid": 2**22 - 1}))
    with lock.hold(path):
        assert folder.read_json(path / lock.NAME)["pid"] != 2**22 - 1


def test_left_over_temporary_folders_are_removed(workspace):
    """Case 84."""
    _, path = run(workspace)
    junk = path / "checkpoints" / ".tmp-step-000001-abc"
    junk.mkdir()
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "checkpoints" / "step-000004")
    run(workspace, resume=True)
    assert not junk.exists()
