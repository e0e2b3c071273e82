"""Labelled rows: which labels there are, their class ids, and where the id stands among a row's tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ftune.chat import LabelledTokens
from ftune.data.examples import MAX_SHOWN, Dataset, Example
from ftune.errors import Problem, UserError


def label_of(example: Example) -> str:
    return str(example.fields["label"])


def sorted_labels(examples: Sequence[Example]) -> tuple[str, ...]:
    """Every label once, by class id: whole numbers by value, else as text; never by the order of rows."""
    found: set[Any] = {example.fields["label"] for example in examples}
    are_numbers = all(isinstance(label, int) for label in found)
    labels = sorted(found) if are_numbers else sorted(set(map(str, found)))
    if len(labels) < 2:
        only = f"only {labels[0]!r}" if labels else "none"
        raise UserError(f"a classifier needs at least two labels, the training rows have {only}", "data.train")
    return tuple(map(str, labels))


def with_class_ids(dataset: Dataset, labels: Sequence[str], where: str) -> Dataset:
    """The dataset with the class id of each row in its tokens; UserError names rows whose label training lacks."""
    ids = {label: i for i, label in enumerate(labels)}
    unknown = [example for example in dataset.examples if label_of(example) not in ids]
    problems = [
        Problem(f"label {label_of(e)!r} is in no training row", f"{where} (row {e.row_id})", "add or rename it")
        for e in unknown[:MAX_SHOWN]
    ]
    if len(unknown) > MAX_SHOWN:
        problems.append(Problem(f"and {len(unknown) - MAX_SHOWN} more rows with unknown labels", where))
    if problems:
        raise UserError.collect(problems)
    numbered = [
        replace(e, tokens=LabelledTokens(e.tokens.input_ids, e.tokens.supervised, ids[label_of(e)]))
        for e in dataset.examples
    ]
    return replace(dataset, examples=tuple(numbered))
