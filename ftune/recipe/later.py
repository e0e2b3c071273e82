"""What the schema knows and this version cannot do yet, refused by name. Whoever builds it deletes a line."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftune.recipe.document import Document, KeyPath, in_yaml


class Only:
    """These values and no others; 1 and 1.0 are one value, 1 and true are not."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def allows(self, value: object) -> bool:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values)


# `*` stands for every entry of a list.
AVAILABLE: Mapping[str, Only] = {
    "model.attention": Only("auto", "eager", "sdpa"),
}


@dataclass(frozen=True)
class Refusal:
    """A written key whose value is for later."""

    path: KeyPath
    value: Any
    hint: str


def refusals(document: Document) -> Iterator[Refusal]:
    for key, rule in AVAILABLE.items():
        for path in _expand((), key.split("."), document):
            value = document.value(path)
            if rule.allows(value):
                continue
            yield Refusal(path, value, "use " + " or ".join(map(in_yaml, rule.values)))


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
