"""Checkpoints: save, find, restore. A checkpoint is complete or absent; its checksums are checked before it is used."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftune import folder, stored
from ftune.errors import UserError
from ftune.trust import telling_damage

STATE = "state.json"
PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.safetensors"
LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What torch's optimizers keep in the shape of each parameter."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies, the step it was taken after, and what the run's inputs were."""

    path: Path
    step: int
    inputs: dict[str, Any]
    optimizer_numbers: dict[str, int]


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: so many of the newest, and the best step's, if one is known."""

    newest: int
    best: int | None = None


def _optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> tuple[Tensors, dict[str, int]]:
    """The optimizer's state by `<parameter>/<what>`: tensors, and whole numbers (bitsandbytes counts steps in one)."""
    tensors: Tensors = {}
    numbers: dict[str, int] = {}
    for parameter, state in optimizer.state.items():
        for what, value in state.items():
            name = f"{names[id(parameter)]}/{what}"
            if isinstance(value, torch.Tensor):
                # A table that several parameters share is written for each of them.
                tensors[name] = value.clone() if value.is_contiguous() else value.contiguous()
            else:
                assert type(value) is int, f"{name} is neither tensor nor whole number: it would be lost"
                numbers[name] = value
    return tensors, numbers


def save(
    checkpoints: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, Any],
    keep: Keep,
) -> Path:
    """Write one checkpoint whole; only then remove those that `keep` has no room for.

    `tensors` are the trainable parameters and whatever else training changes, by name.
    """
    target = path_of(checkpoints, step)
    names = {id(parameter): name for name, parameter in tensors.items()}
    with folder.atomic_folder(target) as path:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path / PARAMETERS)
        moments, numbers = _optimizer_state(optimizer, names)
        save_file(moments, path / OPTIMIZER)
        state = {
            "format_version": folder.FORMAT_VERSION,
            "step": step,
            "inputs": inputs,
            "optimizer_numbers": numbers,
            "files": folder.checksums(path),
        }
        (path / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for old in sorted(checkpoints.glob("step-*"))[: -keep.newest]:
        if keep.best is None or old != path_of(checkpoints, keep.best):
            shutil.rmtree(old)
    return target


def path_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def latest(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint, verified; None when there is none."""
    folders = sorted(checkpoints.glob("step-*"))
    return _open(folders[-1]) if folders else None


def at(checkpoints: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, verified."""
    path = path_of(checkpoints, step)
    if not path.is_dir():
        raise UserError(f"the checkpoint of step {step} is gone", str(path), "restore it, or train again")
    return _open(path)


def _open(path: Path) -> Checkpoint:
    state = stored.read_object(path / STATE)
    with stored.as_written(path / STATE):
        if state["format_version"] > folder.FORMAT_VERSION:
            raise UserError("made by a newer ftune", str(path), "update ftune")
        if damaged := folder.changed_files(path, state["files"]):
            raise UserError(
                f"checksum mismatch: {', '.join(damaged)}",
                str(path),
                "remove this checkpoint to resume from the one before",
            )
        if {PARAMETERS, OPTIMIZER} - state["files"].keys() or path_of(path.parent, state["step"]) != path:
            raise ValueError("the step or the list of files")
        return Checkpoint(path, state["step"], dict(state["inputs"]), dict(state.get("optimizer_numbers", {})))


@torch.no_grad()
def restore_tensors(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put parameters back, bit for bit; names and shapes must be exactly those saved."""
    saved = _read(checkpoint.path / PARAMETERS)
    fits = saved.keys() == tensors.keys() and all(saved[name].shape == tensor.shape for name, tensor in tensors.items())
    if not fits:
        raise UserError(
            "the checkpoint's tensors are not this model's", str(checkpoint.path), "resume with the run's recipe"
        )
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


@torch.no_grad()
def restore(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put parameters and optimizer state back, bit for bit."""
    restore_tensors(checkpoint, tensors)
    states: dict[str, dict[str, Any]] = {}
    moments = _read(checkpoint.path / OPTIMIZER)
    for key in (*moments, *checkpoint.optimizer_numbers):
        name, _, what = key.rpartition("/")
        if name not in tensors or (what in LIKE_PARAMETERS and moments[key].shape != tensors[name].shape):
            hint = "resume with the run's recipe"
            raise UserError(f"the optimizer's {key} is not of this model", str(checkpoint.path), hint)
    for key, value in moments.items():
        name, _, what = key.rpartition("/")
        # AdamW counts its steps in a tensor that stays on the CPU.
        moved = value if value.ndim == 0 else _placed(value, what, tensors[name], optimizer)
        states.setdefault(name, {})[what] = moved
    for key, number in checkpoint.optimizer_numbers.items():
        name, _, what = key.rpartition("/")
        states.setdefault(name, {})[what] = number
    for name, state in states.items():
        optimizer.state[tensors[name]] = state


def _read(file: Path) -> Tensors:
    with telling_damage(file):
        tensors: Tensors = load_file(file)
    return tensors


def _placed(value: torch.Tensor, what: str, parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """A state tensor where the optimizer keeps it: in paged memory, where bitsandbytes makes its buffers there."""
    make_buffer = getattr(optimizer, "get_state_buffer", None)
    if make_buffer is None or what not in ("state1", "state2"):
        return value.to(parameter.device)
    buffer: torch.Tensor = make_buffer(parameter, dtype=value.dtype)
    return buffer.copy_(value)
