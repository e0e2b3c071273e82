"""Where a run goes on: what its folder holds, the newest checkpoint, the lines so far; and how that is told."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune import checkpoint, folder, lock, signals, stored
from ftune.artifacts import files
from ftune.checkpoint import Checkpoint
from ftune.console.streams import note
from ftune.errors import UserError
from ftune.folder import RunFolder
from ftune.recipe import Change, Recipe
from ftune.run import changes
from ftune.signals import Stopped


@dataclass(frozen=True)
class Beginning:
    """What a run is made from, and the checkpoint that it goes on from, if there is one."""

    made_from: dict[str, Any]
    found: Checkpoint | None = None

    @property
    def step(self) -> int:
        return self.found.step if self.found else 0


def begin(run: RunFolder, made_from: dict[str, Any]) -> Beginning:
    """Look for the newest checkpoint; raises UserError where it is damaged, or was made from something else."""
    found = checkpoint.latest(run.checkpoints)
    if found is not None:
        changes.check_inputs(found.path, found.inputs, made_from)
        note(f"resuming after step {found.step}")
    return Beginning(made_from, found)


def check_folder(run: RunFolder, settings: Recipe, resume: bool, overwrite: bool) -> list[Change]:
    """What lies in output.dir decides whether this run may use it. Returns what changed in its recipe."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", "ftune train", "choose one")
    # What is overwritten is removed, links as the links they are; all but the lock.
    stored.refuse_links(run.path / lock.NAME if overwrite and not run.path.is_symlink() else run.path)
    if run.path.exists() and not run.path.is_dir():
        raise UserError("this is a file, not a folder", str(run.path), "choose another output.dir")
    names = _names_in(run)
    is_ours = _is_begun(names)
    if resume:
        if not run.is_run:
            if names and is_ours:
                note(f"nothing was saved in {run.path} yet: starting from the beginning")
                return []
            raise _nothing_to_resume(run.path)
        return changes.check_recipe(run, settings)
    if names and not is_ours:
        if not run.is_run:
            raise UserError("this folder holds other files", str(run.path), "choose another output.dir")
        if not overwrite:
            raise UserError(
                "this folder holds a run already", str(run.path), "use --resume, --overwrite or another output.dir"
            )
    return []


def check_free(run: RunFolder) -> None:
    """No other process may be in this folder; raises UserError at once, before anything is read or loaded."""
    names = _names_in(run)
    if lock.NAME in names and (run.is_run or _is_begun(names)):
        with lock.hold(run.path):
            pass


def _names_in(run: RunFolder) -> set[str]:
    return set(os.listdir(run.path)) if run.path.is_dir() else set()


def _is_begun(names: set[str]) -> bool:
    """Whether nothing lies in a folder but what a run leaves that was killed before it wrote its recipe."""
    return all(name == lock.NAME or name.startswith(folder.IN_PROGRESS) for name in names)


def _nothing_to_resume(path: Path) -> UserError:
    if (path / checkpoint.STATE).is_file():
        hint = f"name the run's folder: output.dir={path.parent.parent}"
        return UserError("this is one checkpoint of a run", str(path), hint)
    if files.is_adapter(path) or any(path.glob("*.safetensors")):
        hint = "name the run's folder as output.dir; to train on from these weights, method.start_from"
        return UserError("only weights, no optimizer/rng state: nothing a run could go on from", str(path), hint)
    return UserError("no run to resume", str(path), "start it without --resume")


def clear(run: RunFolder) -> None:
    """Remove an old run's files, only now that the new one is ready to start.

    First what says it is finished, then its checkpoints, each whole or not at all; the recipe, which says that this is
    a run, stays until it is replaced.
    """
    run.manifest.unlink(missing_ok=True)
    if run.checkpoints.is_dir() and not run.checkpoints.is_symlink():
        folder.remove_folder(run.checkpoints)
    for entry in run.path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            folder.remove_folder(entry)
        elif entry.name not in (lock.NAME, run.recipe.name):
            entry.unlink()


def told_complete(run: RunFolder) -> str:
    lines = folder.read_json_lines(run.metrics) if run.metrics.is_file() else []
    last = max((line["step"] for line in lines), default=0)
    total = folder.read_json(run.plan)["steps"]["total"] if run.plan.is_file() else last
    return f"already complete at step {last}/{total}, nothing to do"


def cut_metrics(run: RunFolder, step: int) -> list[dict[str, Any]]:
    """Leave the lines of metrics.jsonl up to a step, all of which must be there; returns them.

    What was written after the checkpoint, and a last line that was torn, is done again.
    """
    lines = folder.read_json_lines(run.metrics, may_be_torn=True) if step and run.metrics.is_file() else []
    with stored.as_written(run.metrics):
        kept = [line for line in lines if line["step"] <= step]
        there = [line["step"] for line in kept if "loss" in line]
    if there != list(range(1, step + 1)):
        missing = sorted(set(range(1, step + 1)) - set(there))
        what = f"the lines of steps {missing[:5]} are not there" if missing else "its steps are not in order"
        raise UserError(what, str(run.metrics), "restore this file, or start again with --overwrite")
    if run.metrics.exists():
        folder.write_json_lines(run.metrics, kept)
    return kept


@contextmanager
def telling_how_to_resume(run: RunFolder) -> Iterator[None]:
    """A signal outside of training ends the run at once: everything it had written is there, whole."""
    try:
        yield
    except Stopped as stopped:
        hint = "go on with ftune train RECIPE --resume" if run.is_run else "run the command again"
        how = "; what was trained is saved" if checkpoint.folders_in(run.checkpoints) else ""
        raise signals.interrupted(stopped.number, how, str(run.path), hint) from None
