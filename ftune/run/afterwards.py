"""`ftune eval`, `merge` and `generate`: what is done with something that was trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import chat, classifier, evaluate, folder, lock, predict, quantized, stored
from ftune import model as models
from ftune.artifacts import files, proof, requantized
from ftune.console.streams import warn
from ftune.data import LABELLED, BadRow, Example, Rules, SourceRow, make_example
from ftune.engine import single_device
from ftune.errors import UserError
from ftune.folder import RunFolder
from ftune.methods.head import method_of
from ftune.recipe import ModelSection, TrainingSection
from ftune.run import evidence, reporting, strengths, training
from ftune.run.inputs import require
from ftune.run.targets import Target
from ftune.train import TrainingPlan

KEPT = ("path", "selection", "strengths")
"""Parts of a report that stay when a run is measured again."""
WRITTEN_AGAIN = ("samples.jsonl", "probe.jsonl", "report.html", "report.md", "review.html", "junit.xml")
"""Files of a run that measuring it again makes from nothing."""


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


def check_base(target: Target) -> list[str]:
    """The adapter must be on the base it was trained on (or on a forced one), and not on one that contains it.

    Returns the files in which a forced base differs.
    """
    assert target.adapter is not None
    base = target.model.base
    base_card = files.read_card(base) if isinstance(base, Path) else {}
    digest = files.adapter_digest(target.adapter)
    fingerprint = models.fingerprint(target.model)
    return files.check_base(files.read_card(target.adapter), fingerprint, digest, base_card, target.is_forced)


def forced_base(target: Target) -> list[str]:
    """The files in which a forced base differs from the one trained on, with a warning; none if nothing is forced."""
    changed = check_base(target) if target.is_forced and target.adapter is not None else []
    if changed:
        warn(f"going on with another base than was trained on ({', '.join(changed)} differs), as --force asks")
    return changed


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


def at_strength(target: Target, base: PreTrainedModel, strength: float, device: torch.device) -> PreTrainedModel:
    """The tuned model with that share of what was trained: 0 is the base, 1 all of it."""
    tuned, _, method = load_tuned(target, device)
    if target.adapter is None:
        strengths.interpolate(tuned, base, strength)
    else:
        method_of(method, tuned).set_strength(tuned, strength)
    return tuned


def check_untouched(run: RunFolder) -> None:
    """A run's files are measured and recorded anew only as the run wrote them; those that are written again aside."""
    recorded = run.recorded
    kept = {name: digest for name, digest in recorded.items() if name not in WRITTEN_AGAIN}
    if changed := folder.changed_files(run.path, kept):
        hint = "restore them, or evaluate the adapter's folder with --recipe"
        raise UserError(f"changed since the run wrote it: {', '.join(changed)}", str(run.path), hint)


def evaluate_target(target: Target, at: Sequence[float] = ()) -> dict[str, Any]:
    """Measure a target again, and at other strengths if they are given; a run's report is rewritten."""
    if target.recipe is None:
        raise UserError(
            "no recipe says what to measure this on",
            str(target.path),
            "name one with --recipe (data and evaluation are read)",
        )
    if target.run is not None and target.run.is_complete:
        stored.refuse_links(target.run.path)
        check_untouched(target.run)
    settings = target.recipe.model_copy(update={"model": target.model})
    inputs = replace(require(settings), tokenizer=tokenizer_of(target))
    device = single_device()
    forced = forced_base(target)
    tuned, keys_loaded, method = load_tuned(target, device)
    base = load_base(target, device)
    base_logits = proof.reference(base)
    measured = evidence.gather(settings, inputs, base, tuned)
    proved = proof.prove_tuned(tuned, base_logits, None, keys_loaded, method)
    del tuned

    def load(strength: float) -> PreTrainedModel:
        return at_strength(target, base, strength, device)

    more = {"strengths": strengths.measure(settings, inputs, base, load, at)} if at else {}
    reasons = [proved.reason, "reload_max_diff is measured while training only"]
    adapter = files.adapter_digest(target.adapter) if target.adapter is not None else None
    proved = replace(proved, reason="; ".join(filter(None, reasons)), adapter_sha256=adapter, forced_base=tuple(forced))
    if target.run is None or not target.run.is_complete:
        return training.report_of(settings, inputs, measured, proved, {}) | more
    with stored.as_written(target.run.report):
        old = stored.read_object(target.run.report)
        document = training.report_of(settings, inputs, measured, proved, old["cost"])
        document["artefact"]["reload_max_diff"] = old["artefact"]["reload_max_diff"]
        document |= {key: old[key] for key in KEPT if key in old} | more
    with lock.hold(target.run.path):
        manifest = stored.read_object(target.run.manifest)
        again = (*WRITTEN_AGAIN, target.run.report.name)
        # Killed from here on, the run is one that can be measured again.
        manifest["files"] = {name: digest for name, digest in target.run.recorded.items() if name not in again}
        folder.write_json(target.run.manifest, manifest)
        measured.write_lines(target.run)
        document |= reporting.kept_verdicts(target.run)
        folder.write_json(target.run.report, document)
        manifest["metric"] = inputs.function and inputs.function.as_dict()
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
    make_room(chosen, overwrite)
    device = single_device()
    merge = requantized.merge if is_quantized else proof.merge
    forced_base(target)
    tokenizer = tokenizer_of(target)
    merged = merge(target.model, target.adapter, chosen, strength, tokenizer, device, target.is_forced)
    if target.run is not None and target.run.is_complete and chosen == beside:
        added = {f"{ending}/{name}": digest for name, digest in folder.checksums(chosen).items()}
        with lock.hold(target.run.path):
            recorded, manifest = target.run.recorded, stored.read_object(target.run.manifest)
            folder.write_json(target.run.manifest, {**manifest, "files": {**recorded, **added}})
    return merged.as_dict()


def make_room(output: Path, overwrite: bool) -> None:
    """What an earlier merge left there may be replaced, once the new one is proved; nothing else that lies there."""
    if output.is_symlink():
        stored.refuse_links(output)
    if not (overwrite and output.is_dir() and (output / files.CARD).is_file()):
        proof.check_not_there(output)


def generate_from(target: Target, prompt: str, max_new_tokens: int) -> str:
    """One greedy answer to one prompt; of a classifier, the label and its probability."""
    tuned, _, _ = load_tuned(target, single_device())
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
