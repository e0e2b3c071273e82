"""A metric of the user's own: a function in a Python file, checked before it is needed and told about when it fails."""

import hashlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ftune.data import Example, SourceRow, read_rows
from ftune.errors import UserError
from ftune.evaluate.prompts import expected

KEY = "evaluation.metric"
SIGNATURE = "def score(expected: str, answer: str) -> float, with a third parameter `row` if it needs the whole row"


@dataclass(frozen=True)
class FunctionMetric:
    """Called as any scorer is, with an example and an answer to it."""

    path: Path
    function: str
    sha256: str
    """Of the file, as it was run."""
    call: Callable[..., Any]
    takes_row: bool
    rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """The rows as their file has them, by id; empty unless the function takes them."""

    @property
    def name(self) -> str:
        return f"{self.path.name}:{self.function}"

    def __call__(self, example: Example, answer: str) -> float:
        """The function's score; UserError that names the row where it raises or gives no finite number."""
        extra = {"row": dict(self.rows[example.row_id])} if self.takes_row else {}
        what = f"{self.function}() on row {example.row_id}"
        with _telling_errors(
            self.path, what, f"it was given expected={_cut(expected(example))}, answer={_cut(answer)}"
        ):
            result = self.call(expected(example), answer, **extra)
        try:
            value = math.nan if isinstance(result, str | bytes) else float(result)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            told = f"{what} gave {_cut(result)}, which is no finite number"
            raise UserError(told, str(self.path), "return a float, higher for better")
        return value

    def with_rows(self, path: Path) -> "FunctionMetric":
        """With the rows of a file, where the function takes them."""
        if not self.takes_row:
            return self
        rows = {row.row_id: row.fields for row in read_rows(path) if isinstance(row, SourceRow)}
        return replace(self, rows=rows)

    def as_dict(self) -> dict[str, str]:
        """What the manifest keeps of it."""
        return {"file": str(self.path), "function": self.function, "sha256": self.sha256}


def load(path: Path, function: str) -> FunctionMetric:
    """Run the file and take the function out of it. UserError for a file that cannot be read or run, a name that
    is not there, and a signature that two texts do not fit."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read this file: {error.strerror or error}", str(path), "check the path") from error
    digest = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"ftune_metric_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    with _telling_errors(path, "running the file", "it must be importable by itself"):
        exec(compile(source, str(path), "exec"), module.__dict__)
    found = getattr(module, function, None)
    if found is None:
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        hint = f"it has {', '.join(names)}" if names else f"write {SIGNATURE}"
        raise UserError(f"no function {function!r} in this file", str(path), hint)
    return FunctionMetric(path, function, digest, found, _takes_row(found, path, function))


def _takes_row(function: Any, path: Path, name: str) -> bool:
    """Whether the function wants the row; UserError if it cannot be called with two texts (and the row)."""
    what = ""
    if not callable(function):
        what = f"{name} is no function but a {type(function).__name__}"
    elif inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        what = f"{name} gives no number but a {'coroutine' if inspect.iscoroutinefunction(function) else 'generator'}"
    if what:
        raise UserError(what, str(path), f"write {SIGNATURE}")
    try:
        signature = inspect.signature(function)
        takes_row = "row" in signature.parameters
        signature.bind("", "", **({"row": {}} if takes_row else {}))
    except (TypeError, ValueError) as error:
        told = f"{name} does not take an expected and an answered text: {error}"
        raise UserError(told, str(path), f"write {SIGNATURE}") from error
    return takes_row


@contextmanager
def _telling_errors(path: Path, doing: str, hint: str) -> Iterator[None]:
    """Whatever the user's code raises becomes an error with its line; what it prints goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines = [error.lineno]
        where = f"{path}:{lines[-1]}" if lines and lines[-1] else str(path)
        raise UserError(f"{doing}: {type(error).__name__}: {error}", where, hint) from error


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
