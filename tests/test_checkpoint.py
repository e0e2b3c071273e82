"""A checkpoint's own promises: every byte is summed, old formats load, what was written is read back. Numbers: trust
cases."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ftune import checkpoint, folder
from ftune.checkpoint import OPTIMIZER, PARAMETERS, STATE, SUMS, Keep, take
from ftune.engine import Engine
from ftune.errors import RunError, UserError

GOLDEN = Path(__file__).parent / "golden"


def make_state(seed=0):
    torch.manual_seed(seed)
    state = {
        "a": torch.nn.Parameter(torch.randn(2, 3)),
        "b": torch.nn.Parameter(torch.zeros(3)),
        "kept": torch.ones(2) > 0,
    }
    optimizer = torch.optim.AdamW([state["a"], state["b"]])
    for name in ("a", "b"):
        state[name].grad = torch.ones_like(state[name])
    optimizer.step()
    return state, optimizer


def save(checkpoints, step, keep=9):
    return checkpoint.save(checkpoints, step, take(*make_state(step), Engine()), {"data": {}}, Keep(keep))


@pytest.mark.parametrize("name", [PARAMETERS, OPTIMIZER, STATE, SUMS])
def test_a_flipped_bit_anywhere_is_found(tmp_path, name):
    """Case 82: in every byte of every file, the sums themselves too."""
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="checksum mismatch: ") as caught:
            checkpoint.latest(tmp_path)
        assert caught.value.exit_code == 2
        assert name in str(caught.value) or name == SUMS, place
    assert "with this folder removed, --resume goes on from the one before, step-000001" in str(caught.value)
    file.write_bytes(whole)
    assert checkpoint.latest(tmp_path).step == 2


@pytest.mark.parametrize("name", [PARAMETERS, OPTIMIZER, STATE, SUMS])
def test_a_file_that_is_short_or_gone_is_found(tmp_path, name):
    file = save(tmp_path, 3) / name
    whole = file.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"checksum mismatch: .*{'' if name == SUMS else name}"):
            checkpoint.latest(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=f"checksum mismatch: {name}|no {name}: there is no optimizer state") as caught:
        checkpoint.latest(tmp_path)
    assert "from the beginning, as there is none before" in str(caught.value)


def test_the_sums_are_in_the_form_of_sha256sum(tmp_path):
    lines = (save(tmp_path, 1) / SUMS).read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == [OPTIMIZER, PARAMETERS, STATE]
    assert all(
        line.split("  ")[0] == folder.sha256_file(tmp_path / "step-000001" / line.split("  ")[1]) for line in lines
    )


def test_a_newer_format_is_refused_by_name(tmp_path):
    """Case 92."""
    file = save(tmp_path, 1) / STATE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(UserError, match="made by a newer ftune") as caught:
        checkpoint.latest(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_every_format_load_and_are_checked(tmp_path, version):
    """Case 92: kept from the version that wrote them."""
    shutil.copytree(GOLDEN / f"checkpoint-{version}", tmp_path / "run")
    found = checkpoint.latest(tmp_path / "run")
    lora_A, lora_B = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(3, 2))
    state = {"model.q.lora_A": lora_A, "model.q.lora_B": lora_B, "model.q.kept": torch.tensor([[False], [True]])}
    optimizer = torch.optim.AdamW([lora_A, lora_B])
    checkpoint.restore(found, state, optimizer)
    # Two steps of AdamW with a gradient of 0.25 and of 0.5: 0.1 at the first, nearly 0.1 at the second.
    second = (
        0.1
        * (0.9 * 0.1 * 0.25 + 0.1 * 0.5)
        / (1 - 0.9**2)
        / ((0.999 * 0.001 * 0.0625 + 0.001 * 0.25) / (1 - 0.999**2)) ** 0.5
    )
    assert torch.allclose(lora_A, torch.arange(6.0).reshape(2, 3) / 7 - 0.1 - second, atol=1e-6)
    assert state["model.q.kept"].tolist() == [[True], [False]]
    assert float(optimizer.state[lora_A]["step"]) == 2
    assert found.inputs["data"] == {"/old/train.jsonl": "cd"}
    tensors = tmp_path / "run" / "step-000002" / PARAMETERS
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=f"checksum mismatch: {PARAMETERS}"):
        checkpoint.latest(tmp_path / "run")


def test_weights_alone_are_no_checkpoint(tmp_path):
    """Case 89."""
    path = save(tmp_path, 1)
    (path / STATE).unlink()
    with pytest.raises(UserError, match="no optimizer state"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("name", ["a", "b/exp_avg", "kept"])
def test_old_checkpoints_stay_until_the_new_one_reads_back_as_it_was_written(tmp_path, monkeypatch, name):
    """Case 83: a disk that stores something else."""
    old = save(tmp_path, 1, keep=1)
    whole = checkpoint.save_file

    def wrong(tensors, file):
        if name in tensors:
            tensors = tensors | {name: ~tensors[name] if tensors[name].dtype == torch.bool else tensors[name] + 1e-7}
        whole(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", wrong)
    with pytest.raises(RunError, match=f"reads back otherwise than it was written: {name}"):
        save(tmp_path, 2, keep=1)
    assert list(tmp_path.iterdir()) == [old]
    assert checkpoint.latest(tmp_path).step == 1


def test_the_newest_is_the_one_of_the_last_step_whatever_the_names_sort_like(tmp_path):
    for step in (999_999, 1_000_000, 7):
        save(tmp_path, step)
    (tmp_path / "step-old").mkdir()
    assert checkpoint.latest(tmp_path).step == 1_000_000
    save(tmp_path, 1_000_001, keep=2)
    assert [path.name for path in checkpoint.folders_in(tmp_path)] == ["step-1000000", "step-1000001"]


def test_only_safetensors_and_json(tmp_path):
    assert {file.suffix for file in save(tmp_path, 1).iterdir()} == {".safetensors", ".json", ""}
    assert json.loads((tmp_path / "step-000001" / STATE).read_text())["step"] == 1
