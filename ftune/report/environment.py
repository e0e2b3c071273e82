"""Where the pages are filled in: templates beside this file, numbers as everywhere, text that can be written."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template, Undefined

from ftune import quantities
from ftune.console.visible import visible

UNWRITABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters and lone surrogates: XML cannot hold them, and a terminal obeys them."""


class _Page(Environment):
    """What a file does not say is None on the page, like a null."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        found = super().getattr(obj, attribute)
        return None if isinstance(found, Undefined) else found


def template(name: str) -> Template:
    """One of the pages; all text that is filled in is escaped."""
    return _environment().get_template(name)


def printable(text: str) -> str:
    return UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", text)


@cache
def _environment() -> Environment:
    environment = _Page(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    for name in ("bytes", "count", "difference", "duration", "gate", "interval", "rate", "score"):
        environment.filters[name] = getattr(quantities, f"format_{name}")
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    environment.filters["filename"] = lambda path: Path(str(path)).name
    environment.filters["place"] = lambda share: f"{100 * min(max(share, 0.0), 1.0):.2f}%"
    environment.filters["percent"] = lambda share: f"{100 * share:.3g} %"
    environment.filters["visible"] = lambda text: visible(str(text))
    return environment
