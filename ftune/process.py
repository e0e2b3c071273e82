"""The process around a command: signals and errors become text and exit codes."""

import atexit
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from ftune.errors import ExitCode, FtuneError, Interrupted, RunError


def run(command: Callable[[], object]) -> None:
    """A command, of which a user sees no traceback."""
    atexit.register(gc.freeze)  # a process that ends need not be searched for garbage: 6 % of a short answer
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        command()
    except FtuneError as error:
        fail(error)
    except Exception as error:
        if "FTUNE_TRACEBACK" in os.environ:
            raise
        fail(unexpected(error))


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    code = ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED
    raise Interrupted(f"stopped by {signal.Signals(number).name}", hint="run the command again", exit_code=code)


def unexpected(error: Exception) -> RunError:
    """A fault of ours, told as text: what it is and which line raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"unexpected {type(error).__name__}: {error}"
    return RunError(what, f"{place.filename}:{place.lineno}", "set FTUNE_TRACEBACK=1 to see more, and report it")


def fail(error: FtuneError) -> NoReturn:
    from ftune.console.streams import print_error, rank

    if rank() == 0 or is_its_own(error):
        print_error(error)
    sys.exit(error.exit_code)


def is_its_own(error: FtuneError) -> bool:
    """Whether what one of several processes met is not what the first one meets and tells: a wrong recipe is the same
    for all of them, and so is the end of another."""
    engine = sys.modules.get("ftune.engine")
    return engine is not None and engine.has_group() and not isinstance(error, engine.LostProcess | Interrupted)
