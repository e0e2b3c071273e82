"""What may change between a run and its resumption: keys of the recipe, places of files, the machine; nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftune import checkpoint, folder, recipe, schedule
from ftune import model as models
from ftune.console.streams import note
from ftune.engine import Engine
from ftune.errors import Problem, UserError
from ftune.folder import RunFolder
from ftune.recipe import Change, Recipe
from ftune.run.inputs import Inputs

FREE = {
    "evaluation.review",
    "evaluation.few_shot",
    "evaluation.previous",
    "gates.min_score",
    "gates.min_gain",
    "output.dir",
    "output.save",
    "output.trackers",
    "training.checkpoint_every",
    "training.keep_checkpoints",
}
"""Keys that training never looks at: they may change before a run is resumed."""
MEASURING = {"evaluation.metric", "evaluation.max_new_tokens"}
"""Free where nothing is evaluated on the way, for want of `data.validation`."""
SELECTING = {"training.evaluate_every", "gates.max_forgetting"}
"""Free unless `training.select: best` chooses by it."""
ROUNDING = {"training.micro_batch_tokens", "training.gradient_checkpointing", "training.parallel"}
"""How a step is computed: the same run, but not to the bit."""
LENGTH = {"training.epochs", "training.max_steps"}
"""Training may become longer."""
PATHS = {
    "model.base",
    "model.chat_template",
    "method.start_from",
    "data.train",
    "data.validation",
    "data.test",
    "evaluation.metric",
    "evaluation.previous",
    "evaluation.probe",
}
"""Their files may have moved: a run knows them by name and contents."""
CHANGES = "changes.jsonl"
"""In a run folder: what a resumed run was given another way, and from which step on."""


def check_recipe(run: RunFolder, settings: Recipe) -> list[Change]:
    """What changed in the recipe since this run began, told; raises UserError with every key that would bend it."""
    before = recipe.load(run.recipe)
    found = [change for change in recipe.changes(before, settings) if not _is_moved(change)]
    problems = [
        Problem(f"the recipe changed since this run began: {change}", str(run.recipe), reason)
        for change in found
        if (reason := obstacle(change, before, settings))
    ]
    if problems:
        raise UserError.collect(problems)
    if found and run.is_complete and not any(change.key in LENGTH for change in found):
        raise UserError(
            f"this run is complete, so {', '.join(map(str, found))} would change nothing",
            str(run.path),
            "measure it again with ftune eval, train on with training.epochs, or start another run",
        )
    return found


def obstacle(change: Change, before: Recipe, after: Recipe) -> str:
    """Why a change would bend the run; empty where it would not."""
    key = change.key
    if key in FREE | ROUNDING:
        return ""
    if key in MEASURING:
        is_free = before.data.validation is None
        return "" if is_free else "the evaluations so far were made with it; resume with the old value"
    if key in SELECTING:
        return "" if before.training.select == "last" else "training.select: best chooses by it; take the old value"
    if key in LENGTH:
        old, new = before.training, after.training
        for was, now in ((old.epochs, new.epochs), (old.max_steps, new.max_steps)):
            if was is not None and now is not None and now < was:
                return "training can become longer, not shorter"
        return ""
    return "resume with the recipe it began with, or start another run"


def _is_moved(change: Change) -> bool:
    """Whether only the folder of a file is another one; its contents are compared later."""
    return change.key in PATHS | {"output.dir"} and _names(change.before) == _names(change.after)


def _names(value: Any) -> Any:
    """A value with the folders of its absolute paths left out."""
    if isinstance(value, Mapping):
        return {key: _names(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_names(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def check_length(run: RunFolder, changed: Sequence[Change], inputs: Inputs) -> None:
    """Training may become longer, not shorter, whether it is counted in epochs or in steps; tells what that means."""
    if not any(change.key in LENGTH for change in changed):
        return
    old = recipe.load(run.recipe).training
    before = schedule.total_steps(len(inputs.train.mixture), old.batch_size, old.epochs, old.max_steps)
    after = inputs.plan.total_steps
    if after < before:
        what = f"training would end at step {after} instead of {before}"
        raise UserError(what, "training.epochs, training.max_steps", "it can become longer, not shorter")
    if run.is_complete and not checkpoint.folders_in(run.checkpoints):
        raise UserError("no checkpoint is left to train on from", str(run.checkpoints), "start another run")
    note(f"{after} steps instead of {before}: from here on the learning rate is that of a run of {after} steps")


def record(run: RunFolder, changed: Sequence[Change], settings: Recipe, step: int) -> None:
    """Keep what changed and after which step; only then the recipe. A finished run is not finished any more."""
    for change in changed:
        note(f"changed since this run began: {change}")
    if any(change.key in ROUNDING for change in changed):
        note("steps are computed otherwise from here on: the same run to rounding, not to the bit")
    if changed:
        file = run.path / CHANGES
        lines = folder.read_json_lines(file) if file.is_file() else []
        line = {"after_step": step, "changes": [str(change) for change in changed]}
        folder.write_json_lines(file, [*lines, *([line] if line not in lines else [])])
        run.manifest.unlink(missing_ok=True)
    text = recipe.dump(settings)
    if not run.is_run or run.recipe.read_text(encoding="utf-8") != text:
        folder.write_text(run.recipe, text)


def environment(engine: Engine) -> dict[str, Any]:
    """What the last digits depend on besides the inputs."""
    there = {"device": str(engine.device), "threads": torch.get_num_threads(), "processes": engine.count}
    return {"versions": models.versions(), **there}


def check_inputs(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Everything a checkpoint was made from must be as it was; raises UserError with each file that is not.

    Another environment is told only: the run goes on, to rounding.
    """
    problems = [
        Problem(f"changed since this run began: {what}", str(path), "restore it, or start another run")
        for key in now
        if key in then and key != "environment"
        for what in _changed_parts(key, then[key], now[key])
    ]
    if problems:
        raise UserError.collect(problems)
    there, here = then.get("environment", {}), now.get("environment", {})
    told = [
        what
        for key in there.keys() & here.keys()
        for what in _changed_parts(key, there[key], here[key])
        if there[key] != here[key]
    ]
    if told:
        note(f"another environment than at the checkpoint ({', '.join(sorted(told))}): the same run, to rounding")


def _changed_parts(key: str, then: Any, now: Any) -> Iterator[str]:
    """What differs between two values of the inputs, by the names of files; folders do not count."""
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        if then != now:
            yield f"{key} {_short(then)} -> {_short(now)}"
        return
    pairs_then, pairs_now = ([(Path(name).name, value) for name, value in part.items()] for part in (then, now))
    if sorted(pairs_then) == sorted(pairs_now):
        return
    for name in sorted({name for name, _ in pairs_then + pairs_now}):
        old, new = (sorted(value for other, value in pairs if other == name) for pairs in (pairs_then, pairs_now))
        if old != new:
            yield f"{key} {name}: {', '.join(map(_short, old)) or '-'} -> {', '.join(map(_short, new)) or '-'}"


def _short(value: Any) -> str:
    return str(value)[:12]
