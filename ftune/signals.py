"""SIGINT and SIGTERM: a command ends at once, or, where something has to be saved first, at the next safe place.

Only the first signal counts: whatever follows finds a command that is ending already.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ftune.errors import ExitCode, Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ends this command. No Exception: what handles failures must not take it for one of its rows or files."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stop:
    """Which signal asks this process to end, if one does, and whether it has to wait."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_held = False
        self.may_interrupt = True
        """Whether work that changes nothing, such as an evaluation, may be left in the middle."""


_stop = Stop()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _stop.signal is not None:
        return
    _stop.signal = number
    if not _stop.is_held:
        raise Stopped(number)


def listen() -> None:
    """From now on a signal ends the command, wherever it is."""
    for number in STOPPING:
        signal.signal(number, _on_signal)


def ignore() -> None:
    """The command is over: a signal can only change how it ended."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held(may_interrupt: bool = True) -> Iterator[Stop]:
    """Inside, a signal leaves word and raises nothing: the loop looks at it where it can save. Raises Stopped behind.

    may_interrupt: `check` may raise inside, too.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    _stop.is_held, _stop.may_interrupt = True, may_interrupt
    listen()
    try:
        yield _stop
        asked = _stop.signal
    finally:
        _stop.is_held, _stop.may_interrupt = False, True
        for number, handler in before.items():
            signal.signal(number, handler)
        if _on_signal not in before.values():  # nobody listens any more
            _stop.signal = None
    if asked is not None:
        raise Stopped(asked)


def check() -> None:
    """Called between the parts of long work that changes nothing: raises Stopped where a signal left word."""
    if _stop.signal is not None and _stop.may_interrupt:
        raise Stopped(_stop.signal)


def interrupted(number: int, how: str = "", where: str = "", hint: str = "run the command again") -> Interrupted:
    """What a user is told of a signal; it carries the exit code."""
    code = ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED
    what = f"stopped by {signal.Signals(number).name}{how and ' '}{how}"
    return Interrupted(what, where, hint, exit_code=code)
