"""verdicts.json, which the review sheet gives away: checked, and counted for report.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune import folder
from ftune.console.visible import visible
from ftune.errors import Problem, UserError
from ftune.report.review import ANSWERS, VERDICTS_FORMAT
from ftune.statistics import mean_interval

NONE = "none"
GOOD, BAD = "good", "bad"
LIKED = 0.5
"""A metric calls an answer good from this score on."""
MOST_TOLD = 5

Verdicts = Sequence[Mapping[str, Any]]


def read_verdicts(path: Path, run: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The document in a file of verdicts on these rows of this run. Raises UserError with all that is wrong."""
    found = folder.read_json(path)
    hint = "download it from the run's review.html"
    if not isinstance(found, dict) or found.get("format") != VERDICTS_FORMAT or not is_list(found.get("verdicts")):
        raise UserError("this is no file of verdicts", str(path), hint)
    if found.get("run") != run:
        name = visible(str(found.get("name")))
        raise UserError(
            f"these verdicts are about other answers: of run {name!r} ({found.get('run')}), not of this one ({run})",
            str(path),
            f"{hint}; after a new evaluation the answers must be judged again",
        )
    if not found["verdicts"]:
        raise UserError("there is no verdict in it", str(path), "judge some items first")
    by_id = {str(row.get("row_id", "")): row for row in rows}
    problems = _problems(found["verdicts"], by_id, str(path))
    if problems:
        more = [Problem(f"and {len(problems) - MOST_TOLD} more", str(path))] if len(problems) > MOST_TOLD else []
        raise UserError.collect([*problems[:MOST_TOLD], *more])
    return found


def is_list(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(one, dict) for one in found)


def _problems(verdicts: Verdicts, by_id: Mapping[str, Mapping[str, Any]], where: str) -> list[Problem]:
    problems = []
    seen = set()
    for number, verdict in enumerate(verdicts, 1):
        place, row_id = f"{where}, verdict {number}", verdict.get("row_id")
        best, tuned = verdict.get("best"), verdict.get("tuned")
        if not isinstance(row_id, str) or row_id not in by_id:
            problems.append(Problem(f"no row {visible(str(row_id))!r} in this run's samples.jsonl", place))
            continue
        if row_id in seen:
            problems.append(Problem(f"a second verdict on row {visible(row_id)!r}", place))
        seen.add(row_id)
        answered = [key for key, text, _ in ANSWERS if by_id[row_id].get(text) is not None]
        if best not in (None, NONE, *answered):
            names = ", ".join([*answered, NONE])
            problems.append(Problem(f"best is {visible(str(best))!r}, not one of {names} or null", place))
        if tuned not in (None, GOOD, BAD):
            problems.append(Problem(f"tuned is {visible(str(tuned))!r}, not good, bad or null", place))
        if best is None and tuned is None:
            problems.append(Problem(f"nothing is said of row {visible(row_id)!r}", place))
    return problems


def summary(verdicts: Verdicts, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `review` part of report.json.

    `preferred` counts, for each answer, the items where it, or another one of the same text, was called the best; so
    it may add up to more than `compared`, the items with a best one or none. `agreement` is with the metric: on the
    tuned answers (a score of 0.5 or more is good), and on which answer is the best one (the highest score; none, where
    all scores are equal).
    """
    by_id = {str(row.get("row_id", "")): row for row in rows}
    pairs = [(verdict, by_id[verdict["row_id"]]) for verdict in verdicts]
    compared = [(_best(verdict["best"], row), row) for verdict, row in pairs if verdict.get("best")]
    rated = [(verdict["tuned"] == GOOD, row) for verdict, row in pairs if verdict.get("tuned")]
    keys = [key for key, text, _ in ANSWERS if any(row.get(text) is not None for _, row in pairs)]
    preferred = {key: [float(key in best) for best, _ in compared] for key in [*keys, NONE]}
    liked = [float(is_good) for is_good, _ in rated]
    same_rating = [float(is_good == (row["scores"]["tuned"] >= LIKED)) for is_good, row in rated]
    same_best = [float(bool(best & _highest(row))) for best, row in compared]
    return {
        "n": len(verdicts),
        "blind": sum(verdict.get("blind") is True for verdict in verdicts),
        "compared": len(compared),
        "preferred": {key: int(sum(marks)) for key, marks in preferred.items()},
        "good": int(sum(liked)),
        "bad": len(liked) - int(sum(liked)),
        "agreement": {"tuned": _share(same_rating), "best": _share(same_best)},
        "intervals": {
            "preferred": {key: _interval(marks) for key, marks in preferred.items()},
            "good": _interval(liked),
        },
    }


def review_bars(review: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How often each answer was the best, and the tuned one good, as the report's bars."""
    preferred, intervals = review.get("preferred") or {}, review.get("intervals") or {}
    names = {key: f"{name} best" for key, _, name in ANSWERS} | {NONE: "none, or a tie"}
    of_best = intervals.get("preferred") or {}
    bars = [(names[k], k, preferred[k], review["compared"], of_best.get(k)) for k in names if k in preferred]
    if review.get("good") is not None:
        bars.append(("tuned is good", "tuned", review["good"], review["good"] + review["bad"], intervals.get("good")))
    return [
        {"name": name, "key": key, "count": count, "of": of, "share": count / of, "whisker": whisker}
        for name, key, count, of, whisker in bars
        if of
    ]


def _best(best: str, row: Mapping[str, Any]) -> set[str]:
    """The answers with the text that was called the best."""
    if best == NONE:
        return {NONE}
    texts = {key: str(row[text]).strip() for key, text, _ in ANSWERS if row.get(text) is not None}
    return {key for key, text in texts.items() if text == texts[best]}


def _highest(row: Mapping[str, Any]) -> set[str]:
    """What the metric calls the best: the highest scores, or none where all are equal."""
    scores = {key: float(score) for key, score in row["scores"].items() if score is not None}
    if len(set(scores.values())) == 1:
        return {NONE}
    return {key for key, score in scores.items() if score == max(scores.values())}


def _share(marks: Sequence[float]) -> dict[str, Any]:
    return {"n": len(marks), "agreed": int(sum(marks)), "ci95": _interval(marks)}


def _interval(marks: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the share; None without any."""
    found = mean_interval(marks) if marks else None
    return None if found is None else list(found)
