"""Checkpoints: save, find, restore. A checkpoint is complete or absent; its checksums are checked before it is used."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftune import folder
from ftune.engine import Engine, parted, whole
from ftune.errors import UserError

STATE = "state.json"
PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.safetensors"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies, the step it was taken after, and what the run's inputs were."""

    path: Path
    step: int
    inputs: dict[str, Any]
    optimizer_numbers: dict[str, int]
    processes: int = 1


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds of parameters and, by `<parameter>/<what>`, of the optimizer's state."""

    parameters: Tensors
    moments: Tensors
    numbers: dict[str, int]
    processes: int


def take(tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, engine: Engine) -> Snapshot:
    """What there is now; what processes hold in parts is put together, so all of them must ask.

    `tensors` are the trainable parameters and whatever else training changes, by name. Only the process that writes
    keeps what was put together; the others drop it at once.
    """
    names = {id(parameter): name for name, parameter in tensors.items()}
    snapshot = Snapshot({}, {}, {}, engine.count)
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach()).contiguous()
        if engine.is_main:
            snapshot.parameters[name] = gathered
    for parameter, state in optimizer.state.items():
        for what, value in state.items():
            name = f"{names[id(parameter)]}/{what}"
            if not isinstance(value, torch.Tensor):
                # bitsandbytes counts its steps in one.
                assert type(value) is int, f"{name} is neither tensor nor whole number: it would be lost"
                snapshot.numbers[name] = value
                continue
            gathered = whole(value)
            if engine.is_main:
                # A table that several parameters share is written for each of them.
                snapshot.moments[name] = gathered.clone() if gathered.is_contiguous() else gathered.contiguous()
    return snapshot


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: so many of the newest, and the best step's, if one is known."""

    newest: int
    best: int | None = None


def save(checkpoints: Path, step: int, snapshot: Snapshot, inputs: dict[str, Any], keep: Keep) -> Path:
    """Write one checkpoint whole; only then remove those that `keep` has no room for."""
    target = path_of(checkpoints, step)
    with folder.atomic_folder(target) as path:
        save_file(snapshot.parameters, path / PARAMETERS)
        save_file(snapshot.moments, path / OPTIMIZER)
        state = {
            "format_version": folder.FORMAT_VERSION,
            "step": step,
            "inputs": inputs,
            "optimizer_numbers": snapshot.numbers,
            "processes": snapshot.processes,
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
    state = folder.read_json(path / STATE)
    if state["format_version"] > folder.FORMAT_VERSION:
        raise UserError("made by a newer ftune", str(path), "update ftune")
    if damaged := folder.changed_files(path, state["files"]):
        raise UserError(
            f"checksum mismatch: {', '.join(damaged)}",
            str(path),
            "remove this checkpoint to resume from the one before",
        )
    return Checkpoint(
        path, state["step"], state["inputs"], state.get("optimizer_numbers", {}), state.get("processes", 1)
    )


@torch.no_grad()
def restore_tensors(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put parameters back, bit for bit; names and shapes must be exactly those saved."""
    saved = load_file(checkpoint.path / PARAMETERS)
    fits = saved.keys() == tensors.keys() and all(saved[name].shape == tensor.shape for name, tensor in tensors.items())
    if not fits:
        raise UserError(
            "the checkpoint's tensors are not this model's", str(checkpoint.path), "resume with the run's recipe"
        )
    for name, tensor in tensors.items():
        tensor.copy_(parted(saved[name], tensor))


@torch.no_grad()
def restore(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put parameters and optimizer state back, bit for bit."""
    restore_tensors(checkpoint, tensors)
    states: dict[str, dict[str, Any]] = {}
    for key, value in load_file(checkpoint.path / OPTIMIZER).items():
        name, _, what = key.rpartition("/")
        # AdamW counts its steps in a tensor that stays on the CPU.
        moved = value if value.ndim == 0 else _placed(value, what, tensors[name], optimizer)
        states.setdefault(name, {})[what] = moved
    for key, number in checkpoint.optimizer_numbers.items():
        name, _, what = key.rpartition("/")
        states.setdefault(name, {})[what] = number
    for name, state in states.items():
        optimizer.state[tensors[name]] = state


def _placed(value: torch.Tensor, what: str, parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """A state tensor where the optimizer keeps it: in paged memory, where bitsandbytes makes its buffers there."""
    make_buffer = getattr(optimizer, "get_state_buffer", None)
    if make_buffer is None or what not in ("state1", "state2"):
        return parted(value, parameter)
    buffer: torch.Tensor = make_buffer(parameter, dtype=value.dtype)
    return buffer.copy_(value)
