"""`ftune train`: recipe, plan, data, model and method, train, save, verify, evaluate, report."""

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune import (
    classifier,
    folder,
    lock,
    optimizers,
    plan,
    quantized,
    report,
    schedule,
    signals,
    trackers,
    train,
)
from ftune import model as models
from ftune.activations import TOLD
from ftune.artifacts import distance, files, proof
from ftune.artifacts.serving import obstacle_in_vllm
from ftune.console.audit import print_audit
from ftune.console.streams import messages, note, warn
from ftune.engine import Engine, whole
from ftune.folder import RunFolder
from ftune.methods import METHODS
from ftune.methods.base import copy_strictly, trainable, training_state
from ftune.recipe import Change, Recipe
from ftune.run import changes, evidence, resuming, watching
from ftune.run.fitting import Circumstances, fit
from ftune.run.inputs import Inputs, attach_method, digests, hashes, load_base, require, resolve
from ftune.run.resuming import Beginning, check_folder
from ftune.settings import METHOD_NAMES


def train_run(settings: Recipe, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """The whole story of a run; returns its report. Of several processes one tells it to the end; others get None."""
    settings = resolve(settings)
    run = RunFolder(settings.output.dir)
    began = time.perf_counter()
    engine = Engine(settings.training.parallel)
    changed = list[Change]()
    if engine.is_main:
        resuming.check_free(run)
        changed = check_folder(run, settings, resume, overwrite)
    if engine.from_main(engine.is_main and resume and run.is_complete and not changed):
        note(resuming.told_complete(run))
        return {**folder.read_json(run.report), "already_complete": True} if engine.is_main else None
    with engine.main_first():
        inputs = require(settings)
        if engine.is_main:
            changes.check_length(run, changed, inputs)
    print_audit(inputs.account(), messages())
    for told in (inputs.prediction.told_targets(), TOLD[inputs.prediction.checkpointing], engine.told()):
        if told:
            note(told)
    model = load_base(settings, inputs, engine.loading_device)
    watch = watching.begin(settings, inputs, model)
    before = attach_method(settings, inputs, model)
    engine.hold(model, before)
    tell_numbers(model, engine.device)
    with (
        lock.hold(run.path) if engine.is_main else nullcontext(),
        resuming.telling_how_to_resume(run),
        trackers.following(settings, run, resume, engine.is_main) as following,
    ):
        beginning = None
        if engine.is_main:
            check_folder(run, settings, resume, overwrite)  # somebody may have been here meanwhile
            folder.settle(run.path)
            folder.settle(run.checkpoints)
            if overwrite:
                resuming.clear(run)
            beginning = begin(settings, inputs, run, changed, engine)
        beginning = engine.from_main(beginning)
        with signals.held(may_interrupt=engine.count == 1) as stop:
            around = Circumstances(beginning, watch, stop, following)
            selection = fit(settings, inputs, model, engine, run, around)
            stop.signal = engine.most(stop.signal or 0) or None
        made_from = beginning.made_from
        record = tensors_record(model, before) | quantized.describe(model, settings.model)
        record |= {"optimizer": optimizers.resolve_optimizer(settings.training.optimizer, engine.device)}
        live = proof.reference(model)
        model = unsharded(settings, inputs, model, engine)
        engine.close()
        if not engine.is_main:
            return None
        save(settings, inputs, model, run, made_from)
        del model
        measured, proved = measure(settings, inputs, run, live, engine.device)
        cost = cost_of(run, inputs, time.perf_counter() - began, engine.device)
        document = report_of(settings, inputs, measured, proved, cost)
        document |= {"path": watching.path(folder.read_json_lines(run.metrics)), "selection": selection.as_dict()}
        following.report(document, inputs.plan.total_steps)
        record |= {"trackers": following.as_dict(), **determinism(engine.device)}
        record |= {"processes": engine.count, "parallel": engine.strategy}
        finish(settings, inputs, run, document, measured, record, made_from, engine.device)
    return document


def begin(settings: Recipe, inputs: Inputs, run: RunFolder, changed: list[Change], engine: Engine) -> Beginning:
    """Where the run goes on, and the files that a run has from its start."""
    made_from = digests(settings, inputs) | {"environment": changes.environment(engine)}
    beginning = resuming.begin(run, made_from)
    changes.record(run, changed, settings, beginning.step)
    folder.write_json(run.plan, inputs.prediction.as_dict())
    folder.write_json_lines(run.twins, (twin.as_dict() for twin in inputs.twins))
    return beginning


def unsharded(settings: Recipe, inputs: Inputs, model: PreTrainedModel, engine: Engine) -> PreTrainedModel:
    """The trained model in one piece, in the process that writes it: the base again, with what was trained on it."""
    if not engine.holds_parts:
        return model
    trained = {name: whole(tensor.detach()) for name, tensor in training_state(model).items()}
    if not engine.is_main:
        return model
    plain = load_base(settings, inputs, engine.device)
    attach_method(settings, inputs, plain)
    copy_strictly(training_state(plain), trained)
    return plain


def determinism(device: torch.device) -> dict[str, Any]:
    """Whether the same recipe gives the same bytes again, on this machine and with these versions, and why not."""
    reasons = [
        "attention and embeddings add up gradients in an order that changes",
        "matrix products may take another algorithm when other memory is free",
    ]
    is_deterministic = device.type == "cpu"
    return {"deterministic": is_deterministic, "not_deterministic": [] if is_deterministic else reasons}


def tell_numbers(model: PreTrainedModel, device: torch.device) -> None:
    """What a user should know of this run's arithmetic before it starts."""
    if reasons := determinism(device)["not_deterministic"]:
        note(f"not the same bytes twice on {device.type}: " + "; ".join(reasons))
    if torch.bfloat16 in {parameter.dtype for parameter in trainable(model).values()}:
        warn("weights are trained in bfloat16, which rounds small updates away; model.dtype: auto trains in float32")


def tensors_record(model: PreTrainedModel, before: dict[str, int]) -> dict[str, Any]:
    """Which tensors were to be trained, which did change, and which are saved: the first two must agree."""
    after = hashes(model)
    names = list(trainable(model))
    return {
        "trainable": names,
        "weight_decay": optimizers.decay_groups(model),
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


def is_outside(name: str) -> bool:
    """Whether a file of the run folder is not the run's result: checkpoints may go, trackers' files may grow."""
    return name.startswith("checkpoints/") or trackers.is_tracker_file(name)


def write_manifest(run: RunFolder, manifest: dict[str, Any]) -> None:
    """Render the report with the manifest's facts, then record every file's checksum in it: that completes the run."""
    folder.write_json(run.manifest, manifest)
    report.render(run.path)
    names = folder.checksums(run.path, exclude=(lock.NAME, run.manifest.name))
    kept = {name: digest for name, digest in names.items() if not is_outside(name)}
    folder.write_json(run.manifest, {**manifest, "files": kept})
