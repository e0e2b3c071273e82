"""Items of the forgetting probe whose score changed: how many of each skill, and some to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftune.report.marking import readable

MOST_SHOWN = 12
LONGEST = 1500  # characters of one text on the page; probe.jsonl has it all


@dataclass(frozen=True)
class Flip:
    suite: str
    row_id: str
    is_lost: bool
    is_choice: bool
    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Flips:
    shown: list[Flip]
    counts: list[tuple[str, int, int]]
    """Suite, lost and gained items; most lost first, and only where there are any."""

    @property
    def lost(self) -> int:
        return sum(lost for _, lost, _ in self.counts)

    @property
    def gained(self) -> int:
        return sum(gained for _, _, gained in self.counts)


def choose_flips(rows: Sequence[Mapping[str, Any]]) -> Flips:
    """Lost items come first, by suite; the suites share the places, and those that lost most stand first."""
    lost, gained = _by_suite(rows, is_lost=True), _by_suite(rows, is_lost=False)
    suites = sorted({**lost, **gained}, key=lambda suite: (-len(lost.get(suite, ())), suite))
    counts = [(suite, len(lost.get(suite, ())), len(gained.get(suite, ()))) for suite in suites]
    turns = [*_turns([lost.get(suite, []) for suite in suites]), *_turns([gained.get(suite, []) for suite in suites])]
    shown = [_flip(row) for row in turns[:MOST_SHOWN]]
    return Flips(sorted(shown, key=lambda flip: (not flip.is_lost, suites.index(flip.suite))), counts)


def _by_suite(rows: Sequence[Mapping[str, Any]], is_lost: bool) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        change = _change(row)
        if change < 0 if is_lost else change > 0:
            found.setdefault(str(row.get("suite")), []).append(row)
    return found


def _change(row: Mapping[str, Any]) -> float:
    scores = row.get("scores") or {}
    before, after = scores.get("before"), scores.get("after")
    return 0.0 if before is None or after is None else float(after) - float(before)


def _turns(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    longest = max(map(len, groups), default=0)
    return [group[turn] for turn in range(longest) for group in groups if turn < len(group)]


def _flip(row: Mapping[str, Any]) -> Flip:
    return Flip(
        suite=str(row.get("suite")),
        row_id=str(row.get("row_id")),
        is_lost=_change(row) < 0,
        is_choice=row.get("kind") == "choice",
        **{name: _cut(row.get(name)) for name in ("prompt", "expected", "before", "after")},
    )


def _cut(text: object) -> str:
    words = readable("" if text is None else str(text))
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} … ({len(words) - LONGEST:,} more characters)"
