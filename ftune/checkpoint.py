"""Checkpoints: save, find, restore. A checkpoint is complete or absent; its checksums are checked before it is used."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ftune import folder, stored
from ftune.engine import Engine, parted, whole
from ftune.errors import RunError, UserError
from ftune.trust import telling_damage

STATE = "state.json"
PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.safetensors"
SUMS = "SHA256SUMS"
"""As `sha256sum --check` reads it, of the three other files."""
FORMAT_VERSION = 2
"""1 had its checksums in state.json, and so none of that."""
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
class Snapshot:
    """What a checkpoint holds of parameters and, by `<parameter>/<what>`, of the optimizer's state."""

    parameters: Tensors
    moments: Tensors
    numbers: dict[str, int]


def take(tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, engine: Engine) -> Snapshot:
    """What there is now; what processes hold in parts is put together, so all of them must ask.

    `tensors` are the trainable parameters and whatever else training changes, by name. Only the process that writes
    keeps what was put together; the others drop it at once.
    """
    names = {id(parameter): name for name, parameter in tensors.items()}
    snapshot = Snapshot({}, {}, {})
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
    """Write one checkpoint whole and read it back; only then remove those that `keep` has no room for."""
    target = path_of(checkpoints, step)

    def read_back(path: Path) -> None:
        _read_back(path / PARAMETERS, snapshot.parameters, target)
        _read_back(path / OPTIMIZER, snapshot.moments, target)

    with folder.atomic_folder(target, read_back) as path:
        save_file(snapshot.parameters, path / PARAMETERS)
        save_file(snapshot.moments, path / OPTIMIZER)
        state = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "inputs": inputs,
            "optimizer_numbers": snapshot.numbers,
        }
        (path / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        (path / SUMS).write_text(_sums(folder.checksums(path)), encoding="utf-8")
    prune(checkpoints, keep)
    return target


def prune(checkpoints: Path, keep: Keep) -> None:
    """Remove what there is no room for. Only after the newest was verified: by `save`, or by `latest`."""
    for old in folders_in(checkpoints)[: -keep.newest]:
        if keep.best is None or old != path_of(checkpoints, keep.best):
            folder.remove_folder(old)


def _sums(digests: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


@torch.no_grad()
def _read_back(file: Path, tensors: Mapping[str, torch.Tensor], target: Path) -> None:
    """What lies on disk is what is in memory, bit for bit; raises RunError where it is not."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # what the system still remembers of the file would prove nothing
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    with safe_open(file, framework="pt") as written:
        wrong = set(written.keys()) ^ tensors.keys()
        wrong |= {name for name in tensors.keys() - wrong if not _same_bits(written.get_tensor(name), tensors[name])}
    if wrong:
        what = f"{file.name} reads back otherwise than it was written: {', '.join(sorted(wrong)[:3])}"
        raise RunError(what, str(target), "check this disk; older checkpoints were kept")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    other = other.detach().to("cpu").contiguous()
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    return is_alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def path_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def folders_in(checkpoints: Path) -> list[Path]:
    """The folders of all checkpoints, by step."""
    found = [path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest(checkpoints: Path) -> Checkpoint | None:
    """The newest checkpoint, verified; None when there is none. A damaged one is refused, not passed over."""
    folders = folders_in(checkpoints)
    if not folders:
        return None
    rest = f"the one before, {folders[-2].name}" if len(folders) > 1 else "the beginning, as there is none before"
    return _open(folders[-1], f"look after this disk; with this folder removed, --resume goes on from {rest}")


def at(checkpoints: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, verified."""
    path = path_of(checkpoints, step)
    if not path.is_dir():
        raise UserError(f"the checkpoint of step {step} is gone", str(path), "restore it, or train again")
    return _open(path, "restore it, or train again")


def _open(path: Path, hint: str) -> Checkpoint:
    if not (path / STATE).is_file():
        raise UserError(f"no {STATE}: there is no optimizer state here to go on from", str(path), hint)
    state, version = _read_state(path)
    with stored.as_written(path / STATE):
        damaged = _damaged(path, state, version)
        told = [f"checksum mismatch: {', '.join(damaged)}"] if damaged else []
        if version > FORMAT_VERSION:
            told.insert(0, f"made by a newer ftune (format {version}, and this one reads up to {FORMAT_VERSION})")
            raise UserError("; or ".join(told), str(path), "update ftune")
        if told:
            raise UserError(told[0], str(path), hint)
        if path_of(path.parent, state["step"]) != path:
            raise ValueError("the step")
        return Checkpoint(path, state["step"], dict(state["inputs"]), dict(state.get("optimizer_numbers", {})))


def _read_state(path: Path) -> tuple[dict[str, Any], int]:
    """What state.json holds, damaged or not, and the format that it says it is in."""
    try:
        state = json.loads((path / STATE).read_bytes())
        version = state["format_version"]
    except (ValueError, TypeError, KeyError):
        return {}, FORMAT_VERSION
    return state, version if isinstance(version, int) else FORMAT_VERSION


def _damaged(path: Path, state: Mapping[str, Any], version: int) -> list[str]:
    """The files whose bytes are not those that were written, or that are gone."""
    sums = path / SUMS
    if version == 1 and not sums.exists():
        return folder.changed_files(path, state.get("files", {STATE: ""}))
    if not sums.is_file():
        return [SUMS]
    written = sums.read_bytes()
    names = (STATE, PARAMETERS, OPTIMIZER)
    there = {name: folder.sha256_file(path / name) for name in names if (path / name).is_file()}
    lines = written.splitlines()
    damaged = [name for name in names if name not in there or f"{there[name]}  {name}".encode() not in lines]
    return damaged if damaged or written == _sums(there).encode() else [SUMS]


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
        tensor.copy_(parted(saved[name], tensor))


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
        return parted(value, parameter)
    buffer: torch.Tensor = make_buffer(parameter, dtype=value.dtype)
    return buffer.copy_(value)
