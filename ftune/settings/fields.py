"""What settings are made of: closed, frozen classes and the kinds of values a recipe holds."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
FUNCTION = re.compile(r"[^\x00]+\.py:[A-Za-z_]\w*")


class Settings(BaseModel):
    """Frozen, strict and closed: what was validated is what the code uses, to the end."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def number_from_text(value: object) -> object:
    """A quoted "1e-4" means what it says; any other text is left for the type check to refuse."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def absolute(value: str, info: ValidationInfo) -> Path:
    """Relative paths are relative to the recipe's folder, which the loader gives as context.

    The file's own name stays as it is written, also where it is a link: its ending says what it holds.
    """
    folder: Path = (info.context or {}).get("folder") or Path.cwd()
    try:
        path = Path(folder, Path(value).expanduser())
    except RuntimeError as error:
        raise PydanticCustomError("path_type", "a path; write ./~ for a name that begins with ~") from error
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _file_path(value: object, info: ValidationInfo) -> object:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise PydanticCustomError("path_type", "a path")
    return absolute(value, info)


def _function_path(value: str, info: ValidationInfo) -> str:
    path, name = function_parts(value)
    return f"{absolute(str(path), info)}:{name}"


def function_parts(value: str) -> tuple[Path, str]:
    """The file and the name in `file.py:function`."""
    path, _, name = value.rpartition(":")
    return Path(path), name


def is_function(value: str) -> bool:
    """Whether a text is `file.py:function`."""
    return bool(FUNCTION.fullmatch(value))


def _compilable(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise PydanticCustomError("expression", "a regular expression ({why})", {"why": str(error)}) from error
    return value


Number = Annotated[float, BeforeValidator(number_from_text)]
FilePath = Annotated[Path, BeforeValidator(_file_path)]
FunctionPath = Annotated[str, StringConstraints(pattern=rf"^{FUNCTION.pattern}$"), AfterValidator(_function_path)]
Expression = Annotated[str, AfterValidator(_compilable)]
Rank = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(number_from_text)]
LayerIndices = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(number_from_text)]
Dropout = Share
DROPOUT = "share of the adapter's inputs dropped in training"
ModuleNames = Annotated[tuple[Expression, ...], Field(strict=False, min_length=1)]
