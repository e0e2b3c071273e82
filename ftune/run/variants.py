"""Which runs a comparison of methods consists of, and everything that stands against them, before anything runs."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune import plan
from ftune import recipe as recipes
from ftune.classifier import Classes
from ftune.errors import Problem, UserError
from ftune.folder import RunFolder
from ftune.recipe import Recipe
from ftune.recipe.document import in_yaml, read_value
from ftune.run import preview
from ftune.run.datasets import Collector
from ftune.run.inputs import check_objective, check_possible, read, resolve, training_plan
from ftune.run.resuming import check_folder
from ftune.settings import METHOD_NAMES, available

OPTION = "--methods"
EXAMPLE = '--methods "lora, {name: lora, rank: 4}, ia3"'
ALL = "all"


@dataclass(frozen=True)
class Call:
    """What `ftune compare` was asked for. `seeds` is how many, counted from the recipe's own seed."""

    recipe: Path
    overrides: tuple[str, ...]
    methods: str
    seeds: int = 1
    output: Path | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Variant:
    """A method with its settings. `override` sets it; empty where it is the recipe's own."""

    label: str
    slug: str
    override: str


@dataclass(frozen=True)
class Member:
    """One run of the comparison."""

    variant: Variant
    seed: int
    path: Path
    overrides: tuple[str, ...]
    settings: Recipe

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path)


@dataclass(frozen=True)
class Members:
    """All runs, seed by seed, so that every method has a result early; and what of `all` was left out, and why."""

    folder: Path
    runs: tuple[Member, ...]
    left_out: tuple[dict[str, str], ...]
    learning_rate: float | None
    """The one of the recipe, which then holds for every method; None where each has its own."""


def members(call: Call) -> Members:
    """Raises UserError with everything that stands against any of the methods; nothing is written."""
    if call.resume and call.overwrite:
        raise UserError("--resume and --overwrite exclude each other", "ftune compare", "choose one")
    own = recipes.load(call.recipe, call.overrides)
    folder = call.output.resolve() if call.output else own.output.dir.with_name(f"{own.output.dir.name}-compare")
    variants = parse_methods(call.methods, own.method.name)
    check_overrides(call, own, variants)
    found: dict[Variant, list[Member]] = {}
    problems: dict[Variant, list[Problem]] = {}
    for variant in variants:
        collector = Collector()
        with collector.stage():
            found[variant] = [_member(call, variant, own.training.seed + k, folder) for k in range(call.seeds)]
        problems[variant] = collector.problems
    check_methods({variant: runs[0].settings for variant, runs in found.items()}, problems)
    possible = [variant for variant in variants if not problems[variant]]
    if not possible or (len(possible) < len(variants) and call.methods.strip() != ALL):
        raise UserError.collect(_told(problems))
    runs = [found[variant][k] for k in range(call.seeds) for variant in possible]
    check_folders(call, runs)
    left_out = [
        {"label": variant.label, "reason": problems[variant][0].what} for variant in variants if problems[variant]
    ]
    return Members(folder, tuple(runs), tuple(left_out), own.training.learning_rate)


def parse_methods(text: str, own: str) -> list[Variant]:
    """`lora, {name: lora, rank: 4}, ia3`: names, or mappings as under `method:` in a recipe; or `all`."""
    try:
        entries = read_value(f"[{text}]", OPTION)
    except UserError as error:
        raise UserError(error.problems[0].what, OPTION, f"write it like this: {EXAMPLE}") from error
    if entries == [ALL]:
        entries = list(available(METHOD_NAMES))
    variants: list[Variant] = []
    for entry in entries:
        settings = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
            raise UserError(f"no method: {in_yaml(entry)}", OPTION, f"write it like this: {EXAMPLE}")
        variant = _variant(settings, is_own=entry == own)
        if any(variant.label == other.label for other in variants):
            raise UserError(f"{variant.label} is named twice", OPTION, "name every method once")
        taken = [other.slug for other in variants]
        variants.append(Variant(variant.label, _not_among(variant.slug, taken), variant.override))
    if not variants:
        raise UserError("no method is named", OPTION, f"write it like this: {EXAMPLE}")
    return variants


def _variant(settings: Mapping[Any, Any], is_own: bool) -> Variant:
    others = [f"{key}={in_yaml(value)}" for key, value in settings.items() if key != "name"]
    label = " ".join([str(settings["name"]), *others])
    slug = re.sub(r"[^A-Za-z0-9_.+]+", "-", label).strip("-.") or "method"
    return Variant(label, slug, "" if is_own else f"method={json.dumps(dict(settings))}")


def _not_among(slug: str, taken: Sequence[str]) -> str:
    names = [slug, *(f"{slug}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def check_overrides(call: Call, own: Recipe, variants: Sequence[Variant]) -> None:
    """A key of the recipe's own method that no run of this comparison reads."""
    written = [text for text in call.overrides if re.match(r"\s*method\s*[.=]", text)]
    if written and all(variant.override for variant in variants):
        what = f"{written[0]} has no effect: the recipe's own method, {own.method.name}, is not compared as it is"
        raise UserError(what, OPTION, f"name {own.method.name}, or write the key with its method: {EXAMPLE}")


def _member(call: Call, variant: Variant, seed: int, folder: Path) -> Member:
    path = folder / f"{variant.slug}-seed{seed}"
    added = [variant.override, f"training.seed={seed}", f"output.dir={json.dumps(str(path))}"]
    overrides = (*call.overrides, *filter(None, added))
    return Member(variant, seed, path, overrides, resolve(recipes.load(call.recipe, overrides)))


def check_methods(settings: Mapping[Variant, Recipe], problems: dict[Variant, list[Problem]]) -> None:
    """The whole check with the first method; what it finds beside the method's own problems stands against all, as
    their data are the same. Of the others what depends on the method."""
    classes: Classes | None = None
    common: list[Problem] = []
    for index, (variant, recipe) in enumerate(settings.items()):
        whole, own = Collector(), Collector()
        if index == 0:
            inputs = read(recipe, whole)
            classes = inputs.classes if inputs else None
        _check_method(recipe, own, classes)
        common += [problem for problem in whole.problems if problem not in own.problems]
        problems[variant] = [*own.problems, *common]


def _check_method(recipe: Recipe, collector: Collector, classes: Classes | None) -> None:
    check_possible(recipe, collector)
    with collector.stage():
        check_objective(recipe)
    with collector.stage():
        run_plan = training_plan(recipe, None)
        plan.make_plan(recipe, recipe.method, run_plan, None, classes or preview.classes_to_plan(recipe))


def check_folders(call: Call, runs: Sequence[Member]) -> None:
    """What lies where the runs will, as `ftune train` would say it, of all at once."""
    collector = Collector()
    for member in runs:
        with collector.stage():
            is_there = member.run.is_run
            check_folder(member.run, member.settings, call.resume and is_there, call.overwrite)
            if call.resume and member.run.is_complete:
                check_unchanged(member)
    if collector.problems:
        raise UserError.collect(collector.problems)


def check_unchanged(member: Member) -> None:
    """A finished run is kept only if it is the very run that would be made."""
    if changes := recipes.differences(recipes.load(member.run.recipe), member.settings):
        what = "the recipe changed since this run was made: " + "; ".join(changes)
        raise UserError(what, str(member.path), "use --overwrite, or another --output")


def _told(problems: Mapping[Variant, Sequence[Problem]]) -> Iterator[Problem]:
    """Each problem once, with the methods that have it, unless all have."""
    for problem in dict.fromkeys(problem for found in problems.values() for problem in found):
        having = [variant.label for variant, found in problems.items() if problem in found]
        words = "" if len(having) == len(problems) else f"{', '.join(having)}: "
        yield Problem(f"{words}{problem.what}", problem.where, problem.hint)
