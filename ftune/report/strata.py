"""Which outputs are worth a person's time: some of each kind, the same ones each time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftune.folder import sha256_json
from ftune.quantities import format_count, format_score
from ftune.report.drift import form_drift, length_drift
from ftune.report.samples import kind_of

STRATA = {
    "regression": "regressions",
    "miss": "still wrong",
    "form": "in another form than expected",
    "length": "much longer or shorter than expected",
    "win": "wins",
    "tie": "as good before",
}
"""In the order in which they take turns. One output may belong to several."""

BADGES = {
    "regression": "regression",
    "miss": "still wrong",
    "form": "other form",
    "length": "other length",
    "win": "win",
    "tie": "tie",
}


@dataclass(frozen=True)
class Reason:
    """Why an output is in a stratum; the larger its `size`, the sooner it is chosen."""

    told: str
    size: float


@dataclass(frozen=True)
class Chosen:
    row: Mapping[str, Any]
    stratum: str
    reasons: list[str]


def choose(rows: Sequence[Mapping[str, Any]], count: int) -> tuple[list[Chosen], list[tuple[str, int]]]:
    """At most `count` outputs, and how many there are of each stratum in all.

    The strata take turns, so each that has enough gets the same number of places and what one does not need the
    others get. Inside one the largest change comes first; what is equal is drawn by a hash of the row, not by its
    place in the file.
    """
    found = [_reasons(row) for row in rows]
    lots = [sha256_json([row.get("row_id"), row["prompt"]]) for row in rows]
    members = {
        stratum: sorted((i for i, ours in enumerate(found) if stratum in ours), key=_by_size(found, lots, stratum))
        for stratum in STRATA
    }
    taken: dict[int, str] = {}
    waiting = {stratum: iter(indices) for stratum, indices in members.items()}
    while len(taken) < min(count, len(rows)):
        for stratum, rest in waiting.items():
            index = next((i for i in rest if i not in taken), None)
            if index is not None and len(taken) < count:
                taken[index] = stratum
    order = list(STRATA)
    chosen = [
        Chosen(rows[index], stratum, [reason.told for reason in found[index].values()])
        for index, stratum in sorted(taken.items(), key=lambda item: order.index(item[1]))
    ]
    return chosen, [(STRATA[stratum], len(indices)) for stratum, indices in members.items()]


def _by_size(found: Sequence[Mapping[str, Reason]], lots: Sequence[str], stratum: str) -> Any:
    return lambda index: (-found[index][stratum].size, lots[index])


def _reasons(row: Mapping[str, Any]) -> dict[str, Reason]:
    """The strata of an output: how it scored beside the baselines, and where its form or length drifted."""
    kind, scores = kind_of(row), row["scores"]
    baselines = {"base": scores.get("zero_shot"), "few-shot": scores.get("few_shot")}
    measured = {name: float(score) for name, score in baselines.items() if score is not None}
    best = max(measured, key=lambda name: measured[name], default=None)
    highest, tuned = measured[best] if best else 0.0, float(scores["tuned"])
    told = {
        "regression": f"{best} scored {format_score(highest, 2)}, tuned {format_score(tuned, 2)}",
        "win": f"tuned scored {format_score(tuned, 2)}, the best baseline {format_score(highest, 2)}",
        "miss": "none scored above 0",
        "tie": f"the best baseline and tuned scored {format_score(tuned, 2)}",
    }
    reasons = {kind: Reason(told[kind], abs(tuned - highest))}
    expected, answer = str(row["expected"]), str(row["tuned"])
    if drifts := form_drift(expected, answer):
        reasons["form"] = Reason(f"tuned answers in another form: {', '.join(drifts)}", "JSON" in drifts[0])
    if times := length_drift(expected, answer):
        lengths = f"{format_count(len(answer.strip()))} characters instead of {format_count(len(expected.strip()))}"
        reasons["length"] = Reason(f"tuned answers in another length: {lengths}", times)
    return reasons
