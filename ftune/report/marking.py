"""An answer beside the expected one: which of its words are not there, and where some are missing."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from ftune.console.visible import signs, visible_lines

UNSPACED = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|\s+|[^\w\s]")
"""A word, a run of spaces, a sign; of scripts without spaces one character."""
UNUSUAL = re.compile(r"[^\n\t -~]")
MOST_WORDS = 600
"""Longer texts are compared from both ends only, because the comparison takes quadratic time."""
LEAST_ALIKE = 0.3
"""Below this share of common text marks would hide the answer instead of explaining it,"""
MOSTLY_THERE = 0.8
"""unless so much of the expected text is there, as in an answer that goes on and on."""
LONGEST_MISSING = 60


@dataclass(frozen=True)
class Piece:
    """Some text of an answer that is `same` or `extra`, or some expected text that is `missing` at this place."""

    kind: Literal["same", "extra", "missing"]
    text: str


@dataclass(frozen=True)
class Marked:
    """`told` says what marks cannot: that the text is as expected, empty, or another one altogether."""

    pieces: list[Piece]
    told: str


def mark(expected: str, answer: str) -> Marked:
    """White space at both ends does not count, as it does not for the metrics."""
    wanted, given = expected.strip(), answer.strip()
    if wanted == given:
        return Marked([Piece("same", readable(given))], "as expected")
    if not given:
        return Marked([], "empty")
    ours, theirs = WORDS.findall(wanted), WORDS.findall(given)
    pieces = _from_ends(ours, theirs) if max(len(ours), len(theirs)) > MOST_WORDS else _all(ours, theirs)
    common = sum(len(piece.text) for piece in pieces if piece.kind == "same" and piece.text.strip())
    if 2 * common < LEAST_ALIKE * (len(wanted) + len(given)) and common < MOSTLY_THERE * len(wanted):
        return Marked([Piece("same", readable(given))], "another text")
    return Marked([_shown(piece) for piece in pieces], "")


def readable(text: str) -> str:
    """Text as it is, but for control and format characters, of which there is a sign or a number."""
    return UNUSUAL.sub(lambda found: signs(found.group()), text)


def _all(wanted: list[str], given: list[str]) -> list[Piece]:
    pieces: list[Piece] = []
    blocks = SequenceMatcher(None, wanted, given, autojunk=False).get_opcodes()
    for _, start, end, first, last in blocks:
        if wanted[start:end] == given[first:last]:
            pieces.append(Piece("same", "".join(given[first:last])))
            continue
        if last > first:
            pieces.append(Piece("extra", "".join(given[first:last])))
        if end > start:
            pieces.append(Piece("missing", "".join(wanted[start:end])))
    return pieces


def _from_ends(wanted: list[str], given: list[str]) -> list[Piece]:
    shortest = min(len(wanted), len(given))
    head = next((i for i in range(shortest) if wanted[i] != given[i]), shortest)
    most = shortest - head
    tail = next((i for i in range(most) if wanted[-1 - i] != given[-1 - i]), most)
    parts: list[Piece] = [
        Piece("same", "".join(given[:head])),
        Piece("extra", "".join(given[head : len(given) - tail])),
        Piece("missing", "".join(wanted[head : len(wanted) - tail])),
        Piece("same", "".join(given[len(given) - tail :])),
    ]
    return [part for part in parts if part.text]


def _shown(piece: Piece) -> Piece:
    """Spaces that are the whole difference become visible, and long missing text is shortened."""
    if piece.kind == "same":
        return Piece("same", readable(piece.text))
    text = visible_lines(piece.text) if piece.text.isspace() else readable(piece.text)
    if piece.kind == "missing":
        text = " ".join(text.split())
        text = text if len(text) <= LONGEST_MISSING else f"{text[:LONGEST_MISSING]} …"
    return Piece(piece.kind, text)
