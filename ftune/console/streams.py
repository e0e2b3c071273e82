"""The two streams: results on stdout, everything else on stderr; errors, notes and warnings go through here."""

import codecs
import os
import sys
from functools import cache
from typing import TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.text import Text

from ftune.console.visible import in_lines
from ftune.errors import ExitCode, FtuneError, Problem

SPELLINGS = {"✓": "+", "★": "*", "✗": "x", "→": "->", "·": "|", "…": "...", "–": "-", "⟦": "[[", "⟧": "]]", "✂": "--"}
SPELLINGS |= {"⏎": "", "␣": "_", "⇥": "->", "╭": ",", "╰": "`"} | dict.fromkeys("█▉▊▋▌", "#") | dict.fromkeys("▍▎▏", "")


@cache
def results() -> Console:
    """What the user asked for (stdout). Rich honours NO_COLOR and writes no codes into a pipe."""
    _never_fail_on_a_symbol(sys.stdout)
    return _harmless(Console(highlight=False, emoji=False, markup=False))


@cache
def messages() -> Console:
    """Progress, notes, warnings and errors (stderr); one object, so that they print above a live bar.

    Of several processes that share a run the first one speaks."""
    _never_fail_on_a_symbol(sys.stderr)
    return _harmless(Console(stderr=True, highlight=False, emoji=False, markup=False, quiet=rank() != 0))


def rank() -> int:
    """Which of a launcher's processes this is; 0 where it started no others, whatever RANK is set for."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


class _Harmless(RenderHook):
    """The last thing that texts pass on their way to a terminal, wherever in a table or message they stand: what is not
    one of rich's own codes comes from rows, names or errors, and cannot move the cursor or hide itself."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Seen(renderable) for renderable in renderables]


class _Seen:
    def __init__(self, content: ConsoleRenderable) -> None:
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.content, options):
            text = segment.text if segment.control else in_lines(segment.text)
            yield Segment(text, segment.style, segment.control)


def _harmless(console: Console) -> Console:
    console.push_render_hook(_Harmless())
    return console


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


def print_text(text: str) -> None:
    """What a model wrote, on stdout: as it is into a file or a pipe, with signs for what a terminal would obey."""
    _never_fail_on_a_symbol(sys.stdout)
    print(in_lines(text) if sys.stdout.isatty() else text)


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
