"""A classifier's confusion matrix as the report shows it: a heat map, and the numbers that matter of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_LABELS = 12
"""Up to so many labels the whole matrix is a table of numbers."""
MOST_PAIRS = 10
"""So many of the most frequent confusions are listed."""


@dataclass(frozen=True)
class Cell:
    """One square of the heat map: its row is the expected label; `share` is of that label's items."""

    row: int
    column: int
    count: int
    share: float
    told: str


@dataclass(frozen=True)
class Confusion:
    labels: list[str]
    counts: list[list[int]]
    cells: list[Cell]
    pairs: list[tuple[str, str, int]]
    """Expected, predicted, how often; the most frequent first."""

    @property
    def is_small(self) -> bool:
        return len(self.labels) <= MOST_LABELS


def confusion(task: Mapping[str, Any]) -> Confusion | None:
    """None where the task has no labels."""
    found = task.get("confusion")
    if not found:
        return None
    labels, counts = found["labels"], found["counts"]
    cells = [
        Cell(i, k, count, count / sum(row), f"{labels[i]} taken for {labels[k]}: {count} of {sum(row)}")
        for i, row in enumerate(counts)
        for k, count in enumerate(row)
        if count
    ]
    wrong = sorted((cell for cell in cells if cell.row != cell.column), key=lambda cell: -cell.count)
    pairs = [(labels[cell.row], labels[cell.column], cell.count) for cell in wrong[:MOST_PAIRS]]
    return Confusion(labels, counts, cells, pairs)
