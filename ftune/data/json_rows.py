"""JSON Lines and JSON lists -> rows, one value in memory at a time.

Stricter than Python's parser, which keeps the last of two equal keys and accepts NaN and halves of characters: such
rows would train on something else than the file says.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ftune.data.source import SourceRow, source_row
from ftune.data.streams import LONGEST_ROW, not_utf8, open_bytes, read_lines
from ftune.errors import Problem, UserError

WRAPPERS = ("data", "rows", "examples", "items", "train")
"""Keys under which the list of rows may stand, when it is all that a .json file holds."""
CHUNK = 2**20
MAX_DEPTH = 100
"""Lists and objects inside each other in one row: those of tools and their arguments have some ten."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class NotJSON(Exception):
    """A value that is not valid JSON, or not one that can be trained on; `offset` in characters where known."""

    def __init__(self, what: str, offset: int | None = None) -> None:
        super().__init__(what)
        self.offset = offset


class Parser:
    """Python's parser, with what it lets pass in `trouble`: the value's end is known, so that the next can be read."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )
        self.trouble = ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in value if keys.count(key) > 1)
            self.trouble = f"the key {twice!r} stands twice in one object"
        return value

    def _constant(self, name: str) -> float:
        self.trouble = f"{name} is not JSON"
        return math.nan

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self.trouble = f"the number {digits[:40]} is too large"
        return value

    def value(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends. `trouble` says what is wrong with it, or nothing."""
        self.trouble = ""
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise NotJSON(error.msg, error.pos) from error
        except (ValueError, RecursionError) as error:
            raise NotJSON("nested too deeply" if isinstance(error, RecursionError) else str(error)) from error
        if not self.trouble and _SURROGATE.search(text, start, end):
            self._check_characters(value)
        if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _is_deep([value]):
            self.trouble = f"nested too deeply, in more than {MAX_DEPTH} levels"
        return value, end

    def _check_characters(self, value: Any) -> None:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            self.trouble = f"\\u{ord(error.object[error.start]):04x} is half of a character"


def _is_deep(level: list[Any]) -> bool:
    """Whether values have more levels than what renders, copies and writes rows can follow."""
    for _ in range(MAX_DEPTH):
        inside = (part.values() if isinstance(part, dict) else part for part in level)
        level = [part for part in chain.from_iterable(inside) if isinstance(part, dict | list)]
    return bool(level)


def read_json_lines(path: Path) -> Iterator[SourceRow | Problem]:
    """One object per line; blank lines are no rows."""
    parser = Parser()
    for number, line in read_lines(path):
        if isinstance(line, Problem):
            yield line
        elif not line.isspace():
            yield _row_of_line(parser, line, path, number)


def _row_of_line(parser: Parser, line: str, path: Path, number: int) -> SourceRow | Problem:
    place = f"{path}, line {number}"
    line = line.strip(" \t\r\n")
    try:
        value, end = parser.value(line)
        if end != len(line):
            raise NotJSON("Extra data", end)
    except NotJSON as error:
        column = "" if error.offset is None else f" at column {error.offset + 1}"
        return Problem(f"not valid JSON: {error}{column}", place, "each line is one JSON object")
    if parser.trouble:
        return Problem(f"not valid JSON: {parser.trouble}", place)
    return source_row(value, path, number, place)


def read_json(path: Path) -> Iterator[SourceRow | Problem]:
    """A list of objects, alone or under one of WRAPPERS; or, as many tools write .json too, one object per line."""
    if _holds_lines(path):
        yield from read_json_lines(path)
        return
    with open_bytes(path) as (stream, start):
        window = _Window(stream, path, start)
        if window.next_character() == "{":
            window.expect("{")
            key, _ = window.value() if window.next_character() == '"' else ("", "")
            window.expect(":")
            if key not in WRAPPERS or window.next_character() != "[":
                raise _not_a_list(path, f"one object that begins with the key {key!r}")
            yield from _items(window, path)
            if window.next_character() == ",":
                raise _not_a_list(path, f"one object with more keys than {key!r}")
            window.expect("}")
        elif window.next_character():
            yield from _items(window, path)
        if window.next_character():
            raise window.error("Extra data after the list")


def _holds_lines(path: Path) -> bool:
    """Whether the first line is a whole object that wraps no list of rows."""
    first = next((line for _, line in read_lines(path) if isinstance(line, Problem) or not line.isspace()), "")
    if isinstance(first, Problem) or not first.lstrip().startswith("{"):
        return False
    try:
        value, _ = Parser().value(first.strip(" \t\r\n"))
    except NotJSON:
        return False
    is_wrapper = len(value) == 1 and all(key in WRAPPERS and isinstance(value[key], list) for key in value)
    return not is_wrapper


def _not_a_list(path: Path, found: str) -> UserError:
    hint = f"write [{{...}}, {{...}}], or one object per line as .jsonl; a list may stand under {', '.join(WRAPPERS)}"
    return UserError(f"not a list of rows: {found}", str(path), hint)


def _items(window: "_Window", path: Path) -> Iterator[SourceRow | Problem]:
    if window.next_character() != "[":
        raise _not_a_list(path, "neither a list nor an object")
    window.expect("[")
    number = 0
    while number or window.next_character() != "]":
        number += 1
        window.next_character()
        place = f"{path}, row {number} (line {window.line})"
        value, trouble = window.value()
        yield Problem(f"not valid JSON: {trouble}", place) if trouble else source_row(value, path, number, place)
        if window.next_character() == "]":
            break
        window.expect(",")
    window.expect("]")


class _Window:
    """The part of a JSON file that is being read: from the next character to the end of what was decoded so far."""

    def __init__(self, stream: BinaryIO, path: Path, start: int) -> None:
        self._stream, self._path = stream, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._parser = Parser()
        self._text, self._position = "", 0
        self.line = 1
        self._decoded = start

    def _more(self, size: int) -> bool:
        chunk = self._stream.read(size)
        waiting = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            problem = not_utf8(error, self._decoded - waiting + error.start, str(self._path))
            raise UserError.collect([problem]) from error
        self._decoded += len(chunk)
        self._text, self._position = self._text[self._position :] + text, 0
        return bool(chunk)

    def next_character(self) -> str:
        """The next character that is not white space, without taking it; empty at the end."""
        while True:
            here = self._position
            while here < len(self._text) and self._text[here] in " \t\r\n":
                here += 1
            self.line += self._text.count("\n", self._position, here)
            self._position = here
            if here < len(self._text):
                return self._text[here]
            if not self._more(CHUNK):
                return ""

    def expect(self, character: str) -> None:
        if self.next_character() != character:
            raise self.error(f"Expecting {character!r}")
        self._position += 1

    def value(self) -> tuple[Any, str]:
        """The next value, and the trouble with it. What was read may end inside it: then more is read."""
        self.next_character()
        size = CHUNK
        while True:
            failure = None
            try:
                value, end = self._parser.value(self._text, self._position)
                length = end - self._position
                if end < len(self._text):
                    break
            except NotJSON as error:
                failure, reached = str(error), (error.offset or self._position) - self._position
            if len(self._text) - self._position > LONGEST_ROW:
                raise self.error(f"a row of more than {LONGEST_ROW:,} characters, or one that never ends")
            if not self._more(size):
                break
            size *= 2
        if failure:
            raise self.error(failure, reached)
        self.line += self._text.count("\n", self._position, self._position + length)
        self._position += length
        return value, self._parser.trouble

    def error(self, what: str, ahead: int = 0) -> UserError:
        """`ahead`: how many characters behind the position it is wrong."""
        line = self.line + self._text.count("\n", self._position, self._position + ahead)
        return UserError(f"not valid JSON: {what}", f"{self._path}, line {line}", "the file is one JSON list")
