"""What the fuzzing tests share: how many inputs, what is done to good ones, and the property that holds of all."""

import atexit
import copy
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ftune.errors import ExitCode, FtuneError

ASKED = int(os.environ.get("FTUNE_FUZZ") or 0)
"""Inputs of each target; without it a short run, the same inputs each time. `scripts/fuzz` sets it."""
SECONDS = 60
"""What takes longer hangs. Inputs are small: nearly all take some milliseconds."""
COUNTS: Counter[str] = Counter()


def _write_counts(path: Path) -> None:
    path.write_text(json.dumps(COUNTS), encoding="utf-8")


if os.environ.get("FTUNE_FUZZ_COUNTS"):
    atexit.register(_write_counts, Path(os.environ["FTUNE_FUZZ_COUNTS"]))


def inputs(short: int) -> Any:
    """So many inputs, the same on every machine; or as many as are asked for."""
    return settings(
        max_examples=ASKED or short,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    """Nothing catches it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still at it after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def handled(target: str, call: Callable[[], object]) -> FtuneError | None:
    """It works, or it is an error that a user can read, with the exit code of wrong input or of a failure."""
    COUNTS[target] += 1
    told: FtuneError | None = None
    with limited(SECONDS):
        try:
            call()
        except FtuneError as error:
            told = error
    if told is not None:
        assert told.exit_code in (ExitCode.USER_ERROR, ExitCode.RUN_FAILED)
        assert told.problems
        assert all(problem.what.strip() for problem in told.problems)
    return told


NAMES = [
    "../../x",
    "/etc/passwd",
    "a\x00b",
    "",
    " ",
    "~",
    "..",
    "\x1b[2J",
    "\ud800",
    "é\u202e",
    "x" * 3000,
    "(a+",
    "{recipe}",
]
NUMBERS = [0, 1, -1, 2, 3, 7, 1000, 2**53, -(2**63), 10**30, 0.0, -0.5, 1e-300, 1e300]
NESTED: Any = []
for _ in range(60):
    NESTED = [NESTED]
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.floats(),
    st.sampled_from(NAMES),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just(NESTED),
    st.lists(st.sampled_from([*NUMBERS, *NAMES]), max_size=3),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NUMBERS), max_size=2),
)


def places(document: Any, around: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in plain data."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [around, *(path for key, value in inner for path in places(value, (*around, key)))]


@st.composite
def mutated(draw: Any, document: Any, values: Any = odd, most: int = 3) -> Any:
    """Plain data in which up to so many values are others, are gone, stand elsewhere or have company."""
    document = copy.deepcopy(document)

    def drawn() -> Any:
        return copy.deepcopy(draw(values))  # what is put in may be changed next

    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(document)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return drawn()
            continue
        inner = document
        for part in path[:-1]:
            inner = inner[part]
        kind = draw(st.sampled_from(["other", "other", "gone", "renamed", "company", "elsewhere"]))
        if kind == "gone":
            del inner[path[-1]]
        elif kind == "renamed" and isinstance(inner, dict):
            inner[draw(st.sampled_from(NAMES))] = inner.pop(path[-1])
        elif kind == "company" and isinstance(inner, list):
            inner.append(drawn())
        elif kind == "company":
            inner[draw(st.text(max_size=4))] = drawn()
        elif kind == "elsewhere":
            source = document
            for part in draw(st.sampled_from(places(document))):
                source = source[part]
            inner[path[-1]] = copy.deepcopy(source)
        else:
            inner[path[-1]] = drawn()
    return document


PIECES = st.sampled_from([b"\x00", b"\xff", b'"', b"{[", b"\n"])


@st.composite
def damaged(draw: Any, content: bytes, most: int = 4) -> bytes:
    """Bytes of which some are flipped, cut out, doubled or put in."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, max(len(found) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "out", "in", "twice"]))
        if kind == "flip" and found:
            found[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[place:]
        elif kind == "out":
            del found[place : place + draw(st.integers(1, 40))]
        elif kind == "in":
            found[place:place] = draw(st.one_of(st.binary(max_size=8), PIECES))
        elif kind == "twice":
            found[place:place] = found[place : place + draw(st.integers(1, 40))]
    return bytes(found)


def as_json(document: Any) -> bytes:
    """Written as another program may: with escapes of half characters, NaN and infinity."""
    return json.dumps(document).encode()
