"""`ftune verify`: what was trained or merged, proved again from its files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune import comparing, folder
from ftune import model as models
from ftune.artifacts import checks, companions, distance, files, proof
from ftune.artifacts.checks import Check, Expected
from ftune.engine import single_device
from ftune.errors import FtuneError
from ftune.folder import RunFolder
from ftune.run.afterwards import check_base, forced_base, load_base, load_tuned, whole_model
from ftune.run.targets import Target


def verify_target(target: Target) -> dict[str, Any]:
    """Prove a target again from its files. Every check is told, whether it held or not."""
    found = [] if target.run is None else [_checksums(target.run)]
    forced: list[str] = []
    try:
        forced = forced_base(target)
        for check in _prove(target, forced, single_device()):
            found.append(check)  # one by one: those before an error are told too
    except FtuneError as error:
        found.append(Check("load", False, str(error)))
    document = {
        "target": str(target.path),
        "passed": all(check.passed for check in found),
        "checks": [check.as_dict() for check in found],
    }
    return {**document, "forced_base": forced} if forced else document


def _checksums(run: RunFolder) -> Check:
    changed = [f"{run.manifest.name} (the run is not finished)"]
    if run.is_complete:
        changed = folder.changed_files(run.path, run.recorded)
    told = "checksum mismatch: " + ", ".join(changed) if changed else "every file as it was written"
    return Check("checksums", not changed, told)


def _prove(target: Target, forced: list[str], device: torch.device) -> Iterator[Check]:
    yield _base(target, forced)
    if target.adapter is None and target.tuned is not None:
        yield from checks.of_files(target.tuned, _expected(target, target.tuned))
    tuned, keys_loaded, method = load_tuned(target, device)
    yield Check("keys_loaded", True, f"loaded {keys_loaded} tensors")
    if target.adapter is not None:
        yield from checks.of_companions(target.adapter, _trained_with(target), models.is_classifier(tuned))
    elif target.tuned is not None:
        yield from checks.of_ties(target.tuned, tuned, files.read_card(target.tuned).get("tied"))
    yield from _prove_logits(target, tuned, keys_loaded, method, device)


def _base(target: Target, forced: list[str]) -> Check:
    """The base is the one trained on; of a model folder whose base was not named, only that this is not known."""
    if target.adapter is not None:
        check_base(target)
        told = f"another than was trained on ({', '.join(forced)} differs), as --force asks" if forced else ""
        return Check("base", True, told or "the base is the one trained on")
    if target.tuned is None or target.model.base == target.tuned:
        return Check("base", True, "not asked for: name it with --base to compare with it")
    changed = files.changed_base(files.read_card(target.tuned), models.fingerprint(target.model))
    told = f"base fingerprint differs: {', '.join(changed)}" if changed else "the base is the one it was made from"
    return Check("base", not changed or target.is_forced, told)


def _trained_with(target: Target) -> dict[str, Any] | None:
    """The identity of an adapter's tokenizer: from its card; without one, what must be as the base's."""
    assert target.adapter is not None
    card = files.read_card(target.adapter)
    if "tokenizer" in card:
        return dict(card["tokenizer"])
    if not (target.adapter / "tokenizer_config.json").is_file():
        return None
    base = companions.identity(models.load_tokenizer(target.model))
    return {key: base[key] for key in ("vocabulary", "encodings")}


def _expected(target: Target, path: Path) -> Expected:
    """What a model folder's card says it was made with."""
    card, base = files.read_card(path), target.model.base
    dtype = getattr(torch, card["dtype"]) if "dtype" in card else None
    return Expected(card.get("tokenizer"), base if isinstance(base, Path) else None, dtype)


def _prove_logits(
    target: Target, tuned: PreTrainedModel, keys_loaded: str, method: str, device: torch.device
) -> Iterator[Check]:
    ours = proof.reference(tuned)
    if target.run is None and target.adapter is None and target.model.base == target.path:
        yield Check("finite", all(bool(logits.isfinite().all()) for logits in ours), "all logits are numbers")
        return
    base = load_base(target, device)
    proved = proof.prove_tuned(tuned, proof.reference(base), None, keys_loaded, method)
    live = "differs from the base" if proved.adapter_live else "adapter has no effect"
    yield Check("adapter_live", proved.adapter_live, live)
    if proved.merged_max_diff is None:
        return
    told = f"merged and adapter logits differ by {proved.merged_max_diff:.2g} (limit {proved.tolerance:.2g})"
    yield Check("merge", proved.merged_max_diff <= proved.tolerance, told)
    if target.run is not None and target.adapter is not None and target.run.merged.is_dir():
        yield from _prove_merged_folder(target, target.run.merged, ours, device)


def _prove_merged_folder(target: Target, path: Path, ours: proof.Logits, device: torch.device) -> Iterator[Check]:
    """`merged/` beside an adapter whose logits are `ours`."""
    for check in checks.of_files(path, _expected(target, path)):
        yield replace(check, name=f"merged_{check.name}")
    merged = models.load_base(whole_model(target, path), torch.float32, device)
    for check in checks.of_ties(path, merged, files.read_card(path).get("tied")):
        yield replace(check, name=f"merged_{check.name}")
    merged = merged.to(models.stored_dtype(merged.config))
    found = proof.reference(merged)
    if target.model.quantization != "none":
        full, _, _ = load_tuned(replace(target, model=distance.full_precision(target.model)), device)
        ours = proof.reference(full)
    difference, limit = comparing.max_difference(found, ours), comparing.tolerance(merged, found)
    told = f"merged/ and adapter logits differ by {difference:.2g} (limit {limit:.2g})"
    yield Check("merged_folder", difference <= limit, told)
