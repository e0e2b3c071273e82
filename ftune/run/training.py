"""`ftune train`: recipe, plan, data, model and method, train, save, verify, evaluate, report."""

import shutil
import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ftune import classifier, folder, plan, quantized, recipe, report, schedule, stored, train
from ftune import model as models
from ftune.artifacts import distance, files, proof
from ftune.artifacts.serving import obstacle_in_vllm
from ftune.console.audit import print_audit
from ftune.console.streams import messages, note
from ftune.errors import UserError
from ftune.folder import RunFolder
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.recipe import Recipe
from ftune.run import evidence, watching
from ftune.run.fitting import fit, stopping_on_signals
from ftune.run.inputs import Inputs, attach_method, digests, hashes, load_base, require, resolve
from ftune.settings import METHOD_NAMES

RESUMABLE = ("gates.", "evaluation.")
"""Parts of a recipe that may change before a run is resumed: they do not touch training."""


def train_run(settings: Recipe, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """The whole story of a run; returns its report."""
    settings = resolve(settings)
    run = RunFolder(settings.output.dir)
    check_folder(run, settings, resume, overwrite)
    if resume and run.is_complete:
        note(f"already complete: {run.path}, nothing to do")
        return {**stored.read_object(run.report), "already_complete": True}
    inputs = require(settings)
    print_audit(inputs.account(), messages())
    if told := inputs.prediction.told_targets():
        note(told)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("several processes are not available in this version", "training.parallel", "start one process")
    began = time.perf_counter()
    model = load_base(settings, inputs, accelerator.device)
    watch = watching.begin(settings, inputs, model)
    before = attach_method(settings, inputs, model)
    with folder.lock(run.path):
        if overwrite:
            clear(run)
        if not resume:
            folder.write_text(run.recipe, recipe.dump(settings))
        folder.write_json(run.plan, inputs.prediction.as_dict())
        folder.write_json_lines(run.twins, (twin.as_dict() for twin in inputs.twins))
        made_from = digests(settings, inputs)
        with stopping_on_signals() as stop:
            selection = fit(settings, inputs, model, accelerator, run, made_from, watch, stop)
        record = tensors_record(model, before) | quantized.describe(model, settings.model)
        record["optimizer"] = train.resolve_optimizer(settings.training.optimizer, accelerator.device)
        live = proof.reference(model)
        save(settings, inputs, model, run, made_from)
        del model
        measured, proved = measure(settings, inputs, run, live, accelerator.device)
        cost = cost_of(run, inputs, time.perf_counter() - began, accelerator.device)
        document = report_of(settings, inputs, measured, proved, cost)
        document |= {"path": watching.path(folder.read_json_lines(run.metrics)), "selection": selection.as_dict()}
        finish(settings, inputs, run, document, measured, record, made_from, accelerator.device)
    return document


def check_folder(run: RunFolder, settings: Recipe, resume: bool, overwrite: bool) -> None:
    """What lies in output.dir decides whether this run may use it."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", "ftune train", "choose one")
    # What is overwritten is removed, links as the links they are; all but the lock.
    stored.refuse_links(run.path / folder.LOCK if overwrite and not run.path.is_symlink() else run.path)
    if run.path.exists() and not run.path.is_dir():
        raise UserError("a file of this name exists already", str(run.path), "choose another output.dir")
    if resume:
        if not run.is_run:
            raise UserError("no run to resume", str(run.path), "start it without --resume")
        changes = recipe.differences(recipe.load(run.recipe), settings)
        if bending := [change for change in changes if not change.startswith(RESUMABLE)]:
            raise UserError(
                "the recipe changed since this run began: " + "; ".join(bending),
                str(run.recipe),
                "resume with the recipe it began with, or start another run",
            )
    elif run.path.exists() and any(run.path.iterdir()):
        if not run.is_run:
            raise UserError("this folder holds other files", str(run.path), "choose another output.dir")
        if not overwrite:
            raise UserError(
                "this folder holds a run already", str(run.path), "use --resume, --overwrite or another output.dir"
            )


def clear(run: RunFolder) -> None:
    """Remove an old run's files, only now that the new one is ready to start."""
    for entry in run.path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != folder.LOCK:
            entry.unlink()


def tensors_record(model: PreTrainedModel, before: dict[str, int]) -> dict[str, Any]:
    """Which tensors were to be trained, which did change, and which are saved: the first two must agree."""
    after = hashes(model)
    names = list(trainable(model))
    return {
        "trainable": names,
        "changed": [name for name, value in after.items() if before.get(name) != value],
        "saved": names if len(names) < len(after) else list(after),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trainable(model).values()}),
    }


def save(settings: Recipe, inputs: Inputs, model: PreTrainedModel, run: RunFolder, made_from: dict[str, Any]) -> None:
    """Write what was trained: the adapter, or the whole model; and the merged model where the recipe wants it."""
    card = {
        "base": made_from["base"],
        "template": made_from["template"],
        "base_name": str(settings.model.base),
        "method": settings.method.model_dump(mode="json"),
    }
    if settings.model.quantization != "none":
        card["trained_over"] = {key: getattr(settings.model, key) for key in ("quantization", "double_quantization")}
    if METHODS[settings.method.name].trains_base:
        files.save_model(run.merged, model, inputs.tokenizer, card)
        return
    files.save_adapter(run.adapter, model, inputs.tokenizer, settings.method, str(settings.model.base), card)
    config = files.read_adapter_config(run.adapter)
    if METHOD_NAMES[settings.method.name].abilities.vllm and (obstacle := obstacle_in_vllm(config)):
        note(f"vLLM cannot serve this adapter as it is: {obstacle}; serve the merged model")
    if settings.output.save != "adapter":
        device = next(model.parameters()).device
        proof.merge(settings.model, run.adapter, run.merged, 1.0, inputs.tokenizer, device)


def measure(
    settings: Recipe, inputs: Inputs, run: RunFolder, live: proof.Logits | None, device: torch.device
) -> tuple[evidence.Evidence, proof.Proof]:
    """Load base and artefact afresh from their files, measure both, and prove the artefact."""
    base, tuned, keys_loaded = load_pair(settings, inputs, run, device)
    base_logits = proof.reference(base)
    measured = evidence.gather(settings, inputs, base, tuned)
    del base
    trained = proof.reference(tuned) if distance.is_measurable(settings.model) else None
    proved = proof.prove_tuned(tuned, base_logits, live, keys_loaded, settings.method.name)
    if not METHODS[settings.method.name].trains_base:
        proved = replace(proved, adapter_sha256=files.adapter_digest(run.adapter))
    if trained is None:
        return measured, proved
    dequantized = distance.dequantized_merge(settings.model, tuned, trained)
    del tuned
    plain = distance.full_precision_merge(settings.model, run.adapter, trained, device)
    return measured, replace(proved, distances=distance.Distances(plain, dequantized))


def load_pair(
    settings: Recipe, inputs: Inputs, run: RunFolder, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel, str]:
    """The base, and what the run made of it, both from disk."""
    method = METHODS[settings.method.name]
    dtype = models.base_dtype(settings.model, device, method.trains_base)
    base = classifier.load(settings.model, dtype, device, inputs.classes)
    if method.trains_base:
        tuned = models.load_base(
            settings.model.model_copy(update={"base": run.merged, "revision": None}), dtype, device
        )
        count = len(tuned.state_dict())
        return base, tuned, f"{count}/{count}"
    tuned = classifier.load(settings.model, dtype, device, inputs.classes)
    loaded = files.load_adapter(tuned, run.adapter)
    return base, tuned, loaded.keys_loaded


def cost_of(run: RunFolder, inputs: Inputs, seconds: float, device: torch.device) -> dict[str, Any]:
    """What the run cost; `tokens` counts what training read, `tokens_per_second` its own time alone."""
    lines = [line for line in folder.read_json_lines(run.metrics) if "loss" in line]
    tokens = sum(line["tokens"] for line in lines)
    training_seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines)
    return {
        "seconds": seconds,
        "training_seconds": training_seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / training_seconds,
        "peak_memory_bytes": train.peak_memory(device),
        "trainable_parameters": inputs.prediction.trainable,
    }


def report_of(
    settings: Recipe, inputs: Inputs, measured: evidence.Evidence, proved: proof.Proof, cost: dict[str, Any]
) -> dict[str, Any]:
    """report.json; its names are a contract."""
    document = {
        "schema": 1,
        "name": settings.name,
        "task": measured.task,
        "forgetting": measured.forgetting,
        "artefact": proved.as_dict(),
        "gates": [*evidence.gates(settings, measured), *proved.gates()],
        "cost": cost,
        "data": inputs.account(),
    }
    return {**document, "verdict": report.verdict(document)}


def finish(
    settings: Recipe,
    inputs: Inputs,
    run: RunFolder,
    document: dict[str, Any],
    measured: evidence.Evidence,
    record: dict[str, Any],
    made_from: dict[str, Any],
    device: torch.device,
) -> None:
    """Write samples, plan, report and, last, the manifest: a folder without one is not finished."""
    per_epoch = schedule.steps_per_epoch(len(inputs.train.mixture), settings.training.batch_size)
    steps = {
        "per_epoch": per_epoch,
        "total": inputs.plan.total_steps,
        "supervised_tokens": inputs.train.audit.supervised_tokens,
    }
    folder.write_json(run.plan, plan.with_measured(inputs.prediction, document["cost"]["peak_memory_bytes"], steps))
    measured.write_lines(run)
    folder.write_json(run.report, document)
    manifest = {
        "format_version": folder.FORMAT_VERSION,
        "versions": models.versions(),
        "seed": settings.training.seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "base": made_from["base"],
        "data": made_from["data"],
        "commits": made_from["commits"],
        "template": made_from["template"],
        "metric": inputs.function and inputs.function.as_dict(),
        "trust_remote_code": settings.model.trust_remote_code,
        **record,
    }
    write_manifest(run, manifest)


def write_manifest(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Render the report with the manifest's facts, then record every file's checksum in it: that completes the run."""
    folder.write_json(run.manifest, manifest)
    report.render(run.path)
    names = folder.checksums(run.path, exclude=(folder.LOCK, run.manifest.name))
    kept = {name: digest for name, digest in names.items() if not name.startswith("checkpoints/")}
    folder.write_json(run.manifest, {**manifest, "files": kept})
