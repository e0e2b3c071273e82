"""Whether a row holds an item, letter by letter: the last word, after the hashes."""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from ftune.clean.letters import DENSE, DENSE_WEIGHT, SPACED, Positions, folded, kinds

Kind = Literal["equal", "contained", "overlap"]
Found = tuple[Kind, float]

SHORT = 12
"""Letters up to which a question says too little: the same answer must follow before rows count as equal."""
NO_ACCIDENT, LEAST_SPECIAL, LONG = 28, 8, 48
"""Letters from which an item inside a row is no accident, wherever it stands, if so many are not from templates;
letters from which templates do not matter. Any other must stand by itself, between ends of sentences. An item that is
all template is none where its list goes on."""
GRAM = 32
"""Letters of an n-gram in the share that decides, some eight English words or eleven Chinese characters."""
LEAST_OVERLAP = 0.8
FEWEST_LETTERS = 96
"""Letters, and own letters, from which an item may be found by a part of it."""
FEWEST_GRAMS = 12

_DIGITS, _MARKS = re.compile(r"\d+"), re.compile(r"[^\w\s]|_")
_COMMA = re.compile(r"[,،、，]")
_SIGN = r"[-+*/×÷<>=^%−](?=\s*\d)|[()\[\]{}]"
_SIGNS, _LETTERS_AND_SIGNS = re.compile(_SIGN), re.compile(rf"[^\W_]|{_SIGN}")
_SENTENCE_END = re.compile(r"[.?!:;\n\"“”„«»…。！？：；「」『』।।]")


class Spelled:
    """A folded text, its letters (dense ones DENSE_WEIGHT times), and where in the text each stands."""

    def __init__(self, text: str) -> None:
        self.folded = folded(text)
        codes = np.frombuffer(self.folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        self.kind = kinds()[codes]
        places = np.flatnonzero(self.kind)
        self.places = np.repeat(places, np.where(self.kind[places] == DENSE, DENSE_WEIGHT, 1))
        self.letters = codes[self.places].tobytes().decode("utf-32-le", "surrogatepass")

    @cached_property
    def marks(self) -> str:
        """All that is no white space; for texts without any letter."""
        return "".join(self.folded.split())

    def stretch(self, first: int, last: int) -> str:
        """The folded text from one letter to before another, without the marks around it."""
        return "" if first == last else self.folded[self.places[first] : self.places[last - 1] + 1]

    def is_word_edge(self, letter: int) -> bool:
        """Whether no word goes on from the letter before to this one."""
        if letter in (0, len(self.places)):
            return True
        before, here = self.places[letter - 1], self.places[letter]
        return bool(here - before > 1 or (here > before and max(self.kind[here], self.kind[before]) > SPACED))

    def is_sentence_edge(self, letter: int) -> bool:
        """Whether the text begins, ends or has the end of a sentence between the letter before and this one."""
        if letter in (0, len(self.places)):
            return True
        between = self.folded[self.places[letter - 1] + 1 : self.places[letter]]
        return _SENTENCE_END.search(between) is not None

    def is_within_list(self, letter: int) -> bool:
        """Whether a comma stands before this letter: what goes on so is another list."""
        if letter in (0, len(self.places)):
            return False
        return _COMMA.search(self.folded, self.places[letter - 1] + 1, self.places[letter]) is not None

    def is_within_figures(self, letter: int) -> bool:
        """Whether figures stand on both sides: a list of numbers that goes on is another list."""
        return 0 < letter < len(self.places) and (self.letters[letter - 1] + self.letters[letter]).isdigit()


spelled = lru_cache(maxsize=2048)(Spelled)


@dataclass(frozen=True)
class Subject:
    """The text of an item that is looked for inside rows; `question` must be there too where it is short."""

    item_id: str
    text: str
    question: str
    own: Positions
    num_special: int


def same_figures(one: str, other: str) -> bool:
    """Whether texts of the same letters also have the same numbers, operators and brackets: 12 + 4 is not 1 + 24.

    Marks inside numbers may have gone (1,000 and 1000), and all operators and brackets; others, or elsewhere, differ.
    """
    apart = [_DIGITS.findall(_MARKS.sub(" ", text)) for text in (one, other)]
    joined = [_DIGITS.findall(_MARKS.sub("", text)) for text in (one, other)]
    if apart[0] != apart[1] and apart[0] != joined[1] and joined[0] != apart[1]:
        return False
    if not (_SIGNS.search(one) and _SIGNS.search(other)):
        return True
    return _LETTERS_AND_SIGNS.findall(one) == _LETTERS_AND_SIGNS.findall(other)


def same_text(one: Spelled, other: Spelled) -> bool:
    """Whether two texts are equal but for case, width, spacing and punctuation."""
    if one.letters != other.letters or (not one.letters and one.marks != other.marks):
        return False
    return same_figures(*(text.stretch(0, len(text.letters)) for text in (one, other)))


def short_form(text: str) -> str:
    """What tells texts of a few letters apart: letters, numbers and signs; the marks where there is no letter."""
    short = Spelled(text)
    if not short.letters:
        return short.marks
    signs = "".join(_LETTERS_AND_SIGNS.findall(short.folded)) if _SIGNS.search(short.folded) else ""
    return " ".join([short.letters, signs, *_DIGITS.findall(short.folded)])


def find(subject: Subject, row: Spelled, num_asked: int) -> Found | None:
    """How the row holds the item's text: the whole of it, or at least LEAST_OVERLAP of its own n-grams.

    num_asked: the letters of the row's question, which come first.
    """
    item = spelled(subject.text)
    if _contains(row, item, subject.num_special, num_asked):
        return "contained", 1.0
    grams = [place for place in subject.own if place + GRAM <= len(item.letters)]
    if min(len(item.letters), subject.num_special) < FEWEST_LETTERS or len(grams) < FEWEST_GRAMS:
        return None
    share = sum(item.letters[place : place + GRAM] in row.letters for place in grams) / len(grams)
    if share < LEAST_OVERLAP or (subject.question and spelled(subject.question).letters not in row.letters):
        return None
    return "overlap", share


def _contains(row: Spelled, item: Spelled, num_special: int, num_asked: int) -> bool:
    size = len(item.letters)
    is_template = num_special < LEAST_SPECIAL
    is_accident = size < (LONG if is_template else NO_ACCIDENT)

    def is_edge(place: int) -> bool:
        if row.is_within_figures(place) or (is_template and row.is_within_list(place)):
            return False
        return row.is_sentence_edge(place) if is_accident else row.is_word_edge(place)

    first = row.letters.find(item.letters)
    while first >= 0 and not (is_accident and 0 < num_asked <= first):  # an answer, a label say, may be any words
        last = first + size
        if is_edge(first) and is_edge(last) and same_figures(row.stretch(first, last), item.stretch(0, size)):
            return True
        first = row.letters.find(item.letters, first + 1)
    return False
