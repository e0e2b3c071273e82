"""A recipe file and overrides -> a Recipe, or everything that is wrong with them; and a Recipe -> YAML."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from ftune.errors import Problem, UserError
from ftune.recipe import problems
from ftune.recipe.document import FLOAT, TAG, Document, in_yaml, override, read
from ftune.recipe.schema import Recipe

MOST_TOLD = 100
ABSENT = "(absent)"


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, with `a.b=c` overrides; raises UserError with all problems, in file order."""
    if path.stem.strip(".") == "":
        raise UserError("a recipe needs a name of its own: its run folder is called after it", str(path))
    document = read(path)
    for order, text in enumerate(overrides, 1):
        override(document, text, order)
    recipe = _validate(document, {"folder": path.parent.resolve(), "name": path.stem})
    if recipe is None or document.findings:
        findings = sorted(document.findings, key=lambda finding: finding.order)
        told = [finding.problem() for finding in findings[:MOST_TOLD]]
        if more := len(findings) - len(told):
            told.append(Problem(f"and {more:,} more", str(path), "is this a recipe?"))
        raise UserError.collect(told)
    return recipe


def _validate(document: Document, context: dict[str, Any]) -> Recipe | None:
    try:
        return Recipe.model_validate(document.data, context=context)
    except ValidationError as error:
        problems.tell(error, document, document.unread)
    return None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 could take for something else."""


_Dumper.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; with absolute paths, so that it may lie anywhere."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


class Change(NamedTuple):
    """A key that two recipes do not share; a value is ABSENT where one has no such key."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        was, now = (value if value is ABSENT else in_yaml(value) for value in (self.before, self.after))
        return f"{self.key}: {was} -> {now}"


def changes(before: Recipe, after: Recipe) -> list[Change]:
    """Every key that two recipes do not share."""
    old, new = (dict(leaves_of(recipe.model_dump(mode="json"))) for recipe in (before, after))
    found = [Change(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in {**old, **new}]
    return [change for change in found if change.before != change.after]


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Every key that two recipes do not share, as `training.learning_rate: 0.001 -> 0.01`."""
    return [str(change) for change in changes(before, after)]


def leaves_of(values: Mapping[Any, Any], around: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested mappings by its dotted name, with its value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves_of(value, f"{around}{key}.")
        else:
            yield f"{around}{key}", value
