"""Answers whose form or length is not the expected one's: what a score alone does not tell."""

import json
import re
from collections.abc import Sequence
from typing import Any

FENCE = "```"
ITEM = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+\S")
NUMBER = re.compile(r"[-+]?\d[\d,. ]*%?")
MOST_LINES_RATIO = 1.5
"""1 line for 2 is another form, 10 for 11 is not."""
LENGTH_RATIO = 2.0
LEAST_CHARACTERS = 20
"""So many more or fewer, besides twice or half as many."""


def form_drift(expected: str, answer: str) -> list[str]:
    """In which ways the answer's form differs from the expected one's, in words; the worst first."""
    wanted, given = expected.strip(), answer.strip()
    if wanted == given:
        return []
    if not given:
        return ["the answer is empty"] if wanted else []
    found = [_json_drift(wanted, given)]
    if (FENCE in wanted) != (FENCE in given):
        found.append("in a markdown fence" if FENCE in given else "without its markdown fence")
    wanted_lines, given_lines = _lines(wanted), _lines(given)
    fewest, most = sorted((len(wanted_lines), len(given_lines)))
    if most >= MOST_LINES_RATIO * fewest:
        found.append(f"{_count(len(given_lines))} instead of {len(wanted_lines)}")
    if _is_list(wanted_lines) != _is_list(given_lines):
        found.append("no longer a list" if _is_list(wanted_lines) else "a list")
    if NUMBER.fullmatch(wanted) and not NUMBER.fullmatch(given):
        found.append("no longer a number alone")
    return [drift for drift in found if drift]


def length_drift(expected: str, answer: str) -> float:
    """How many times longer or shorter than expected, 2 or more; 0 where it is not much."""
    longest, shortest = sorted((len(expected.strip()), len(answer.strip())), reverse=True)
    if longest - shortest < LEAST_CHARACTERS or longest < LENGTH_RATIO * shortest:
        return 0.0
    return longest / max(shortest, 1)


def _json_drift(wanted: str, given: str) -> str:
    expected, answer = _parsed(wanted), _parsed(given)
    if expected is None:
        return ""
    if answer is None:
        return "no longer valid JSON"
    if type(expected) is not type(answer):
        return "another kind of JSON value"
    if isinstance(expected, dict) and expected.keys() != answer.keys():
        return "other keys in the JSON"
    return ""


def _parsed(text: str) -> Any:
    """An object or array; None for anything else: a bare number or word is JSON by accident."""
    if text[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _is_list(lines: Sequence[str]) -> bool:
    return len(lines) > 1 and sum(bool(ITEM.match(line)) for line in lines) > len(lines) / 2


def _count(lines: int) -> str:
    return f"{lines} line{'s' * (lines != 1)}"
