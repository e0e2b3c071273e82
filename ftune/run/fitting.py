"""The training stage of a run: from the newest checkpoint to the last step, with metrics, checkpoints and signals."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ftune import checkpoint, features, folder, schedule, signals, train
from ftune.checkpoint import Keep
from ftune.console.progress import training_progress
from ftune.console.streams import note
from ftune.errors import Interrupted, RunError
from ftune.folder import RunFolder
from ftune.methods.base import training_state
from ftune.methods.head import method_of
from ftune.objectives import OBJECTIVES
from ftune.recipe import Recipe
from ftune.run import watching
from ftune.run.inputs import Inputs
from ftune.run.resuming import Beginning, cut_metrics
from ftune.run.watching import Selection, Watch
from ftune.signals import Stop, Stopped


def fit(
    settings: Recipe,
    inputs: Inputs,
    model: PreTrainedModel,
    accelerator: Accelerator,
    run: RunFolder,
    beginning: Beginning,
    watch: Watch | None,
    stop: Stop,
) -> Selection:
    """Train to the end, from a checkpoint if there is one; metrics and checkpoints are written on the way.

    A step's checkpoint comes before its evaluation, which changes nothing: a signal may end it, and it is made again.
    The model is left at the step that is kept: the last, or the best of those that were evaluated.
    """
    training, total = settings.training, inputs.plan.total_steps
    optimizer = train.make_optimizer(model, training)
    state = training_state(model)
    start, made_from = beginning.step, beginning.made_from
    lines = cut_metrics(run, start)
    if beginning.found is not None:
        checkpoint.restore(beginning.found, state, optimizer)
        checkpoint.prune(run.checkpoints, kept(settings, run, start))  # what a killed save had left to do
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

    def is_evaluated(step: int) -> bool:
        return watch is not None and schedule.is_due(step, total, training.evaluate_every, per_epoch)

    with folder.Lines(run.metrics) as metrics, training_progress(total, start) as progress:

        def evaluate(step: int) -> None:
            assert watch is not None
            with suppress(Stopped):  # `stop` has it
                metrics.write(dict(watch.look(model, step, validation_features)))

        def save(step: int) -> None:
            metrics.sync()
            checkpoint.save(run.checkpoints, step, state, optimizer, made_from, kept(settings, run, step))

        if watch is not None and start == 0:
            metrics.write(dict(watch.base))
        if start and is_evaluated(start) and not any(line["step"] == start for line in watching.evaluations(lines)):
            evaluate(start)
            if stop.signal is not None:
                raise interrupted(stop.signal, start, total, run)
        for step in telling_out_of_memory(train.train(job, inputs.train.examples, inputs.plan, start)):
            metrics.write(step.as_dict())
            progress.update(step.step, step.loss, step.tokens_per_second, step.memory, step.learning_rate, step.epoch)
            is_kept = schedule.is_due(step.step, total, training.checkpoint_every, per_epoch)
            is_saved = stop.signal is not None or is_kept or (is_evaluated(step.step) and selects_best)
            if is_saved:
                save(step.step)
            if stop.signal is None and is_evaluated(step.step):
                evaluate(step.step)
            if stop.signal is not None:
                if not is_saved:
                    save(step.step)
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


def kept(settings: Recipe, run: RunFolder, step: int) -> Keep:
    """Which checkpoints stay, once there is one of this step."""
    best = chosen(settings, run, step).step if settings.training.select == "best" else None
    return Keep(settings.training.keep_checkpoints, best)


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
        hint = "start again with ftune train RECIPE --resume"
        raise signals.interrupted(stop.signal, "before the first step", str(run.path), hint)


def interrupted(number: int, step: int, total: int, run: RunFolder) -> Interrupted:
    how = f"after step {step} of {total}; checkpoint saved"
    return signals.interrupted(number, how, str(run.path), "go on with ftune train RECIPE --resume")
