"""Labelled rows: which labels there are, their class ids, and where the id stands among a row's tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ftune.data.examples import MAX_SHOWN
from ftune.data.loading import Dataset
from ftune.data.store import Example, Examples
from ftune.errors import Problem, UserError


def label_of(example: Example) -> str:
    return str(example.fields["label"])


def sorted_labels(examples: Examples) -> tuple[str, ...]:
    """Every label of these rows once, by class id."""
    return in_order(fields["label"] for fields in examples.fields())


def in_order(labels: Iterable[Any]) -> tuple[str, ...]:
    """Every label once: whole numbers by value, else as text; never by the order of rows."""
    found = set(labels)
    are_numbers = all(isinstance(label, int) for label in found)
    known = sorted(found) if are_numbers else sorted(set(map(str, found)))
    if len(known) < 2:
        only = f"only {known[0]!r}" if known else "none"
        raise UserError(f"a classifier needs at least two labels, the training rows have {only}", "data.train")
    return tuple(map(str, known))


def with_class_ids(dataset: Dataset, labels: Sequence[str], where: str) -> Dataset:
    """The dataset with the class id of each row; UserError names rows whose label training lacks."""
    ids = {label: i for i, label in enumerate(labels)}
    found = [str(fields["label"]) for fields in dataset.examples.fields()]
    unknown = [i for i, label in enumerate(found) if label not in ids]
    problems = [
        Problem(f"label {found[i]!r} is in no training row", f"{where} (row {dataset.examples[i].row_id})", "rename it")
        for i in unknown[:MAX_SHOWN]
    ]
    if len(unknown) > MAX_SHOWN:
        problems.append(Problem(f"and {len(unknown) - MAX_SHOWN} more rows with unknown labels", where))
    if problems:
        raise UserError.collect(problems)
    return replace(dataset, examples=dataset.examples.with_class_ids(np.array([ids[label] for label in found])))
