"""Which answers the page shows: a dozen, the bad news first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_SHOWN = 12
LONGEST = 4000  # characters of one text on the page; samples.jsonl has it all

KINDS = {
    "regression": "regression: a baseline did better",
    "miss": "still wrong",
    "win": "win: better than both baselines",
    "tie": "as good before",
}
PLURALS = {"regression": "regressions", "win": "wins"}


@dataclass(frozen=True)
class Answer:
    name: str
    text: str
    score: float | None


@dataclass(frozen=True)
class Sample:
    row_id: str
    kind: str
    label: str
    prompt: str
    expected: str
    answers: list[Answer]


def kind_of(row: Mapping[str, Any]) -> str:
    scores = row["scores"]
    tuned = float(scores["tuned"])
    best = max((float(scores[key]) for key in ("zero_shot", "few_shot") if scores.get(key) is not None), default=0.0)
    if tuned < best:
        return "regression"
    if tuned > best:
        return "win"
    return "tie" if tuned > 0 else "miss"


def choose(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Sample], list[tuple[str, int]]]:
    """The samples to show, and how many of each kind there are in all. The kinds share the places; what one
    does not need the next ones get."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in KINDS}
    for row in rows:
        by_kind[kind_of(row)].append(row)
    shares = dict.fromkeys(KINDS, 0)
    while sum(shares.values()) < min(MOST_SHOWN, len(rows)):
        for kind in KINDS:
            if shares[kind] < len(by_kind[kind]) and sum(shares.values()) < MOST_SHOWN:
                shares[kind] += 1
    counts = [(PLURALS.get(kind, KINDS[kind]), len(found)) for kind, found in by_kind.items()]
    shown = [_sample(row, kind) for kind in KINDS for row in by_kind[kind][: shares[kind]]]
    return shown, counts


def _sample(row: Mapping[str, Any], kind: str) -> Sample:
    scores = row["scores"]
    answers = [
        Answer(name, _cut(row.get(text)), scores.get(score))
        for name, text, score in (
            ("base, zero-shot", "base", "zero_shot"),
            ("base, few-shot", "few_shot", "few_shot"),
            ("tuned", "tuned", "tuned"),
        )
        if row.get(text) is not None
    ]
    row_id = str(row.get("row_id", ""))
    return Sample(row_id, kind, KINDS[kind], _cut(row["prompt"]), _cut(row["expected"]), answers)


def _cut(text: object) -> str:
    words = str(text)
    return words if len(words) <= LONGEST else words[:LONGEST] + f" … ({len(words) - LONGEST:,} more characters)"
