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
letters from which templates do not matter. Any other must stand by itself, between ends of sentences."""
GRAM = 32
"""Letters of an n-gram in the share that decides, some eight English words or eleven Chinese characters."""
LEAST_OVERLAP = 0.8
FEWEST_LETTERS = 96
"""Letters, and own letters, from which an item may be found by a part of it."""
FEWEST_GRAMS = 12

_DIGITS, _MARKS = re.compile(r"\d+"), re.compile(r"[^\w\s]|_")
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

    Marks inside numbers may have gone (1,000 and 1000), and all operators and brackets; other ones, or elsewhere, differ.
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
    """All that tells apart two texts of a few letters: letters, numbers and signs, or marks where there is no letter."""
    short = Spelled(text)
    if not short.letters:
        return short.marks
    return " ".join([short.letters, *_DIGITS.findall(short.folded), *_SIGNS.findall(short.folded)])


def find(subject: Subject, row: Spelled) -> Found | None:
    """How the row holds the item's text: the whole of it, or at least LEAST_OVERLAP of its own n-grams."""
    item = spelled(subject.text)
    if _contains(row, item, subject.num_special):
        return "contained", 1.0
    grams = [place for place in subject.own if place + GRAM <= len(item.letters)]
    if min(len(item.letters), subject.num_special) < FEWEST_LETTERS or len(grams) < FEWEST_GRAMS:
        return None
    share = sum(item.letters[place : place + GRAM] in row.letters for place in grams) / len(grams)
    if share < LEAST_OVERLAP or (subject.question and spelled(subject.question).letters not in row.letters):
        return None
    return "overlap", share


def _contains(row: Spelled, item: Spelled, num_special: int) -> bool:
    size = len(item.letters)
    is_no_accident = size >= LONG or (size >= NO_ACCIDENT and num_special >= LEAST_SPECIAL)
    is_edge = row.is_word_edge if is_no_accident else row.is_sentence_edge
    first = row.letters.find(item.letters)
    while first >= 0:
        last = first + size
        stands_alone = all(is_edge(place) and not row.is_within_figures(place) for place in (first, last))
        if stands_alone and same_figures(row.stretch(first, last), item.stretch(0, size)):
            return True
        first = row.letters.find(item.letters, first + 1)
    return False
