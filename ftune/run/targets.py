"""What a command's TARGET is: a run, an adapter folder or a model folder; and the base and recipe that belong to it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftune import model as models
from ftune import quantized, recipe
from ftune.artifacts import files
from ftune.errors import UserError
from ftune.folder import RunFolder
from ftune.recipe import ModelSection, Recipe
from ftune.recipe.document import read
from ftune.recipe.schema import HUB_ID
from ftune.settings import function_parts, is_function


@dataclass(frozen=True)
class Target:
    """`adapter` is None for a whole model, which then is `model.base` itself unless `run` trained it."""

    path: Path
    model: ModelSection
    adapter: Path | None
    tuned: Path | None
    recipe: Recipe | None
    run: RunFolder | None
    is_forced: bool = False
    """Whether to go on with a base that is not the one trained on."""


def resolve(path: Path, base: str | None = None, recipe_path: Path | None = None, is_forced: bool = False) -> Target:
    """Find out what a path is; raises UserError when it is none of the three, or its base is not known."""
    return replace(_resolve(path, base, recipe_path), is_forced=is_forced)


def _resolve(path: Path, base: str | None, recipe_path: Path | None) -> Target:
    given = recipe.load(recipe_path) if recipe_path else None
    run = RunFolder(path)
    if run.is_run:
        loaded = given or recipe_of(run)
        adapter = run.adapter if run.adapter.is_dir() else None
        tuned = None if adapter else run.merged
        if adapter is None and not run.merged.is_dir():
            raise UserError("this run has saved nothing yet", str(path), "finish it with ftune train RECIPE --resume")
        return Target(path, loaded.model, adapter, tuned, loaded, run)
    if files.is_adapter(path):
        parent = RunFolder(path.parent)
        found = given or (recipe_of(parent) if parent.is_run else None)
        return Target(path, _base_of_adapter(path, base, found), path, None, found, None)
    if (path / "config.json").is_file():
        named = _section(base) if base else ModelSection(base=path)
        model = given.model if given else named.model_copy(update=quantized.stored_form(models.load_config(named)))
        return Target(path, model, None, path, given, None)
    raise UserError(
        "neither a run, an adapter nor a model folder",
        str(path),
        "it should hold recipe.yaml, adapter_model.safetensors or config.json",
    )


def recipe_of(run: RunFolder) -> Recipe:
    """The recipe in a run's folder; refused where it wants code run that came with the folder, whose user never saw it.

    ftune writes absolute paths there, to files outside the folder.
    """
    loaded, root = recipe.load(run.recipe), run.path.resolve()
    written = read(run.recipe).data
    code = []
    if is_function(loaded.evaluation.metric):
        code.append(("evaluation", "metric", function_parts(loaded.evaluation.metric)[0]))
    if loaded.model.trust_remote_code and isinstance(loaded.model.base, Path):
        code.append(("model", "base", loaded.model.base))
    for section, key, path in code:
        part = written.get(section)
        text = part.get(key) if isinstance(part, dict) else part
        if path.resolve().is_relative_to(root) or not Path(str(text)).is_absolute():
            what = f"its recipe wants code run that came with this folder: {section}.{key}: {text}"
            raise UserError(what, str(run.recipe), "look at that code; then write a recipe of your own, with its path")
    return loaded


def _section(base: str, **over: Any) -> ModelSection:
    """A model by the name of its folder or its hub id; raises UserError where it can be neither."""
    try:
        if Path(base).is_dir():
            return ModelSection(base=Path(base).resolve(), **over)
        if HUB_ID.fullmatch(base):
            return ModelSection(base=base, **over)
    except (ValueError, TypeError, OSError):  # a name with NUL in it or too long a one, keys that are none
        pass
    raise UserError(f"no such model: {base[:200]!r}", "base", "name its folder or hub id with --base")


def _base_of_adapter(path: Path, base: str | None, loaded: Recipe | None) -> ModelSection:
    over = files.read_card(path).get("trained_over") or {}
    if not isinstance(over, dict):
        raise UserError("trained_over is no mapping", str(path / files.CARD), files.REMAKE)
    if base is not None:
        return _section(base, **over)
    if loaded is not None:
        return loaded.model.model_copy(update=over)
    name = files.read_adapter_config(path).get("base_model_name_or_path") or files.read_card(path).get("base_name")
    if not name:
        raise UserError("the adapter does not name its base", str(path), "name it with --base")
    return _section(str(name), **over)
