"""The two streams: results on stdout, everything else on stderr; errors, notes and warnings go through here."""

import codecs
import os
import sys
from functools import cache
from typing import TextIO

from rich.console import Console
from rich.text import Text

from ftune.errors import ExitCode, FtuneError, Problem

SPELLINGS = {"✓": "+", "★": "*", "✗": "x", "→": "->", "·": "|", "…": "...", "–": "-", "⟦": "[[", "⟧": "]]", "✂": "--"}
SPELLINGS |= {"⏎": "", "␣": "_", "⇥": "->", "╭": ",", "╰": "`"} | dict.fromkeys("█▉▊▋▌", "#") | dict.fromkeys("▍▎▏", "")


@cache
def results() -> Console:
    """What the user asked for (stdout). Rich honours NO_COLOR and writes no codes into a pipe."""
    _never_fail_on_a_symbol(sys.stdout)
    return Console(highlight=False, emoji=False)


@cache
def messages() -> Console:
    """Progress, notes, warnings and errors (stderr); one object, so that they print above a live bar.

    Of several processes that share a run the first one speaks."""
    _never_fail_on_a_symbol(sys.stderr)
    return Console(stderr=True, highlight=False, emoji=False, quiet=rank() != 0)


def rank() -> int:
    """Which of a launcher's processes this is; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_live() -> bool:
    """Whether stderr is a terminal on which lines can be redrawn. FORCE_COLOR in a CI log is not one."""
    console = messages()
    return sys.stderr.isatty() and console.is_interactive and not console.is_dumb_terminal


def print_error(error: FtuneError) -> None:
    """Every problem of the error: what is wrong, where, what to try; from any process, whose number is told."""
    messages().quiet = False
    label, colour = {
        ExitCode.INTERRUPTED: ("stopped", "yellow"),
        ExitCode.TERMINATED: ("stopped", "yellow"),
        ExitCode.RUN_FAILED: ("failed", "red"),
    }.get(error.exit_code, ("error", "red"))
    label = f"process {rank()} {label}" if rank() else label
    if len(error.problems) == 1:
        _print_message(label, colour, format_problem(error.problems[0]))
        return
    _print_message(label, colour, Text(f"{len(error.problems)} problems"))
    for number, problem in enumerate(error.problems, 1):
        _print_message(str(number), colour, format_problem(problem))


def note(text: str) -> None:
    _print_message("note", "cyan", Text(text))


def warn(text: str) -> None:
    _print_message("warning", "yellow", Text(text))


def format_problem(problem: Problem) -> Text:
    text = Text(problem.what, style="bold")
    if problem.where:
        text.append("\nat:  ", style="dim not bold")
        text.append(problem.where, style="cyan not bold")
    if problem.hint:
        text.append("\ntry: ", style="dim not bold")
        text.append(problem.hint, style="green not bold")
    return text


def _print_message(label: str, colour: str, text: Text) -> None:
    """The label in a column of its own, the text beside it; long lines are wrapped on a terminal only, so
    that a path in a log stays in one piece."""
    console = messages()
    margin = len("warning") + 2
    head = Text(f"{label:>{margin - 2}}", style=f"bold {colour}") + Text("  ")
    lines = text.split("\n")
    if is_live():
        lines = text.wrap(console, max(console.width - margin, 20))
    for index, line in enumerate(lines):
        line.rstrip()
        console.print((head if index == 0 else Text(" " * margin)) + line, soft_wrap=True)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """What cannot be encoded, in ASCII; registered as an error handler of codecs."""
    assert isinstance(error, UnicodeEncodeError)
    unknown = error.object[error.start : error.end]
    return "".join(SPELLINGS.get(character, "?") for character in unknown), error.end


def _never_fail_on_a_symbol(stream: TextIO) -> None:
    """Under an ASCII locale a check mark becomes a letter instead of a traceback."""
    codecs.register_error("ftune.spell", _spell)
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="ftune.spell")
