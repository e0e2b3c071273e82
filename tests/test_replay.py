"""A step whose loss or gradient is no number leaves a replay of itself. Trust case 46."""

import math

import pytest
import torch
from conftest import metrics, run
from safetensors.torch import load_file, save_file

from ftune import folder, train
from ftune.errors import RunError
from ftune.objectives import sft
from ftune.run.replaying import replay


def break_base(workspace, value=math.inf):
    file = workspace / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_loss_that_is_none_leaves_a_replay_that_shows_it_again(workspace, dropout):
    """Case 46: text, metrics, no checkpoint of that step, and the batch to look at."""
    break_base(workspace)
    with pytest.raises(RunError, match=r"non-finite loss at step 1, rows \[train.jsonl:"):
        run(workspace, method={"name": "lora", "rank": 4, "dropout": dropout}, data={"packing": False})
    path = workspace / "run"
    (line,) = folder.read_json_lines(path / "metrics.jsonl")
    assert (line["step"], line["non_finite"], line["value"]) == (1, "loss", "nan")
    found = replay(path)
    assert (found["recorded"], found["replayed"]) == ("nan", "nan")
    assert found["row_ids"] == line["row_ids"]
    assert {file.suffix for file in (path / "replay").iterdir()} == {".json", ".safetensors"}
    assert not list(path.glob("checkpoints/*"))


def test_a_step_that_explodes_is_replayed_from_the_weights_before_it(workspace):
    """Case 46: lr 1e20. The replayed value is the recorded one; no checkpoint of that step or later exists."""
    sections = {
        "training": {
            "learning_rate": 1e20, "max_grad_norm": 1e30, "max_steps": 50, "optimizer": "sgd", "checkpoint_every": 1,
        }
    }  # fmt: skip
    with pytest.raises(train.NonFinite) as caught:
        run(workspace, **sections)
    path, step = workspace / "run", caught.value.step
    found = replay(path)
    assert found["step"] == step > 1
    assert found["recorded"] == found["replayed"] == str(caught.value.value)
    kept = [int(folder_.name.removeprefix("step-")) for folder_ in (path / "checkpoints").glob("step-*")]
    assert max(kept) == step - 1
    assert [line["loss"] for line in metrics(path) if line["step"] >= step] == []
    saved = load_file(path / "replay" / "parameters.safetensors")
    before = load_file(path / "checkpoints" / f"step-{step - 1:06d}" / "parameters.safetensors")
    torch.testing.assert_close(saved, before, atol=0, rtol=0)


def test_a_gradient_that_is_none_is_replayed_and_its_tensors_named(workspace, monkeypatch):
    """A finite loss whose gradient is not: of a hook here, of sqrt(0) elsewhere."""
    plain = sft.summed_loss
    monkeypatch.setattr(sft, "summed_loss", lambda *a: (loss := plain(*a)) + 0 * torch.sqrt(loss * 0))
    with pytest.raises(RunError, match="non-finite gradient at step 1"):
        run(workspace)
    found = replay(workspace / "run")
    assert (found["what"], found["recorded"], found["replayed"]) == ("gradient", "nan", "nan")
    assert any("lora_B" in name for name in found["gradients"])


def test_a_run_that_gets_past_the_step_leaves_no_replay(workspace, monkeypatch):
    with monkeypatch.context() as patch:
        plain = sft.summed_loss
        patch.setattr(sft, "summed_loss", lambda *a: plain(*a) * math.nan)
        with pytest.raises(RunError):
            run(workspace)
    assert (workspace / "run" / "replay").is_dir()
    _, path = run(workspace, resume=True)
    assert not (path / "replay").exists()
    assert [line["step"] for line in folder.read_json_lines(path / "metrics.jsonl")] == [1, 2, 3, 4]
