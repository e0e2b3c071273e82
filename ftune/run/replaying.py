"""The replay of a step whose loss or gradient was no number: everything that computed it, kept in the run folder.

from ftune.run.replaying import replay
replay("runs/quickstart")     # {"step": 7, "what": "loss", "recorded": "nan", "replayed": "nan", ...}
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ftune import classifier, folder, recipe, train
from ftune import model as models
from ftune.batches import MicroBatch
from ftune.classifier import Classes, classes_of
from ftune.console.streams import rank
from ftune.engine import Engine, whole
from ftune.folder import RunFolder
from ftune.methods import METHODS
from ftune.methods.base import copy_strictly, trainable, training_state
from ftune.methods.head import method_of
from ftune.objectives import OBJECTIVES
from ftune.optimizers import make_optimizer
from ftune.recipe import Recipe

FACTS = "replay.json"
BATCH = "batch.safetensors"
PARAMETERS = "parameters.safetensors"
TENSORS = ("input_ids", "position_ids", "labels", "features")


def recording(
    steps: Iterator[train.Step],
    settings: Recipe,
    run: RunFolder,
    model: PreTrainedModel,
    write: Callable[[Mapping[str, Any]], None],
) -> Iterator[train.Step]:
    """The steps; one that is no number leaves a line in the metrics and its replay, and ends the run as before."""
    if rank() == 0:
        shutil.rmtree(run.replay, ignore_errors=True)  # of an earlier attempt at this run
    try:
        yield from steps
    except train.NonFinite as error:
        write({"step": error.step, "non_finite": error.what, "value": str(error.value), "row_ids": list(error.row_ids)})
        keep(error, settings, run, model)
        raise


def keep(error: train.NonFinite, settings: Recipe, run: RunFolder, model: PreTrainedModel) -> None:
    """Write the step's micro-batches, of all processes, and the parameters that it started from: none was touched."""
    tensors_before = {name: whole(t.detach()).contiguous() for name, t in training_state(model).items()}
    if rank():
        return
    facts = {
        "step": error.step,
        "what": error.what,
        "value": str(error.value),  # JSON has no numbers that are none
        "row_ids": list(error.row_ids),
        "micro_batches": [{"row_ids": part.row_ids, "bounds": part.bounds} for part in error.parts],
        "classes": asdict(classes_of(model.config)) if models.is_classifier(model) else None,
        "recipe": settings.model_dump(mode="json"),
    }
    with folder.atomic_folder(run.replay) as path:
        tensors = {
            f"{number}.{name}": value.contiguous()
            for number, part in enumerate(error.parts)
            for name in TENSORS
            if (value := getattr(part, name)) is not None
        }
        save_file(tensors, path / BATCH)
        save_file(tensors_before, path / PARAMETERS)
        folder.write_json(path / FACTS, facts)


def replay(path: Path | str) -> dict[str, Any]:
    """Compute such a step again from its files and the base: what came out then, what comes out now, and of which rows.

    `path` is the run folder. `gradients` names the tensors whose gradient is no number, where the loss is one.
    """
    run = RunFolder(Path(path))
    facts = folder.read_json(run.replay / FACTS)
    settings = recipe.load(run.recipe)
    engine = Engine()
    model = _model(settings, facts, run, engine.device)
    training = settings.training
    plan = train.TrainingPlan(training, facts["step"], settings.data.packing, settings.model.attention, training.seed)
    job = train.Job(
        model,
        method_of(settings.method.name, model),
        OBJECTIVES[settings.objective.name],
        make_optimizer(model, training),
        engine,
    )
    parts = _parts(facts, run)
    if parts[0].features is not None:
        plan = replace(plan, packing=False)
    model.train()
    train.seed_step(plan.seed, facts["step"])
    found = {"step": facts["step"], "what": facts["what"], "recorded": facts["value"]}
    try:
        loss, _ = train.accumulate(job, train.Share(parts), plan)
    except train.NonFinite as error:
        return {**found, "replayed": str(error.value), "row_ids": list(error.row_ids), "gradients": []}
    gradients = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    wrong = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    value = norm if facts["what"] == "gradient" else loss
    return {**found, "replayed": str(value), "row_ids": facts["row_ids"], "gradients": wrong}


def _model(settings: Recipe, facts: Mapping[str, Any], run: RunFolder, device: torch.device) -> PreTrainedModel:
    """The model as it stood before that step."""
    dtype = models.base_dtype(settings.model, device, METHODS[settings.method.name].trains_base)
    known = facts["classes"]
    classes = Classes(tuple(known["labels"]), known["pad_token_id"]) if known else None
    model = classifier.load(settings.model, dtype, device, classes, settings.training.seed)
    method_of(settings.method.name, model).attach(model, settings.method, settings.training.seed)
    copy_strictly(training_state(model), load_file(run.replay / PARAMETERS))
    return model


def _parts(facts: Mapping[str, Any], run: RunFolder) -> list[MicroBatch]:
    tensors = load_file(run.replay / BATCH)
    return [
        MicroBatch(
            tensors[f"{number}.input_ids"],
            tensors[f"{number}.position_ids"],
            tensors[f"{number}.labels"],
            tuple(part["bounds"]),
            tuple(part["row_ids"]),
            tensors.get(f"{number}.features"),
        )
        for number, part in enumerate(facts["micro_batches"])
    ]
