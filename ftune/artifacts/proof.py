"""Proofs on logits: the adapter is live, a reload gives the same, the merged model gives the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import classifier, comparing, quantized
from ftune import model as models
from ftune.artifacts import checks, companions, distance, files
from ftune.artifacts.checks import Check, Expected
from ftune.artifacts.distance import Distances
from ftune.artifacts.distance import Logits as Logits
from ftune.artifacts.distance import reference as reference
from ftune.errors import RunError, UserError
from ftune.methods import saved
from ftune.methods.base import check_merging
from ftune.methods.head import method_of
from ftune.recipe import ModelSection
from ftune.settings import METHOD_NAMES


@dataclass(frozen=True)
class Proof:
    """The `artefact` part of report.json: largest absolute logit differences over the proof rows, and their limit."""

    adapter_live: bool
    keys_loaded: str
    reload_max_diff: float | None
    merged_max_diff: float | None
    tolerance: float
    reason: str = ""
    """Why something was not measured."""
    distances: Distances | None = None
    """Of both possible merges from what was trained, where the base was quantized."""
    adapter_sha256: str | None = None
    """Of the adapter that was measured; None of a whole model."""
    forced_base: tuple[str, ...] = ()
    """The files in which the base is not the one trained on."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "adapter_live": self.adapter_live,
            "keys_loaded": self.keys_loaded,
            "reload_max_diff": self.reload_max_diff,
            "merged_max_diff": self.merged_max_diff,
            "tolerance": self.tolerance,
            "reason": self.reason,
            "adapter_sha256": self.adapter_sha256,
            **({"forced_base": list(self.forced_base)} if self.forced_base else {}),
            **(self.distances.as_dict() if self.distances else {}),
        }

    def gates(self) -> list[dict[str, Any]]:
        """Gates that always hold, whatever the recipe says."""
        found = [{"name": "adapter_live", "limit": True, "value": self.adapter_live, "passed": self.adapter_live}]
        for name, value in (("reload_max_diff", self.reload_max_diff), ("merged_max_diff", self.merged_max_diff)):
            if value is not None:
                found.append({"name": name, "limit": self.tolerance, "value": value, "passed": value <= self.tolerance})
        return found


def is_live(ours: Logits, base: Logits) -> bool:
    """Whether the tuned model differs from the base at all."""
    return comparing.max_difference(ours, base) > 0


def prove_tuned(tuned: PreTrainedModel, base: Logits, live: Logits | None, keys_loaded: str, method: str) -> Proof:
    """Prove a reloaded model against the base and the live one; then fold the adapter in, in memory, and compare.

    `tuned` is merged in place: nothing may use it as an adapter afterwards.
    """
    ours = last = reference(tuned)
    merged = None
    if METHOD_NAMES[method].abilities.merging:
        method_of(method, tuned).merge(tuned)
        last = reference(tuned)
        merged = comparing.max_difference(last, ours)
    return Proof(
        adapter_live=is_live(ours, base),
        keys_loaded=keys_loaded,
        reload_max_diff=None if live is None else comparing.max_difference(ours, live),
        merged_max_diff=merged,
        tolerance=comparing.tolerance(tuned, last),
        reason="" if merged is not None else f"an adapter of {method} cannot be merged",
    )


@dataclass(frozen=True)
class Merge:
    """What a merge wrote, and how far its logits lie from the adapter's on the same base."""

    output: Path
    max_diff: float
    tolerance: float
    keys_loaded: str
    trained_over: str = "none"
    """How the base was quantized while the adapter was trained."""
    distances: Distances | None = None
    checks: tuple[Check, ...] = ()
    """What held of the folder besides its logits."""
    forced_base: tuple[str, ...] = ()
    """The files in which the base is not the one trained on."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "merged_max_diff": self.max_diff,
            "tolerance": self.tolerance,
            "keys_loaded": self.keys_loaded,
            "merged_into": "full_precision",
            "trained_over": self.trained_over,
            "checks": [check.as_dict() for check in self.checks],
            **({"forced_base": list(self.forced_base)} if self.forced_base else {}),
            **(self.distances.as_dict() if self.distances else {}),
        }


def trained_over(
    settings: ModelSection, adapter: Path, strength: float, device: torch.device
) -> tuple[Logits, distance.Distance]:
    """The logits of the adapter over the quantized base it was trained on, and how far a merge into that base lies."""
    dtype = models.base_dtype(settings, device, trains_base=False)
    model = classifier.load(settings, dtype, device, files.read_classes(adapter))
    method = method_of(files.load_adapter(model, adapter).method, model)
    method.set_strength(model, strength)
    trained = reference(model)
    method.merge(model)
    return trained, distance.dequantized_merge(settings, model, trained)


def check_mergeable(settings: ModelSection) -> None:
    """A merge needs weights that can hold it."""
    if quantized.is_stored_quantized(models.load_config(settings)):
        raise UserError(
            f"this base is stored in {settings.quantization} only, and rounding would eat what the adapter changes",
            f"model.base: {settings.base}",
            "serve the adapter itself, or train it over the base in full precision with model.quantization",
        )


def merge(
    settings: ModelSection,
    adapter: Path,
    output: Path,
    strength: float,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    is_forced: bool = False,
) -> Merge:
    """Fold an adapter into its base, in the base's stored dtype, and write it only after its own files proved equal.

    An adapter that was trained over a quantized base goes into that base's full precision; how far that lies from what
    was trained is measured.

    Raises UserError for the wrong base (unless it is forced) or an adapter that is in it already, RunError when merged
    and adapter differ, or something else that was trained with got lost.
    """
    check_merging(files.read_settings(adapter).name)
    card, digest = files.read_card(adapter), files.adapter_digest(adapter)
    base_card = files.read_card(settings.base) if isinstance(settings.base, Path) else {}
    fingerprint = models.fingerprint(settings)
    forced = files.check_base(card, fingerprint, digest, base_card, is_forced)
    check_mergeable(settings)
    over, classes = settings.quantization, files.read_classes(adapter)
    trained, dequantized = trained_over(settings, adapter, strength, device) if over != "none" else (None, None)
    settings = distance.full_precision(settings)
    dtype = models.stored_dtype(models.load_config(settings))
    model = classifier.load(settings, dtype, device, classes)
    base, was_tied = reference(model), models.is_tied(model)
    loaded = files.load_adapter(model, adapter)
    method = method_of(loaded.method, model)
    method.set_strength(model, strength)
    wanted, is_tied = reference(model), was_tied and not saved.unties(model)
    if not is_live(wanted, base):
        raise RunError("the adapter has no effect, so there is nothing to merge", str(adapter), "was it trained?")
    method.merge(model)
    contains = [*base_card.get("contains_adapters", []), digest]
    merged_card = {
        "base": fingerprint,
        "contains_adapters": contains,
        "strength": strength,
        "trained_over": over,
        "dtype": str(dtype).removeprefix("torch."),
        **({"forced_base": forced} if forced else {}),
    }
    distances = None
    if trained is not None and dequantized is not None:
        distances = Distances(distance.between(reference(model), trained), dequantized)
    expected = expected_of(settings, card, tokenizer, dtype)
    difference = limit = 0.0
    held: list[Check] = []

    def prove(folder_: Path) -> None:
        nonlocal difference, limit
        companions.copy_processors(settings.base, folder_)
        held.extend(checks.of_files(folder_, expected))
        checks.require(held, output)
        written = models.load_base(ModelSection(base=folder_, attention=settings.attention), torch.float32, device)
        held.extend(checks.of_ties(folder_, written, is_tied))
        checks.require(held, output)
        written = written.to(dtype)
        found = reference(written)
        difference, limit = comparing.max_difference(found, wanted), comparing.tolerance(written, found)
        if not difference <= limit or difference >= comparing.max_difference(wanted, base):
            raise RunError(
                f"the merged model's logits differ from the adapter's by {difference:.3g}, more than {limit:.3g}",
                str(output),
                "nothing was written; serve the adapter itself, or merge in float32",
            )

    files.save_model(output, model, tokenizer, merged_card, prove)
    return Merge(output, difference, limit, loaded.keys_loaded, over, distances, tuple(held), tuple(forced))


def expected_of(
    settings: ModelSection,
    card: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None,
) -> Expected:
    """What a merged folder must agree with: the tokenizer on the adapter's card, or else the one that is there."""
    return Expected(
        tokenizer=card.get("tokenizer") or companions.identity(tokenizer),
        base=settings.base if isinstance(settings.base, Path) else None,
        dtype=dtype,
    )


def check_not_there(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError("a file of this name exists already", str(output), "choose another with --output")
    if output.exists() and any(output.iterdir()):
        raise UserError("this folder exists already", str(output), "choose another with --output, or pass --overwrite")
