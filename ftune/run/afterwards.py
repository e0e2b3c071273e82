"""`ftune eval`, `merge`, `verify` and `generate`: what is done with something that was trained."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import chat, classifier, comparing, evaluate, folder, predict, quantized
from ftune import model as models
from ftune.artifacts import distance, files, proof, requantized
from ftune.data import LABELLED, BadRow, Example, Rules, SourceRow, make_example
from ftune.errors import FtuneError, UserError
from ftune.folder import RunFolder
from ftune.recipe import ModelSection, TrainingSection
from ftune.run import evidence, reporting, training
from ftune.run.inputs import require
from ftune.run.targets import Target
from ftune.train import TrainingPlan


def load_tuned(target: Target, device: torch.device) -> tuple[PreTrainedModel, str, str]:
    """The tuned model from its files, how many of its tensors were loaded, and its method."""
    dtype = models.base_dtype(target.model, device, target.adapter is None)
    if target.adapter is None:
        settings = whole_model(target, target.tuned)
        tuned = models.load_base(settings, dtype, device)
        count = len(tuned.state_dict())
        return tuned, f"{count}/{count}", "full"
    check_base(target)
    tuned = classifier.load(target.model, dtype, device, files.read_classes(target.adapter))
    loaded = files.load_adapter(tuned, target.adapter)
    return tuned, loaded.keys_loaded, loaded.method


def whole_model(target: Target, path: Path | None) -> ModelSection:
    """A model folder that ftune wrote, as its files hold it, whatever was trained over."""
    plain = target.model.model_copy(update={"base": path, "revision": None, "quantization": "none"})
    return plain.model_copy(update=quantized.stored_form(models.load_config(plain)))


def check_base(target: Target) -> None:
    """The adapter must be on the base it was trained on, and not on one that contains it."""
    assert target.adapter is not None
    base = target.model.base
    base_card = files.read_card(base) if isinstance(base, Path) else {}
    digest = files.adapter_digest(target.adapter)
    files.check_base(files.read_card(target.adapter), models.fingerprint(target.model), digest, base_card)


def load_base(target: Target, device: torch.device) -> PreTrainedModel:
    """The base; under a new head, where what was trained is a classifier."""
    tuned = target.adapter or target.tuned
    classes = files.read_classes(tuned) if tuned is not None and tuned != target.model.base else None
    dtype = models.base_dtype(target.model, device, target.adapter is None)
    return classifier.load(target.model, dtype, device, classes)


def tokenizer_of(target: Target) -> PreTrainedTokenizerBase:
    """The tokenizer saved with what was trained, as servers will use it; the base's where there is none."""
    for path in (target.adapter, target.tuned):
        if path is not None and (path / "tokenizer_config.json").is_file():
            return models.load_tokenizer(
                target.model.model_copy(update={"base": path, "revision": None, "chat_template": None})
            )
    return models.load_tokenizer(target.model)


def evaluate_target(target: Target) -> dict[str, Any]:
    """Measure a target again; a run's report is rewritten."""
    if target.recipe is None:
        raise UserError(
            "no recipe says what to measure this on",
            str(target.path),
            "name one with --recipe (data and evaluation are read)",
        )
    settings = target.recipe.model_copy(update={"model": target.model})
    inputs = replace(require(settings), tokenizer=tokenizer_of(target))
    device = Accelerator().device
    tuned, keys_loaded, method = load_tuned(target, device)
    base = load_base(target, device)
    base_logits = proof.reference(base)
    measured = evidence.gather(settings, inputs, base, tuned)
    proved = proof.prove_tuned(tuned, base_logits, None, keys_loaded, method)
    reasons = [proved.reason, "reload_max_diff is measured while training only"]
    proved = replace(proved, reason="; ".join(filter(None, reasons)))
    if target.run is None or not target.run.is_complete:
        return training.report_of(settings, inputs, measured, proved, {})
    old = folder.read_json(target.run.report)
    document = training.report_of(settings, inputs, measured, proved, old["cost"])
    document["artefact"]["reload_max_diff"] = old["artefact"]["reload_max_diff"]
    with folder.lock(target.run.path):
        folder.write_json_lines(target.run.samples, measured.samples)
        document |= reporting.kept_verdicts(target.run)
        folder.write_json(target.run.report, document)
        manifest = folder.read_json(target.run.manifest)
        manifest.pop("files")
        training.write_manifest(target.run, manifest)
    return document


def merge_target(
    target: Target, output: Path | None, strength: float, overwrite: bool, is_quantized: bool = False
) -> dict[str, Any]:
    """Fold a target's adapter into its base and write it, proved; or into the quantized weights it was trained over."""
    if target.adapter is None:
        raise UserError("this is a whole model already, there is no adapter to merge", str(target.path))
    if target.adapter.is_symlink():
        raise UserError("the adapter folder is a link", str(target.adapter), "name the folder itself")
    ending = f"merged-{target.model.quantization}" if is_quantized else "merged"
    beside = target.run.path / ending if target.run else target.adapter.with_name(f"{target.adapter.name}-{ending}")
    chosen = output or beside
    if overwrite and chosen.is_dir() and (chosen / files.CARD).is_file():
        shutil.rmtree(chosen)
    proof.check_not_there(chosen)
    device = Accelerator().device
    merge = requantized.merge if is_quantized else proof.merge
    merged = merge(target.model, target.adapter, chosen, strength, tokenizer_of(target), device)
    if target.run is not None and target.run.is_complete and chosen == beside:
        manifest = folder.read_json(target.run.manifest)
        added = {f"{ending}/{name}": digest for name, digest in folder.checksums(chosen).items()}
        folder.write_json(target.run.manifest, {**manifest, "files": {**manifest["files"], **added}})
    return merged.as_dict()


def verify_target(target: Target) -> dict[str, Any]:
    """Prove a target again from its files. Every check is told, whether it held or not."""
    checks: list[dict[str, Any]] = []

    def add(name: str, passed: bool, told: str) -> None:
        checks.append({"name": name, "passed": passed, "told": told})

    if target.run is not None:
        changed = _changed_files(target.run)
        add(
            "checksums",
            not changed,
            "checksum mismatch: " + ", ".join(changed) if changed else "every file as it was written",
        )
    try:
        device = Accelerator().device
        tuned, keys_loaded, method = load_tuned(target, device)
        add("base", True, "the base is the one trained on")
        add("keys_loaded", True, f"loaded {keys_loaded} tensors")
        _prove_logits(target, tuned, keys_loaded, method, device, add)
    except FtuneError as error:
        add("load", False, str(error))
    return {"target": str(target.path), "passed": all(check["passed"] for check in checks), "checks": checks}


def _changed_files(run: RunFolder) -> list[str]:
    if not run.is_complete:
        return [f"{run.manifest.name} (the run is not finished)"]
    return folder.changed_files(run.path, folder.read_json(run.manifest)["files"])


def _prove_logits(
    target: Target, tuned: PreTrainedModel, keys_loaded: str, method: str, device: torch.device, add: Any
) -> None:
    ours = proof.reference(tuned)
    if target.run is None and target.adapter is None and target.model.base == target.path:
        add("finite", all(bool(logits.isfinite().all()) for logits in ours), "all logits are numbers")
        return
    base = load_base(target, device)
    proved = proof.prove_tuned(tuned, proof.reference(base), None, keys_loaded, method)
    add(
        "adapter_live", proved.adapter_live, "differs from the base" if proved.adapter_live else "adapter has no effect"
    )
    if proved.merged_max_diff is None:
        return
    told = f"merged and adapter logits differ by {proved.merged_max_diff:.2g} (limit {proved.tolerance:.2g})"
    add("merge", proved.merged_max_diff <= proved.tolerance, told)
    if target.run is not None and target.adapter is not None and target.run.merged.is_dir():
        merged = models.load_base(whole_model(target, target.run.merged), torch.float32, device)
        merged = merged.to(models.stored_dtype(merged.config))
        found = proof.reference(merged)
        if target.model.quantization != "none":
            full, _, _ = load_tuned(replace(target, model=distance.full_precision(target.model)), device)
            ours = proof.reference(full)
        difference, limit = comparing.max_difference(found, ours), comparing.tolerance(merged, found)
        add(
            "merged_folder",
            difference <= limit,
            f"merged/ and adapter logits differ by {difference:.2g} (limit {limit:.2g})",
        )


def generate_from(target: Target, prompt: str, max_new_tokens: int) -> str:
    """One greedy answer to one prompt; of a classifier, the label and its probability."""
    tuned, _, _ = load_tuned(target, Accelerator().device)
    tokenizer = tokenizer_of(target)
    if models.is_classifier(tuned):
        return _label_for(tuned, tokenizer, prompt)
    example = Example("prompt", prompt, chat.Tokens([], []), {"prompt": prompt})
    ids = evaluate.prompt_ids(tokenizer, example)
    return evaluate.generate(tuned, tokenizer, [ids], max_new_tokens, "generate")[0]


def _label_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    rules = Rules(format=LABELLED, max_length=getattr(model.config, "max_position_embeddings", None) or 1024)
    try:
        example = make_example(tokenizer, SourceRow("prompt", "prompt", {"text": text, "label": "?"}), LABELLED, rules)
    except BadRow as error:
        raise UserError(str(error), "PROMPT", error.hint) from error
    plan = TrainingPlan(TrainingSection(learning_rate=1.0), 1, False, "auto", 0)
    (class_id,), (probability,) = predict.predict(model, [example], plan)
    return f"{classifier.classes_of(model.config).labels[class_id]}  {probability:.3f}"
