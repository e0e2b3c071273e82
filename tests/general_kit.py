"""The general probe's items, and how the tests ask for one: by the words of its prompt."""

import json
from pathlib import Path
from typing import Any

import ftune

GENERAL = Path(ftune.__file__).parent / "probe" / "general"
SUITES = [
    "world_knowledge",
    "arithmetic",
    "reasoning",
    "reading",
    "instruction_following",
    "formats",
    "code",
    "languages",
    "safe_refusal",
]

Item = dict[str, Any]


def read(name: str) -> list[Item]:
    return [json.loads(line) for line in (GENERAL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


ITEMS = {suite: read(suite) for suite in SUITES}
PROSE = read("prose")


def every_item() -> list[Item]:
    return [item for suite in SUITES for item in ITEMS[suite]]


def find(suite: str, words: str) -> Item:
    """The one item of a suite whose prompt contains these words."""
    found = [item for item in ITEMS[suite] if words in item["prompt"]]
    assert len(found) == 1, f"{len(found)} items of {suite} contain {words!r}"
    return found[0]


def right(item: Item) -> str:
    return str(item["choices"][item["answer"]] if "choices" in item else item["completion"])


def wrong(item: Item) -> list[str]:
    """The other choices; none for an item that is answered in free text."""
    return [choice for place, choice in enumerate(item.get("choices", [])) if place != item["answer"]]
