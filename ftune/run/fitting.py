"""The training stage of a run: from the newest checkpoint to the last step, with metrics, checkpoints and signals."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ftune import checkpoint, features, folder, optimizers, schedule, signals, train
from ftune.batches import Features
from ftune.checkpoint import Keep
from ftune.console.progress import training_progress
from ftune.console.streams import note
from ftune.engine import Engine, telling_lost_processes
from ftune.errors import Interrupted, RunError
from ftune.folder import RunFolder
from ftune.methods.base import training_state
from ftune.methods.head import method_of
from ftune.objectives import OBJECTIVES
from ftune.recipe import Recipe
from ftune.run import replaying, watching
from ftune.run.inputs import Inputs
from ftune.run.resuming import Beginning, cut_metrics
from ftune.run.watching import Line, Selection, Watch
from ftune.signals import Stop, Stopped
from ftune.trackers import Trackers


@dataclass(frozen=True)
class Circumstances:
    """What stands around the training of a run: where it goes on, what looks on, and what may end it."""

    beginning: Beginning
    watch: Watch | None
    stop: Stop
    trackers: Trackers


def fit(
    settings: Recipe,
    inputs: Inputs,
    model: PreTrainedModel,
    engine: Engine,
    run: RunFolder,
    around: Circumstances,
) -> Selection:
    """Train to the end, from a checkpoint if there is one; metrics and checkpoints are written on the way.

    A step's checkpoint comes before its evaluation, which changes nothing: a signal may end it, and it is made again.
    The model is left at the step that is kept, the last or the best. Of several processes all train, and one writes.
    """
    beginning, watch, stop = around.beginning, around.watch, around.stop
    training, total = settings.training, inputs.plan.total_steps
    optimizer = optimizers.make_optimizer(model, training)
    state = training_state(model)
    start, made_from = beginning.step, beginning.made_from
    found = train.begin_finding(model, inputs.plan)
    lines = engine.from_main(cut_metrics(run, start) if engine.is_main else None)
    if beginning.found is not None:
        checkpoint.restore(beginning.found, state, optimizer)
        found.restore(beginning.found.inputs.get("found"))
        if engine.is_main:
            checkpoint.prune(run.checkpoints, kept(settings, run, start))  # what a killed save had left to do
    around.trackers.start(start)
    per_epoch = schedule.steps_per_epoch(len(inputs.train.mixture), training.batch_size)
    method, objective = method_of(settings.method.name, model), OBJECTIVES[settings.objective.name]
    job = train.Job(model, method, objective, optimizer, engine, found=found)
    job, validation_features = with_features(job, settings, inputs, around, run)

    def is_evaluated(step: int) -> bool:
        return watch is not None and schedule.is_due(step, total, training.evaluate_every, per_epoch)

    opened = folder.Lines(run.metrics) if engine.is_main else nullcontext()
    with opened as metrics, training_progress(total, start) as progress:

        def write(line: Line) -> None:
            if metrics is not None:
                metrics.write(dict(line))
            around.trackers.line(line)

        def asked_to_stop() -> int:
            return engine.most(stop.signal or 0)

        def evaluate(step: int) -> None:
            assert watch is not None
            with suppress(Stopped):  # `stop` has it
                write(watch.look(model, step, validation_features))

        def save(step: int) -> None:
            snapshot = checkpoint.take(state, optimizer, engine)
            if metrics is not None:
                metrics.sync()
                inputs_then = made_from | {"found": found.as_dict()}
                checkpoint.save(run.checkpoints, step, snapshot, inputs_then, kept(settings, run, step))

        if watch is not None and start == 0:
            write(watch.base)
        if start and is_evaluated(start) and not any(line["step"] == start for line in watching.evaluations(lines)):
            evaluate(start)
            if stopped := asked_to_stop():
                raise interrupted(stopped, start, total, run)
        steps = train.train(job, inputs.train.examples, inputs.plan, start)
        for step in telling_out_of_memory(replaying.recording(steps, settings, run, model, write)):
            write(step.as_dict())
            progress.update(step.step, step.loss, step.tokens_per_second, step.memory, step.learning_rate, step.epoch)
            is_kept = schedule.is_due(step.step, total, training.checkpoint_every, per_epoch)
            stopped = asked_to_stop()
            is_saved = bool(stopped) or is_kept or (is_evaluated(step.step) and training.select == "best")
            if is_saved:
                save(step.step)
            if not stopped and is_evaluated(step.step):
                evaluate(step.step)
                stopped = asked_to_stop()
            if stopped:
                if not is_saved:
                    save(step.step)
                raise interrupted(stopped, step.step, total, run)
    return leave_at_chosen(settings, run, total, state, engine)


def with_features(
    job: train.Job, settings: Recipe, inputs: Inputs, around: Circumstances, run: RunFolder
) -> tuple[train.Job, Features | None]:
    """The job and the validation rows with their features, where the body that makes them never changes."""
    if not job.method.trains_head_alone:
        return job, None
    made_from = around.beginning.made_from
    shaped = {key: made_from[key] for key in ("base", "template")} | {"objective": settings.objective.name}
    shaped["held_as"] = settings.model.model_dump(mode="json", exclude={"base", "revision", "chat_template"})
    source = features.Source(job.model, job.objective, inputs.plan, shaped, lambda: stop_if_asked(around.stop, run))
    with job.engine.main_first():
        job = replace(job, features=features.features_of(source, inputs.train.examples))
        validation = inputs.validation
        return job, None if validation is None else features.features_of(source, validation.examples)


def leave_at_chosen(
    settings: Recipe, run: RunFolder, total: int, state: Mapping[str, torch.Tensor], engine: Engine
) -> Selection:
    """Put the parameters of the step that is kept back, where it is not the last."""
    if engine.is_main:
        checkpoint.prune(run.checkpoints, kept(settings, run, total))  # what the last evaluation made needless
    selection: Selection = engine.from_main(chosen(settings, run, total) if engine.is_main else None)
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


def kept(settings: Recipe, run: RunFolder, step: int) -> Keep:
    """Which checkpoints stay, once there is one of this step."""
    best = chosen(settings, run, step).step if settings.training.select == "best" else None
    return Keep(settings.training.keep_checkpoints, best)


def telling_out_of_memory(steps: Iterator[train.Step]) -> Iterator[train.Step]:
    """The steps; running out of memory becomes an error that says what to change."""
    try:
        with telling_lost_processes():
            yield from steps
    except RuntimeError as error:
        if not train.is_out_of_memory(error):
            raise
        hint = "lower training.micro_batch_tokens (the result stays), or set training.gradient_checkpointing: true"
        raise RunError("out of memory", "training", hint) from error


def stop_if_asked(stop: Stop, run: RunFolder) -> None:
    """End before the first step."""
    if stop.signal is not None:
        hint = "start again with ftune train RECIPE --resume"
        raise signals.interrupted(stop.signal, "before the first step", str(run.path), hint)


def interrupted(number: int, step: int, total: int, run: RunFolder) -> Interrupted:
    how = f"after step {step} of {total}; checkpoint saved"
    return signals.interrupted(number, how, str(run.path), "go on with ftune train RECIPE --resume")
