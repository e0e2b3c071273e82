"""What a command's TARGET is: a run, an adapter folder or a model folder; and the base and recipe that belong to it."""

from dataclasses import dataclass, replace
from pathlib import Path

from ftune import model as models
from ftune import quantized, recipe
from ftune.artifacts import files
from ftune.errors import UserError
from ftune.folder import RunFolder
from ftune.recipe import ModelSection, Recipe


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
        loaded = given or recipe.load(run.recipe)
        adapter = run.adapter if run.adapter.is_dir() else None
        tuned = None if adapter else run.merged
        if adapter is None and not run.merged.is_dir():
            raise UserError("this run has saved nothing yet", str(path), "finish it with ftune train RECIPE --resume")
        return Target(path, loaded.model, adapter, tuned, loaded, run)
    if files.is_adapter(path):
        parent = RunFolder(path.parent)
        found = given or (recipe.load(parent.recipe) if parent.is_run else None)
        return Target(path, _base_of_adapter(path, base, found), path, None, found, None)
    if (path / "config.json").is_file():
        named = ModelSection(base=_path_or_hub(base) if base else path)
        model = given.model if given else named.model_copy(update=quantized.stored_form(models.load_config(named)))
        return Target(path, model, None, path, given, None)
    raise UserError(
        "neither a run, an adapter nor a model folder",
        str(path),
        "it should hold recipe.yaml, adapter_model.safetensors or config.json",
    )


def _path_or_hub(name: str) -> Path | str:
    return Path(name).resolve() if Path(name).is_dir() else name


def _base_of_adapter(path: Path, base: str | None, loaded: Recipe | None) -> ModelSection:
    over = files.read_card(path).get("trained_over", {})
    if base is not None:
        return ModelSection(base=_path_or_hub(base), **over)
    if loaded is not None:
        return loaded.model.model_copy(update=over)
    name = files.read_adapter_config(path).get("base_model_name_or_path") or files.read_card(path).get("base_name")
    if not name:
        raise UserError("the adapter does not name its base", str(path), "name it with --base")
    return ModelSection(base=_path_or_hub(str(name)), **over)
