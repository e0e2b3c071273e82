"""Files as they lie there, which anybody may have changed: read, or told as what is wrong with them. And links."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftune.errors import UserError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
REPAIR = "restore the file, or make it again"
TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Folders of a run folder that trackers write."""


def read_text(path: Path) -> str:
    """A text file; raises UserError when it is missing, is no UTF-8 or cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UserError("no such file", str(path), "check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text, from byte {error.start} on", str(path), REPAIR) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", str(path), "check rights") from error


def read_json(path: Path) -> Any:
    """The document in a JSON file; raises UserError when it is missing or broken."""
    return _parsed(read_text(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The same of a file that must hold one JSON object."""
    return _object(read_json(path), str(path))


def read_json_lines(path: Path, may_be_torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a file with one on each line; raises UserError that names the first line which is none.

    may_be_torn: the file is written line by line, so a last line without its end counts as never written.
    """
    *whole, rest = read_text(path).split("\n")
    lines = enumerate(whole if may_be_torn else [*whole, rest], 1)
    places = ((line, f"{path}, line {number}") for number, line in lines if line)
    return [_object(_parsed(line, place), place) for line, place in places]


def _object(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError("not a JSON object", where, REPAIR)
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        found = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # half of a character cannot be written again
        return found
    except RecursionError as error:
        raise UserError("not valid JSON: nested too deeply", where, REPAIR) from error
    except ValueError as error:  # also a whole number of more digits than Python reads
        raise UserError(f"not valid JSON: {error}", where, REPAIR) from error


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Around the use of what a file holds: where it is no longer what was written there, that is a UserError."""
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        told = "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
        raise UserError(f"not what was written there ({type(error).__name__}{told})", str(path), REPAIR) from error


def is_inside(name: str) -> bool:
    """Whether a relative name stays below the folder it is meant for: not absolute, no `..`, and a name at all."""
    path = Path(name)
    return "\0" not in name and path.parts != () and not path.is_absolute() and ".." not in path.parts


def refuse_links(path: Path) -> None:
    """Raise UserError where a folder that is written into is a link, or holds any: nothing is written, or removed,
    through a link to a place that the user did not name. Inside their own folders trackers may have theirs (wandb
    links its logs): ftune writes nothing there."""
    links = sorted(file for file in path.rglob("*") if file.is_symlink())
    found = [path] if path.is_symlink() else [link for link in links if not _is_a_trackers(link.relative_to(path))]
    if found:
        hint = "name the folder itself" if found[0] == path else "remove the link, or put what it leads to in its place"
        raise UserError(f"a link, which leads to {os.path.realpath(found[0])}", str(found[0]), hint)


def _is_a_trackers(name: Path) -> bool:
    return len(name.parts) > 1 and name.parts[0] in TRACKERS
