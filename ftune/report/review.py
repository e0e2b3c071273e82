"""review.html: some outputs side by side, to be judged by a person; self-contained and below 2 MB."""

import base64
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune.folder import sha256_json
from ftune.report.environment import printable, template
from ftune.report.marking import Marked, mark, readable
from ftune.report.recorded import is_classifier, review_count
from ftune.report.strata import BADGES, Chosen, choose

MOST_BYTES = 1_900_000
ITEM_BYTES = 2500
"""Of an item without its texts."""
LONGEST = (8000, 4000, 2000, 1000, 500)
"""Characters of one text: the first of these with which the page is small enough."""
VERDICTS_FORMAT = "ftune-review-1"
ANSWERS = (
    ("zero_shot", "base", "base, zero-shot"),
    ("few_shot", "few_shot", "base, few-shot"),
    ("tuned", "tuned", "tuned"),
)
"""Name in `scores` and in verdicts, name in samples.jsonl, and in words."""


@dataclass(frozen=True)
class Sheet:
    """The page; or why there is none, and what it would have shown."""

    page: str | None
    num_shown: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Answer:
    key: str
    name: str
    score: float | None
    marked: Marked
    group: int
    """Answers with the same text have the same number."""


@dataclass(frozen=True)
class Item:
    row_id: str
    stratum: str
    badge: str
    reasons: list[str]
    prompt: str
    expected: str
    answers: list[Answer]


def identity(recipe: str | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """Names a run by its recipe (which holds its folder) and its answers: verdicts on others do not fit it."""
    return sha256_json([recipe, list(rows)])[:16]


def obstacle(recipe: str | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """Why there is no review sheet; empty when there is one."""
    if is_classifier(recipe):
        return "a classifier answers with labels, which its confusion matrix shows"
    if not review_count(recipe):
        return "evaluation.review is 0"
    if not rows:
        return "no answers were recorded (they need data.test and a metric of answers)"
    return "" if any(row.get("base") is not None for row in rows) else "no answers of the base were recorded"


def review_sheet(name: str, recipe: str | None, rows: Sequence[Mapping[str, Any]]) -> Sheet:
    if reason := obstacle(recipe, rows):
        return Sheet(None, reason=reason)
    run, count = identity(recipe, rows), min(review_count(recipe), len(rows), MOST_BYTES // ITEM_BYTES)
    while True:
        chosen, strata = choose(rows, count)
        for longest in LONGEST:
            if _least_size(chosen, longest) > MOST_BYTES:
                continue
            page = _page(name, run, chosen, longest, {"strata": strata, "num_rows": len(rows)})
            if len(page.encode()) <= MOST_BYTES:
                return Sheet(page, len(chosen))
        count //= 2


def _least_size(chosen: Sequence[Chosen], longest: int) -> int:
    """Bytes that a page needs at least, told without making it."""
    names = ("prompt", "expected", *(text for _, text, _ in ANSWERS))
    return sum(ITEM_BYTES + sum(min(len(str(one.row.get(name))), longest) for name in names) for one in chosen)


def _page(name: str, run: str, chosen: Sequence[Chosen], longest: int, counts: Mapping[str, Any]) -> str:
    items = [_item(one, longest) for one in chosen]
    orders = [_shuffled(run, item) for item in items]
    places = sorted(range(len(items)), key=lambda index: sha256_json([run, items[index].row_id]))
    script = Path(__file__).with_name("review.js").read_text(encoding="utf-8")
    document = {
        "format": VERDICTS_FORMAT,
        "run": run,
        "name": name,
        "items": [{"row_id": item.row_id, "order": order} for item, order in zip(items, orders, strict=True)],
        "blind_order": places,
    }
    page = template("review.html.jinja").render(
        name=name,
        items=items,
        longest=longest,
        **counts,
        document=document,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return printable(page)


def _shuffled(run: str, item: Item) -> list[str]:
    """The order in which a blind item shows its answers."""
    order = [answer.key for answer in item.answers]
    random.Random(f"{run} {item.row_id}").shuffle(order)
    return order


def _item(chosen: Chosen, longest: int) -> Item:
    row, scores = chosen.row, chosen.row["scores"]
    expected = _cut(row["expected"], longest)
    texts = {key: str(row[text]) for key, text, _ in ANSWERS if row.get(text) is not None}
    different = list(dict.fromkeys(text.strip() for text in texts.values()))
    answers = [
        Answer(
            key, name, scores.get(key), mark(expected, _cut(texts[key], longest)), different.index(texts[key].strip())
        )
        for key, _, name in ANSWERS
        if key in texts
    ]
    return Item(
        row_id=str(row.get("row_id", "")),
        stratum=chosen.stratum,
        badge=BADGES[chosen.stratum],
        reasons=chosen.reasons,
        prompt=readable(_cut(row["prompt"], longest)),
        expected=readable(expected),
        answers=answers,
    )


def _cut(text: object, longest: int) -> str:
    """The beginning and the end of a long text; a question often comes last."""
    words = str(text)
    if len(words) <= longest:
        return words
    head, tail = longest * 2 // 3, longest // 3
    return f"{words[:head]} … ({len(words) - head - tail:,} characters left out) … {words[-tail:]}"
