"""`method.start_from`: begin with an adapter that was trained before, ftune's or PEFT's."""

from pathlib import Path

from transformers import PreTrainedModel

from ftune import model
from ftune.artifacts import files
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.base import Adapted, modules_of
from ftune.methods.targets import pattern_value
from ftune.recipe import Recipe
from ftune.settings import LowRankSettings


def start_from(base: PreTrainedModel, recipe: Recipe) -> None:
    """Begin with an adapter that was trained before, on this base and of the same method and shape."""
    settings = recipe.method
    assert settings.start_from is not None
    base_card = files.read_card(recipe.model.base) if isinstance(recipe.model.base, Path) else {}
    card, digest = files.read_card(settings.start_from), files.adapter_digest(settings.start_from)
    files.check_base(card, model.fingerprint(recipe.model), digest, base_card)
    found = files.read_settings(settings.start_from)
    if METHODS[found.name] is not METHODS[settings.name]:
        raise UserError(
            f"{settings.start_from} is an adapter of {found.name}", "method.start_from", f"take method {found.name}"
        )
    is_low_rank = isinstance(found, LowRankSettings)
    keys = ("rank_stabilized", "initial_rank", *(() if is_low_rank else ("alpha",)))
    differing = [
        f"{key}: {getattr(found, key)} there, {getattr(settings, key)} here"
        for key in keys
        if hasattr(found, key) and getattr(found, key) != getattr(settings, key)
    ]
    if is_low_rank:
        differing += differing_alphas(base, found)
    if differing:
        raise UserError(
            f"that adapter was trained with other settings ({'; '.join(differing)})",
            "method.start_from",
            "give this recipe the settings of the adapter",
        )
    files.load_weights(base, settings.name, settings.start_from)


def differing_alphas(base: PreTrainedModel, found: LowRankSettings) -> list[str]:
    """The first layer whose alpha is another than the adapter's: no tensor of its file would tell."""
    for path, layer in modules_of(base, Adapted):
        there = pattern_value(found.alpha_pattern, path, found.alpha)
        if layer.alpha != there:
            return [f"alpha of {path}: {there} there, {layer.alpha} here"]
    return []
