"""What the schema knows and this version cannot do yet, refused by name. Whoever builds it deletes a line."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftune.recipe.document import Document, KeyPath, in_yaml


class Only:
    """These values and no others; 1 and 1.0 are one value, 1 and true are not."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def allows(self, value: object) -> bool:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values)


@dataclass(frozen=True)
class No:
    """Every form of value but one, which is named in words for the documentation."""

    words: str
    is_form: Callable[[Any], bool]

    def allows(self, value: object) -> bool:
        return not self.is_form(value)


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


# `*` stands for every entry of a list.
AVAILABLE: Mapping[str, Only | No] = {
    "model.attention": Only("auto", "eager", "sdpa"),
    "training.parallel": Only("auto"),
    "output.trackers": Only([]),
}


@dataclass(frozen=True)
class Refusal:
    """A written key whose value is for later; with `is_form` not that value alone, but all like it."""

    path: KeyPath
    value: Any
    is_form: bool
    hint: str


def refusals(document: Document) -> Iterator[Refusal]:
    for key, rule in AVAILABLE.items():
        for path in _expand((), key.split("."), document):
            value = document.value(path)
            if rule.allows(value):
                continue
            if isinstance(rule, No):
                yield Refusal(path, value, True, "")
            else:
                yield Refusal(path, value, False, "use " + " or ".join(map(in_yaml, rule.values)))


def _expand(done: KeyPath, rest: list[str], document: Document) -> Iterator[KeyPath]:
    """The written key paths that a pattern means."""
    if not rest:
        yield done
        return
    around = document.value(done)
    parts = range(len(around)) if rest[0] == "*" and isinstance(around, list) else [rest[0]]
    for part in parts:
        if isinstance(part, int) or (isinstance(around, dict) and part in around):
            yield from _expand((*done, part), rest[1:], document)
