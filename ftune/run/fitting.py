"""The training stage of a run: from the newest checkpoint to the last step, with metrics, checkpoints and signals."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ftune import checkpoint, features, folder, schedule, stored, train
from ftune.checkpoint import Keep
from ftune.console.progress import training_progress
from ftune.console.streams import note
from ftune.errors import ExitCode, Interrupted, RunError, UserError
from ftune.folder import RunFolder
from ftune.methods.base import training_state
from ftune.methods.head import method_of
from ftune.objectives import OBJECTIVES
from ftune.recipe import Recipe
from ftune.run import watching
from ftune.run.inputs import Inputs
from ftune.run.watching import Line, Selection, Watch


class Stop:
    """Set by a signal; the loop looks at it after each step."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


@contextmanager
def stopping_on_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM let the step in progress finish, so that its checkpoint can be saved."""
    stop = Stop()
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def fit(
    settings: Recipe,
    inputs: Inputs,
    model: PreTrainedModel,
    accelerator: Accelerator,
    run: RunFolder,
    made_from: dict[str, Any],
    watch: Watch | None,
    stop: Stop,
) -> Selection:
    """Train to the end, from the newest checkpoint if there is one; metrics and checkpoints are written on the way.

    The model is left at the step that is kept: the last, or the best of those that were evaluated.
    """
    training, total = settings.training, inputs.plan.total_steps
    optimizer = train.make_optimizer(model, training)
    state = training_state(model)
    start = resume_from(run, state, optimizer, made_from)
    per_epoch = schedule.steps_per_epoch(len(inputs.train.mixture), training.batch_size)
    method, objective = method_of(settings.method.name, model), OBJECTIVES[settings.objective.name]
    job = train.Job(model, method, objective, optimizer, accelerator)
    validation_features = None
    if method.trains_head_alone:
        shaped = {key: made_from[key] for key in ("base", "template")} | {"objective": settings.objective.name}
        shaped["held_as"] = settings.model.model_dump(mode="json", exclude={"base", "revision", "chat_template"})
        source = features.Source(model, objective, inputs.plan, shaped, lambda: stop_if_asked(stop, run))
        job = replace(job, features=features.features_of(source, inputs.train.examples))
        if inputs.validation is not None:
            validation_features = features.features_of(source, inputs.validation.examples)
    selects_best = training.select == "best"
    steps = train.train(job, inputs.train.examples, inputs.plan, start)
    with run.metrics.open("a", encoding="utf-8") as metrics, training_progress(total, start) as progress:

        def write(line: Line) -> None:
            metrics.write(json.dumps(dict(line)) + "\n")
            metrics.flush()

        if watch is not None and start == 0:
            write(watch.base)
        for step in telling_out_of_memory(steps):
            write(step.as_dict())
            progress.update(step.step, step.loss, step.tokens_per_second, step.memory, step.learning_rate, step.epoch)
            is_evaluated = watch is not None and schedule.is_due(step.step, total, training.evaluate_every, per_epoch)
            if watch is not None and is_evaluated:
                write(watch.look(model, step.step, validation_features))
            is_kept = schedule.is_due(step.step, total, training.checkpoint_every, per_epoch)
            if stop.signal is not None or is_kept or (is_evaluated and selects_best):
                best = chosen(settings, run, step.step).step if selects_best else None
                keep = Keep(training.keep_checkpoints, best)
                checkpoint.save(run.checkpoints, step.step, state, optimizer, made_from, keep)
            if stop.signal is not None:
                raise interrupted(stop.signal, step.step, total, run)
    selection = chosen(settings, run, total)
    if selection.step != total:
        checkpoint.restore_tensors(checkpoint.at(run.checkpoints, selection.step), state)
        note(f"keeping step {selection.step} of {total}: {selection.reason}")
    return selection


def chosen(settings: Recipe, run: RunFolder, step: int) -> Selection:
    """What `training.select` keeps of the steps up to this one."""
    if settings.training.select == "last":
        return Selection("last", step, "the last step")
    lines = folder.read_json_lines(run.metrics)
    return watching.choose(lines, settings.evaluation.metric, settings.gates.max_forgetting) or Selection(
        "best", step, "no evaluation before it"
    )


def telling_out_of_memory(steps: Iterator[train.Step]) -> Iterator[train.Step]:
    """The steps; running out of memory becomes an error that says what to change."""
    try:
        yield from steps
    except torch.OutOfMemoryError as error:
        hint = "lower training.micro_batch_tokens (the result stays), or set training.gradient_checkpointing: true"
        raise RunError("out of memory", "training", hint) from error


def stop_if_asked(stop: Stop, run: RunFolder) -> None:
    """End before the first step."""
    if stop.signal is not None:
        code = ExitCode.TERMINATED if stop.signal == signal.SIGTERM else ExitCode.INTERRUPTED
        what = f"stopped by {signal.Signals(stop.signal).name} before the first step"
        raise Interrupted(what, str(run.path), "start again with ftune train RECIPE --resume", exit_code=code)


def interrupted(number: int, step: int, total: int, run: RunFolder) -> Interrupted:
    code = ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED
    what = f"stopped by {signal.Signals(number).name} after step {step} of {total}; checkpoint saved"
    return Interrupted(what, str(run.path), "go on with ftune train RECIPE --resume", exit_code=code)


def resume_from(run: RunFolder, state: Any, optimizer: torch.optim.Optimizer, made_from: dict[str, Any]) -> int:
    """Restore the newest checkpoint and cut the metrics back to it; returns its step, 0 when there is none."""
    found = checkpoint.latest(run.checkpoints)
    step = 0
    if found is not None:
        if changed := [name for name in made_from if made_from[name] != found.inputs.get(name)]:
            raise UserError(
                f"changed since this run began: {', '.join(changed)}", str(found.path), "restore these files"
            )
        checkpoint.restore(found, state, optimizer)
        step = found.step
        note(f"resuming after step {step}")
    if run.metrics.exists():
        with stored.as_written(run.metrics):
            lines = [line for line in folder.read_json_lines(run.metrics) if line["step"] <= step] if step else []
        folder.write_json_lines(run.metrics, lines)
    return step
