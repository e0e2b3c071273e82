"""What goes wrong and how it is told: every error a user can meet, and the exit code it ends with."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    GATE_FAILED = 1
    USER_ERROR = 2
    RUN_FAILED = 3
    INTERRUPTED = 130
    TERMINATED = 143


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what it is, where (file, line, key), and what to try."""

    what: str
    where: str = ""
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  try: {self.hint}" if self.hint else ""
        return f"{place}{self.what}{advice}"


class FtuneError(Exception):
    """An error that a user sees as text, never as a traceback. It can carry several problems at once."""

    exit_code = ExitCode.RUN_FAILED

    def __init__(self, what: str, where: str = "", hint: str = "", *, problems: Iterable[Problem] = ()) -> None:
        self.problems = tuple(problems) or (Problem(what, where, hint),)
        super().__init__("\n".join(map(str, self.problems)))

    @classmethod
    def collect(cls, problems: Iterable[Problem]) -> "FtuneError":
        """One error out of all the problems found."""
        return cls("", problems=problems)


class UserError(FtuneError):
    """The recipe, the data or the call is wrong; nothing was written."""

    exit_code = ExitCode.USER_ERROR


class RunError(FtuneError):
    """It failed while running: out of memory, non-finite loss, disk full."""


class Interrupted(FtuneError):
    """A signal stopped the run after its checkpoint was saved."""

    def __init__(
        self, what: str, where: str = "", hint: str = "", *, exit_code: ExitCode = ExitCode.INTERRUPTED
    ) -> None:
        super().__init__(what, where, hint)
        self.exit_code = exit_code
