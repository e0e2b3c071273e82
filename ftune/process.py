"""The process around a command: signals and errors become text and exit codes."""

import atexit
import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from ftune import signals
from ftune.errors import FtuneError, Interrupted, RunError
from ftune.signals import Stopped

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
"""What a file system answers when it cannot take what is written, or give what is read."""


def run(command: Callable[[], object]) -> None:
    """A command, of which a user sees no traceback."""
    atexit.register(gc.freeze)  # a process that ends need not be searched for garbage: 6 % of a short answer
    sys.excepthook, sys.unraisablehook = _uncaught, _unraisable
    signals.listen()
    try:
        try:
            command()
        except FtuneError as error:
            fail(error)
        except Exception as error:
            if "FTUNE_TRACEBACK" in os.environ:
                raise
            fail(unexpected(error))
    except Stopped as stopped:  # perhaps while an error was being told
        fail(signals.interrupted(stopped.number))
    finally:
        signals.ignore()


def unexpected(error: Exception) -> RunError:
    """Told as text: what the file system refused; or a fault of ours, and which line raised it."""
    if isinstance(error, OSError) and error.errno in DISK:
        what = f"could not read or write: {error.strerror}"
        return RunError(what, str(error.filename or ""), "free space, check rights; a run goes on with --resume")
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
    for all of them. That another process has ended is told by the second one, too: it may have been the first."""
    from ftune.console.streams import rank

    engine = sys.modules.get("ftune.engine")
    if engine is None or not engine.has_group() or isinstance(error, Interrupted):
        return False
    return rank() == 1 or not isinstance(error, engine.LostProcess)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A signal in the instant between the command's end and `signals.ignore`."""
    if isinstance(error, Stopped):
        os._exit(signals.interrupted(error.number).exit_code)
    sys.__excepthook__(kind, error, trace)


def _unraisable(what: Any) -> None:
    """A signal inside a finalizer, where nothing can be raised: `signals.check` raises it at the next safe place."""
    if not isinstance(what.exc_value, Stopped):
        sys.__unraisablehook__(what)
