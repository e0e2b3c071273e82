"""Training rows that hold items of a validation, test or probe set: found by hashes, confirmed letter by letter.

A row is contaminated when its question, or the whole of it, equals an item's (`equal`), when an item stands whole in
it (`contained`), or when it has most of what is the item's own (`overlap`). What many items share, a template, is
nobody's own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ftune.clean.letters import WINDOW, Flags, Hashes, Letters, Positions, folded, mixed
from ftune.clean.matching import SHORT, Kind, Subject, find, same_text, spelled
from ftune.clean.windows import WindowIndex

GENERIC_SHARE, GENERIC_ITEMS = 0.02, 4
"""A question with more different answers than that, and than that share of the items, is an instruction: asking it is
no leak."""


class Item(NamedTuple):
    """One item that must stay unseen. `question` is all before the answer, empty for plain text."""

    id: str
    question: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.question}\n{self.answer}"


class Hit(NamedTuple):
    """A training row that holds an item: how, and the share of the item's own n-grams that are in it."""

    row: int
    item_id: str
    kind: Kind
    share: float


@dataclass(frozen=True)
class _Pairs:
    """Questions and answers as letters: question i is text 2i, its answer text 2i + 1."""

    letters: Letters
    sums: Hashes
    questions: Hashes
    texts: Hashes

    @classmethod
    def of(cls, questions: Sequence[str], answers: Sequence[str]) -> "_Pairs":
        letters = Letters.of([text for pair in zip(questions, answers, strict=True) for text in pair])
        sums, sizes = letters.sums(), letters.sizes
        values = letters.polynomials(sums)
        texts = values[0::2] + values[1::2] * letters.powers(sizes[0::2])
        questions_sizes, texts_sizes = sizes[0::2].astype(np.uint64), (sizes[0::2] + sizes[1::2]).astype(np.uint64)
        return cls(letters, sums, mixed(values[0::2] ^ questions_sizes), mixed(texts ^ texts_sizes))

    @property
    def question_sizes(self) -> Positions:
        return self.letters.sizes[0::2]


class Contamination:
    """What a set of items looks like inside other texts. Build it once; `find` may run in any process (it pickles)."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = [item for item in items if item.text.strip()]
        pairs = _Pairs.of([item.question for item in self._items], [item.answer for item in self._items])
        is_generic = _is_generic(pairs)
        self._keys, self._key_items = _equality_index(pairs, is_generic)
        self._subjects, self._windows = _subjects(self._items, pairs, is_generic)

    def __len__(self) -> int:
        return len(self._items)

    def find(self, questions: Sequence[str], answers: Sequence[str]) -> list[Hit]:
        """The contaminated ones among rows, one hit for each, in order; batches of some hundreds are fastest.

        Which of several items a row is told with does not depend on the batch: equal ones first, then by share.
        """
        if not self._items or not questions:
            return []
        pairs = _Pairs.of(questions, answers)
        hits: dict[int, Hit] = {}
        for row, item in self._equal(pairs):
            if row not in hits and _is_equal(self._items[item], questions[row], answers[row]):
                hits[row] = Hit(row, self._items[item].id, "equal", 1.0)
        for row, subject in self._held(pairs):
            if row not in hits or hits[row].share < 1:
                text, num_asked = spelled(f"{questions[row]}\n{answers[row]}"), int(pairs.question_sizes[row])
                found = find(self._subjects[subject], text, num_asked)
                if found and (row not in hits or hits[row].share < found[1]):
                    hits[row] = Hit(row, self._subjects[subject].item_id, *found)
        return [hits[row] for row in sorted(hits)]

    def _equal(self, pairs: _Pairs) -> Iterator[tuple[int, int]]:
        for hashes in (pairs.questions, pairs.texts):
            first = np.searchsorted(self._keys, hashes)
            last = np.searchsorted(self._keys, hashes, side="right")
            for row in np.flatnonzero(first < last):
                yield from ((int(row), int(item)) for item in self._key_items[first[row] : last[row]])

    def _held(self, pairs: _Pairs) -> Iterator[tuple[int, int]]:
        if self._windows:
            for text, subject in self._windows.candidates(pairs.letters, pairs.sums):
                yield text // 2, subject


def _is_generic(pairs: _Pairs) -> Flags:
    """Which items ask what many others ask too, to be answered otherwise."""
    _, numbers = np.unique(pairs.questions, return_inverse=True)
    _, firsts = np.unique(np.stack([pairs.questions, pairs.texts]), axis=1, return_index=True)
    num_answers = np.bincount(numbers[firsts], minlength=1)[numbers]
    return num_answers > max(GENERIC_ITEMS, GENERIC_SHARE * len(numbers))


def _equality_index(pairs: _Pairs, is_generic: Flags) -> tuple[Hashes, Positions]:
    """Hashes that equal rows have, sorted, and whose they are: of whole items, and of telling questions."""
    telling = np.flatnonzero((pairs.question_sizes > SHORT) & ~is_generic)
    keys = np.concatenate([pairs.questions[telling], pairs.texts])
    items = np.concatenate([telling, np.arange(len(pairs.texts))])
    order = np.lexsort((items, keys))
    return keys[order], items[order]


def _subjects(items: Sequence[Item], pairs: _Pairs, is_generic: Flags) -> tuple[list[Subject], WindowIndex | None]:
    """The different texts to look for inside rows: questions, or whole items where a question tells too little."""
    chosen: dict[str, tuple[Item, str, str]] = {}
    for item, size, generic in zip(items, pairs.question_sizes, is_generic, strict=True):
        is_whole = size < WINDOW or generic
        text = item.text if is_whole else item.question
        needed = item.question if is_whole and not generic else ""
        chosen.setdefault("".join(folded(text).split()), (item, text, needed))
    if not chosen:
        return [], None
    index = WindowIndex.of([text for _, text, _ in chosen.values()])
    subjects = [
        Subject(item.id, text, needed, own, int(num_special))
        for (item, text, needed), own, num_special in zip(chosen.values(), index.own, index.num_special, strict=True)
    ]
    return subjects, index


def _is_equal(item: Item, question: str, answer: str) -> bool:
    row = [spelled(f"{question}\n{answer}"), *([spelled(question)] if question else [])]
    whole, asked = spelled(item.text), spelled(item.question)
    if not asked.letters and spelled(question).letters == "" and asked.marks != spelled(question).marks:
        return False
    if any(same_text(whole, text) for text in row):
        return True
    return len(asked.letters) > SHORT and any(same_text(asked, text) for text in row)
