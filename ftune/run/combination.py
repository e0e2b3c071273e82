"""`ftune merge A B`: which adapters, of which base, and how well what comes out does the task of each."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune import model as models
from ftune.artifacts import combined, combining, companions
from ftune.artifacts.combined import Parts
from ftune.artifacts.combining import Combination
from ftune.console.streams import warn
from ftune.engine import single_device
from ftune.errors import Problem, UserError
from ftune.recipe import ModelSection, Recipe
from ftune.run import evidence
from ftune.run.afterwards import load_base, load_tuned, make_room, tokenizer_of
from ftune.run.inputs import Inputs, require
from ftune.run.targets import Target
from ftune.statistics import paired_difference


def asked_for(
    num_targets: int, weights: str | None, kind: str | None, density: float | None, seed: int | None
) -> Combination | None:
    """How several adapters are to be combined; None for a single one, of which nothing of this may be asked."""
    if num_targets > 1:
        return combining.combination(num_targets, weights, kind or "linear", density, seed)
    given = {"--weights": weights, "--combine": kind, "--density": density, "--seed": seed}
    if idle := [name for name, value in given.items() if value is not None]:
        hint = "name at least two; of one, --strength says how much"
        raise UserError(f"only one adapter is named, and {', '.join(idle)} is for several", "ftune merge", hint)
    return None


def refuse_for_several(**asked: bool) -> None:
    """What a merge of one adapter can do and a combination cannot."""
    hints = {"strength": "scale --weights instead", "quantized": "merge without it"}
    if problems := [
        Problem("several adapters cannot be combined with this", f"--{name}", hints[name])
        for name, is_asked in asked.items()
        if is_asked
    ]:
        raise UserError.collect(problems)


def merge_several(targets: Sequence[Target], output: Path | None, how: Combination, overwrite: bool) -> dict[str, Any]:
    """Combine the adapters of several targets into one model folder; returns its combination.json."""
    if output is None:
        raise UserError("several adapters lie in no one place to write beside", "--output", "name the folder to write")
    parts = parts_of(targets, how)
    _, forced = combined.check_parts(parts)
    if forced:
        warn(f"going on with another base than was trained on ({', '.join(forced)} differs), as --force asks")
    make_room(output, overwrite)
    device = single_device()

    def measure(path: Path) -> list[dict[str, Any]]:
        return [beside_parent(target, path, device) for target in targets]

    return combined.write(parts, output, device, measure)


def parts_of(targets: Sequence[Target], how: Combination) -> Parts:
    """What is combined; raises UserError where it does not belong together."""
    problems, adapters = [], []
    for target in targets:
        if target.adapter is None:
            what = "this is a whole model, and adapters are combined"
            problems.append(Problem(what, str(target.path), "name the adapters or runs it was made from"))
        else:
            adapters.append(target.adapter)
    if problems:
        raise UserError.collect(problems)
    first, *others = targets
    fingerprint, tokenizer = models.fingerprint(first.model), tokenizer_of(first)
    trained_with = companions.identity(tokenizer)
    for target in others:
        if not first.is_forced and _differ(models.fingerprint(target.model), fingerprint):
            what = f"its base, {target.model.base}, is not that of {first.path}, {first.model.base}"
            problems.append(Problem(what, str(target.path), "combine adapters of one base; --force takes the first's"))
        own = companions.identity(tokenizer_of(target))
        if differing := [key.replace("_", " ") for key in own if own[key] != trained_with[key]]:
            what = f"trained with another {', '.join(differing)} than {first.path}"
            problems.append(Problem(what, str(target.path), "combine adapters that were trained with the same one"))
    if problems:
        raise UserError.collect(problems)
    return Parts(first.model, tuple(adapters), how, tokenizer, first.is_forced)


def _differ(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two bases have other weights; what else lies in their folders does not matter."""
    names = {name for name in one.keys() | other.keys() if name.endswith(".safetensors") or name == "commit"}
    return any(one.get(name) != other.get(name) for name in names)


def beside_parent(target: Target, path: Path, device: torch.device) -> dict[str, Any]:
    """The combined model on the task of one parent, beside that parent alone: `task`, `forgetting`, and why not.

    Only of a parent that is a run, or lies in one, with a test set or a probe. `task.gain` is positive where the
    combined model is better; forgetting is counted from the base, as the run's own report counts it.
    """
    nothing = {"task": None, "forgetting": None}
    if target.recipe is None:
        return {**nothing, "reason": "no run, so it has no task to measure"}
    recipe = target.recipe.model_copy(update={"model": target.model})
    try:
        inputs = replace(require(recipe), tokenizer=tokenizer_of(target))
    except UserError as error:
        return {**nothing, "reason": f"its data cannot be read any more: {error.problems[0].what}"}
    if inputs.test is None and inputs.probe is None:
        return {**nothing, "reason": "its recipe has neither a test set nor a probe"}
    dtype = models.base_dtype(target.model, device, trains_base=False)
    ours = models.load_base(ModelSection(base=path, attention=target.model.attention), dtype, device)
    found: dict[str, Any] = {**nothing, "reason": ""}
    if inputs.test is not None:
        theirs, _, _ = load_tuned(target, device)
        found["task"] = _task(recipe, inputs, theirs, ours)
        del theirs
        gc.collect()
    if inputs.probe is not None:
        base = load_base(target, device)
        forgetting = evidence.gather(recipe, replace(inputs, test=None), base, ours).forgetting or {}
        found["forgetting"] = {"worst_drop": forgetting.get("worst_drop"), "kl_to_base": forgetting.get("kl_to_base")}
    return found


def _task(recipe: Recipe, inputs: Inputs, theirs: PreTrainedModel, ours: PreTrainedModel) -> dict[str, Any] | None:
    """Both models on the parent's test set: their scores, and the gain with its paired interval."""
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"few_shot": 0})})
    inputs = replace(inputs, probe=None)
    if inputs.classes is None:
        task = evidence.gather(recipe, inputs, theirs, ours).task or {}
        scores = (task.get("zero_shot"), task.get("tuned"), task.get("gain"), task.get("ci95"))
        return _scores(recipe, task.get("n"), *scores)
    parent, merged = (evidence.gather(recipe, inputs, theirs, model) for model in (theirs, ours))
    assert parent.task is not None
    assert merged.task is not None
    correct = [[sample["scores"]["tuned"] for sample in found.samples] for found in (parent, merged)]
    ci95 = paired_difference(*correct).ci95 if recipe.evaluation.metric == "accuracy" else None
    before, after = parent.task["tuned"], merged.task["tuned"]
    drop = None if ci95 is None else [-ci95[1], -ci95[0]]
    return _scores(recipe, merged.task["n"], before, after, after - before, drop)


def _scores(recipe: Recipe, n: Any, parent: Any, merged: Any, gain: Any, ci95: Any) -> dict[str, Any]:
    return {
        "metric": recipe.evaluation.metric,
        "n": n,
        "parent": parent,
        "combined": merged,
        "gain": gain,
        "ci95": ci95,
    }
