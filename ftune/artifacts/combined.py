"""`ftune merge A B`: several adapters of one base written as one model, proved, and measured against each of them."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from ftune import classifier, comparing, folder
from ftune import model as models
from ftune.artifacts import checks, combining, companions, distance, files
from ftune.artifacts.combining import Combination
from ftune.artifacts.distance import Logits
from ftune.artifacts.proof import check_mergeable, expected_of, is_live
from ftune.errors import Problem, RunError, UserError
from ftune.methods import saved
from ftune.methods.base import check_merging
from ftune.methods.head import method_of
from ftune.recipe import ModelSection

RECORD = "combination.json"
Measure = Callable[[Path], list[dict[str, Any]]]
"""Of a written model folder: what was measured beside each adapter, in their order."""


@dataclass(frozen=True)
class Parts:
    """The adapters to combine, the base that all of them are for, and the tokenizer that all were trained with."""

    settings: ModelSection
    adapters: tuple[Path, ...]
    how: Combination
    tokenizer: Tokenizer
    is_forced: bool = False


@dataclass(frozen=True)
class Parent:
    """One adapter, alone in the base: what it is, and its logits on the proof rows."""

    path: Path
    sha256: str
    method: str
    keys_loaded: str
    weight: float
    logits: Logits
    is_untied: bool

    def as_dict(self) -> dict[str, Any]:
        told = {"name": str(self.path), "sha256": self.sha256, "method": self.method, "weight": self.weight}
        return {**told, "keys_loaded": self.keys_loaded}


def check_parts(parts: Parts) -> tuple[dict[str, str], list[str]]:
    """The base's fingerprint, and the files in which a forced base differs from one trained on.

    Raises UserError with everything that keeps these adapters from being combined.
    """
    problems = []
    base = parts.settings.base
    base_card = files.read_card(base) if isinstance(base, Path) else {}
    fingerprint = models.fingerprint(parts.settings)
    seen: dict[str, Path] = {}
    changed: set[str] = set()
    classes = files.read_classes(parts.adapters[0])
    for path in parts.adapters:
        check_merging(files.read_settings(path).name)
        digest = files.adapter_digest(path)
        if digest in seen:
            problems.append(Problem(f"the same adapter as {seen[digest]}", str(path), "name each adapter once"))
        seen[digest] = path
        try:
            changed |= set(files.check_base(files.read_card(path), fingerprint, digest, base_card, parts.is_forced))
        except UserError as error:
            problems += [Problem(p.what, str(path), p.hint) for p in error.problems]
        if (own := files.read_classes(path)) != classes:
            what = f"{_kind(own)}, and {parts.adapters[0]} is {_kind(classes)}"
            problems.append(Problem(what, str(path), "combine adapters of one kind, classifiers of the same labels"))
    if problems:
        raise UserError.collect(problems)
    check_mergeable(parts.settings)
    return fingerprint, sorted(changed)


def _kind(classes: classifier.Classes | None) -> str:
    return "a language model's" if classes is None else f"a classifier of {', '.join(classes.labels)}"


@dataclass(frozen=True)
class Combined:
    """The model in memory, float32, its logits there, and what it was made from."""

    model: Any
    logits: Logits
    parents: list[Parent]
    is_tied: bool


def write(parts: Parts, output: Path, device: torch.device, measure: Measure) -> dict[str, Any]:
    """Combine, prove the written files, measure, and only then let the folder appear; returns combination.json.

    Adapters that were trained over a quantized base go into its full precision, as one alone does.
    """
    fingerprint, forced = check_parts(parts)
    settings = distance.full_precision(parts.settings)
    dtype = models.stored_dtype(models.load_config(settings))
    made = combine(parts, settings, output, device)
    how = {key: value for key, value in asdict(parts.how).items() if key != "weights"}
    record: dict[str, Any] = {"combine": how.pop("kind"), **how}
    base_card = files.read_card(settings.base) if isinstance(settings.base, Path) else {}
    card = {
        "base": fingerprint,
        "contains_adapters": [*base_card.get("contains_adapters", []), *(parent.sha256 for parent in made.parents)],
        "combination": {**record, "adapters": [parent.as_dict() for parent in made.parents]},
        "dtype": str(dtype).removeprefix("torch."),
        **({"forced_base": forced} if forced else {}),
    }
    expected = expected_of(settings, files.read_card(parts.adapters[0]), parts.tokenizer, dtype)

    def prove(folder_: Path) -> None:
        companions.copy_processors(settings.base, folder_)
        held = checks.of_files(folder_, expected)
        checks.require(held, output)
        written = models.load_base(ModelSection(base=folder_, attention=settings.attention), torch.float32, device)
        held += checks.of_ties(folder_, written, made.is_tied)
        checks.require(held, output)
        record.update(_proved(written.to(dtype), made, output), checks=[check.as_dict() for check in held])
        del written
        for adapter, found in zip(record["adapters"], measure(folder_), strict=True):
            adapter.update(found)
        if forced:
            record["forced_base"] = forced
        folder.write_json(folder_ / RECORD, record)

    files.save_model(output, made.model.to(dtype), parts.tokenizer, card, prove)
    return {"output": str(output), **record}


def combine(parts: Parts, settings: ModelSection, output: Path, device: torch.device) -> Combined:
    """The base with all adapters in it. Two float32 models are in memory at once; the changes lie on disk meanwhile."""
    classes = files.read_classes(parts.adapters[0])
    model = classifier.load(settings, torch.float32, device, classes)
    base, was_tied = distance.reference(model), models.is_tied(model)
    if classes is not None:
        model.score.weight.data.zero_()  # a new head is no part of the base: all of a trained one is its change
    output.parent.mkdir(parents=True, exist_ok=True)
    parents = []
    with tempfile.TemporaryDirectory(prefix=".tmp-changes-", dir=output.parent) as place:
        changes = [Path(place) / f"{i}.safetensors" for i in range(len(parts.adapters))]
        for path, weight, file in zip(parts.adapters, parts.how.weights, changes, strict=True):
            alone = classifier.load(settings, torch.float32, device, classes)
            parents.append(_merge_alone(alone, path, weight, base))
            combining.write_changes(model, alone, file)
            del alone
        combining.apply_changes(model, changes, [parent.sha256 for parent in parents], parts.how)
    if classes is not None:
        classifier.plain_head(model)
    logits = distance.reference(model)
    if comparing.max_difference(logits, base) <= comparing.tolerance(model, logits):
        what = "the combined adapters have no effect beyond rounding"
        raise RunError(what, str(output), "look at --weights: do they cancel out?")
    return Combined(model, logits, parents, was_tied and not any(parent.is_untied for parent in parents))


def _merge_alone(model: Any, path: Path, weight: float, base: Logits) -> Parent:
    """Merge one adapter into a base of its own, in place."""
    loaded = files.load_adapter(model, path)
    is_untied = saved.unties(model)
    method_of(loaded.method, model).merge(model)
    logits = distance.reference(model)
    if not is_live(logits, base):
        raise RunError("the adapter has no effect, so there is nothing to combine", str(path), "was it trained?")
    return Parent(path, files.adapter_digest(path), loaded.method, loaded.keys_loaded, weight, logits, is_untied)


def _proved(written: Any, made: Combined, output: Path) -> dict[str, Any]:
    """The written model gives the logits of the combination, rounded once; and how far it lies from each parent."""
    found = distance.reference(written)
    difference, limit = comparing.max_difference(found, made.logits), comparing.tolerance(written, found)
    if not difference <= limit:
        raise RunError(
            f"the written model's logits differ from the combination's by {difference:.3g}, more than {limit:.3g}",
            str(output),
            "nothing was written",
        )
    adapters = [
        {**parent.as_dict(), "distance": asdict(distance.between(found, parent.logits))} for parent in made.parents
    ]
    return {"combined_max_diff": difference, "tolerance": limit, "adapters": adapters}
