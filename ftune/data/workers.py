"""One function over many chunks, in order, on all cores."""

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ftune.errors import RunError

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent dies."""

T = TypeVar("T")
R = TypeVar("R")

_function: Callable[[Any], Any]
"""In a worker process: what it was forked to do."""


def num_workers() -> int:
    """As many as cores this process may use; one where forking beside a loaded torch is not safe."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def ordered(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """function(task) for each task, in order. Few tasks wait at a time, however many there are.

    The function and all that it holds are the workers' by being forked: a tokenizer, or a table that is mapped.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    waiting: deque[Future[R]] = deque()
    with warnings.catch_warnings():
        # Python warns of forking beside other threads; these workers touch nothing that one of those may hold.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, fork, _start, (function,)) as pool:
            try:
                for task in tasks:
                    waiting.append(pool.submit(_call, task))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BrokenProcessPool as error:
                what = "a process that prepared rows was killed, for want of memory perhaps"
                raise RunError(what, "data", "free memory, or give fewer rows") from error
            finally:
                pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    """A worker leaves Ctrl-C to the process that it works for, and ends with that, however that ends."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _call(task: Any) -> Any:
    return _function(task)
