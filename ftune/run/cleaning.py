"""Training rows against each other and against what is measured: duplicates, rows set aside, contamination."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ftune import clean
from ftune.clean import Contamination, Hit, Item, Sketches, Twin
from ftune.console.progress import task_progress
from ftune.console.streams import note, warn
from ftune.data import Dataset, Example, Examples
from ftune.data.texts import full_text, question_and_answer
from ftune.data.workers import num_workers, ordered
from ftune.errors import Problem, UserError
from ftune.quantities import format_count
from ftune.recipe import DataSection

ROWS_AT_ONCE = 1000
MANY = 20_000
"""From so many rows on, the work is spread over cores."""
SHOWN = 5
"""How many contaminated rows are named where they are an error."""
CONTAMINATED, SET_ASIDE = "contaminated", "validation"


@dataclass(frozen=True)
class Findings:
    """What one look at some rows found; the rows of `hits` count from the first of them."""

    digests: clean.Hashes
    sketches: Sketches
    """Empty where nobody wants them."""
    hits: list[Hit]


@dataclass(frozen=True)
class Look:
    """What rows are looked at for."""

    examples: Examples
    wants_sketches: bool
    contamination: Contamination | None

    def at(self, start: int) -> Findings:
        fields = list(self.examples[start : start + ROWS_AT_ONCE].fields())
        texts = [full_text(row) for row in fields]
        hits: list[Hit] = []
        if self.contamination is not None:
            questions, answers = zip(*map(question_and_answer, fields), strict=True)
            hits = self.contamination.find(questions, answers)
        sketches = clean.sketches(texts if self.wants_sketches else [])
        return Findings(clean.digests(texts), sketches, [hit._replace(row=hit.row + start) for hit in hits])

    def everywhere(self) -> Findings:
        starts = range(0, len(self.examples), ROWS_AT_ONCE)
        workers = num_workers() if len(self.examples) >= MANY else 1
        parts = []
        with task_progress("cleaning", len(self.examples)) as progress:
            for part in ordered(self.at, starts, workers):
                parts.append(part)
                progress.advance(len(part.digests))
        sketches = Sketches.joined([part.sketches for part in parts])
        hits = [hit for part in parts for hit in part.hits]
        return Findings(np.concatenate([part.digests for part in parts]), sketches, hits)


@dataclass(frozen=True)
class Cleaned:
    """The rows that are trained on, those set aside for validation, and every row that went, with its twin."""

    train: Dataset
    validation: Dataset | None
    twins: list[Twin]


def items_of(examples: Sequence[Example]) -> Iterator[Item]:
    """Rows that are measured, as what training must not hold."""
    for example in examples:
        question, answer = question_and_answer(example.fields)
        yield Item(example.row_id, question, answer)


def clean_rows(train: Dataset, section: DataSection, items: Sequence[Item], seed: int) -> Cleaned:
    """What the recipe wants removed or set aside; raises UserError for contaminated rows where it says `error`.

    Rows that are set aside have no twin, exact or near, among those that stay.
    """
    share = section.validation if isinstance(section.validation, float) else None
    contamination = Contamination(items) if section.decontaminate and items else None
    wants_near = section.deduplicate == "near" or share is not None
    if section.deduplicate == "off" and not wants_near and contamination is None:
        return Cleaned(train, None, [])
    found = Look(train.examples, wants_near, contamination).everywhere()
    id_of, twins = train.examples.row_id, _Twins(found)
    gone: dict[str, clean.Positions] = {}
    listed: list[Twin] = []
    if section.deduplicate != "off":
        gone["duplicate"] = np.flatnonzero(twins.exact >= 0)
        listed += clean.from_first_twins(twins.exact, id_of)
    if section.deduplicate == "near":
        near = np.setdiff1d(np.flatnonzero(twins.near != np.arange(len(train))), gone["duplicate"])
        gone["near_duplicate"] = near
        listed += clean.from_clusters(twins.near, twins.sketches, id_of, near)
    staying = np.setdiff1d(np.arange(len(train)), np.concatenate([*gone.values(), np.zeros(0, np.int64)]))
    is_staying = np.isin(np.arange(len(train)), staying)
    if contamination is not None:
        hits = [hit for hit in found.hits if is_staying[hit.row]]
        told = list(clean.from_hits(hits, id_of))
        _act_on(told, section.decontaminate)
        if section.decontaminate != "report":
            gone[CONTAMINATED] = np.array([hit.row for hit in hits], np.int64)
            staying = np.setdiff1d(staying, gone[CONTAMINATED])
        listed += told
    if not len(staying):
        what = f"0 usable examples: all {_count(len(train))} are duplicates or contaminated"
        raise UserError(what, "data.train", "see data.deduplicate and data.decontaminate")
    validation = None
    if share is not None:
        is_chosen = clean.split_fraction(found.digests[staying], twins.near[staying], share, seed)
        gone[SET_ASIDE] = staying[is_chosen]
        validation = train.only(gone[SET_ASIDE])
        note(f"{_count(len(validation))} set aside for validation")
    num_duplicates = len(gone["duplicate"]) + len(gone.get("near_duplicate", ())) if "duplicate" in gone else None
    num_contaminated = None if contamination is None else len(told)
    cleaned = replace(train.without(gone), duplicates=num_duplicates, contaminated=num_contaminated)
    return Cleaned(cleaned, validation, listed)


def _act_on(contaminated: Sequence[Twin], mode: bool | str) -> None:
    """Tell of contaminated rows, or raise UserError where they are an error."""
    if not contaminated:
        return
    if mode == "error":
        hint = "take these rows out of the training data, or set data.decontaminate: remove"
        problems = [
            Problem(f"holds what {twin.twin_id} asks ({twin.reason}, {twin.share:.0%})", f"row {twin.row_id}", hint)
            for twin in contaminated[:SHOWN]
        ]
        if len(contaminated) > SHOWN:
            problems.append(Problem(f"and {_count(len(contaminated) - SHOWN)} more", "data.train", hint))
        raise UserError.collect(problems)
    first = contaminated[0]
    done = "are trained on, as data.decontaminate: report says" if mode == "report" else "are left out"
    what = "hold what validation, test or probe ask and"
    warn(f"{_count(len(contaminated))} {what} {done}; the first is {first.row_id}, which holds {first.twin_id}")


def _count(number: int) -> str:
    return f"{format_count(number)} training row{'s' if number != 1 else ''}"


class _Twins:
    """For every row the first one with the same content, or -1; and the first one of its cluster of near twins."""

    def __init__(self, found: Findings) -> None:
        self.exact = clean.first_twins(found.digests)
        self.sketches = found.sketches

    @cached_property
    def near(self) -> clean.Positions:
        rows = np.flatnonzero(self.exact >= 0)
        pairs = clean.near_pairs(self.sketches)[:2]
        return clean.clusters(len(self.exact), (self.exact[rows], rows), pairs)
