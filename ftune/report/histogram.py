"""Lengths of rows as columns in a 1000 x 1000 box, which the page stretches; labels stay text beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftune.quantities import format_count
from ftune.report.curves import SIZE, Tick

GAP = 0.06  # of a column's width, on each side
MOST_TICKS = 6


@dataclass(frozen=True)
class Column:
    x: float
    width: float
    height: float
    told: str


@dataclass(frozen=True)
class Columns:
    columns: list[Column]
    x_ticks: list[Tick]
    highest: int


def columns(histogram: Mapping[str, Any] | None) -> Columns | None:
    """All bins are drawn equally wide, also those between powers of two. None where nothing was counted."""
    if not histogram or not any(histogram["counts"]):
        return None
    edges, counts = histogram["edges"], histogram["counts"]
    width, highest = SIZE / len(counts), max(counts)
    found = [
        Column(
            x=(place + GAP) * width,
            width=(1 - 2 * GAP) * width,
            height=SIZE * count / highest,
            told=f"{format_count(low)} to {format_count(high - 1)} tokens: {format_count(count)} rows",
        )
        for place, (low, high, count) in enumerate(zip(edges[:-1], edges[1:], counts, strict=True))
    ]
    every = -(-len(edges) // MOST_TICKS)
    ticks = [Tick(100 * place / len(counts), format_count(edges[place])) for place in range(0, len(edges), every)]
    return Columns(found, ticks, highest)
