"""Curves as SVG paths in a 1000 x 1000 box, which the page stretches; labels stay text beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

SIZE = 1000
MOST_POINTS = 400  # of a path; longer series are thinned to the lowest and highest of each stretch
LOG_RATIO = 30  # values that spread further than this are drawn on a logarithmic axis
NEAR_X, NEAR_Y = 45, 9  # percent: labels closer than this in both would cover each other
STRETCH = 40  # smoothing is the mean over the 1/40 of all points that surrounds one

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """`kind` is the CSS class it is drawn with: raw, smooth, line or drop; with `dots` at its end they are points."""

    name: str
    kind: str
    points: Points


@dataclass(frozen=True)
class Tick:
    place: float  # percent of the axis
    label: str


@dataclass(frozen=True)
class Label:
    """Text below a point, or beside one that `is_low`: its start, middle or end is there, `shift` lines lower."""

    x: float  # percent
    y: float  # percent, from the top
    text: str
    align: str
    is_low: bool
    shift: float


@dataclass(frozen=True)
class Across:
    """The axis of what lies below the values; `limit` is a vertical line. Points with a name get a label."""

    name: str = "step"
    limit: float | None = None
    named: Sequence[tuple[str, tuple[float, float]]] = ()


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    across: str
    paths: list[tuple[str, str, str]]  # name, kind, SVG path
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    limit: Tick | None
    labels: list[Label]
    is_log: bool
    summary: str


STEPS = Across()


def chart(
    title: str, unit: str, series: Sequence[Series], may_be_log: bool = True, across: Across = STEPS
) -> Chart | None:
    """None when there is nothing finite to draw. Values of a logarithmic axis must be above 0."""
    series = [Series(one.name, one.kind, [p for p in one.points if all(map(math.isfinite, p))]) for one in series]
    series = [one for one in series if one.points]
    values = [y for one in series for _, y in one.points]
    if not values:
        return None
    is_log = may_be_log and min(values) > 0 and max(values) / min(values) > LOG_RATIO
    y_values = log_ticks(min(values), max(values)) if is_log else linear_ticks(min(0.0, *values), max(values))
    low, high = _axis(y_values, values, is_log)
    places = [x for one in series for x, _ in one.points] + ([] if across.limit is None else [across.limit])
    first, last = min(0.0, *places), max(places)
    width = (last - first) or 1.0

    def height(value: float) -> float:
        share = (_scale(value, is_log) - low) / (high - low)
        return SIZE * (1 - share)

    def place(value: float) -> float:
        return SIZE * (value - first) / width

    begin, (end, final) = series[0].points[0][1], series[0].points[-1]
    return Chart(
        title=title,
        unit=unit,
        across=across.name,
        paths=[(o.name, o.kind, _path([(place(x), height(y)) for x, y in _thin(o.points)], o.kind)) for o in series],
        x_ticks=[Tick(place(x) * 100 / SIZE, _number(x)) for x in linear_ticks(first, last) if first <= x <= last],
        y_ticks=[Tick(height(y) * 100 / SIZE, f"{y:g}") for y in y_values if -1 <= height(y) <= SIZE + 1],
        limit=None if across.limit is None else Tick(place(across.limit) * 100 / SIZE, _number(across.limit)),
        labels=_labels([(text, place(x) * 100 / SIZE, height(y) * 100 / SIZE) for text, (x, y) in across.named]),
        is_log=is_log,
        summary=f"{title} from {begin:.3g} at the start to {final:.3g} at {across.name} {_number(end)}",
    )


def smooth(points: Points) -> list[tuple[float, float]]:
    """The mean of what surrounds each point: as many before as after it, so that the curve does not lag,
    but for the end, where the last points would otherwise be as rough as they are."""
    sums = [0.0, *accumulate(y for _, y in points)]
    widest = max(1, len(points) // STRETCH)
    smoothed = []
    for index, (x, _) in enumerate(points):
        reach = min(widest, index)
        start, end = index - reach, min(index + reach + 1, len(points))
        smoothed.append((x, (sums[end] - sums[start]) / (end - start)))
    return smoothed


def linear_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    spread = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(spread / wanted))
    step = next(size * power for size in (1, 2, 2.5, 5, 10, 20) if spread / (size * power) <= wanted + 0.5)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(start, max(end, start + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with others between them when they are few."""
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    return [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]


def _axis(ticks: Sequence[float], values: Sequence[float], is_log: bool) -> tuple[float, float]:
    low = _scale(min([*ticks, *values]), is_log) if is_log else min(ticks)
    high = _scale(max([*ticks, *values]), is_log)
    return low, (high if high > low else low + 1)


def _scale(value: float, is_log: bool) -> float:
    return math.log10(value) if is_log else value


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def _labels(named: Sequence[tuple[str, float, float]]) -> list[Label]:
    """Labels that would cover an earlier one move below it; at the bottom, above."""
    labels: list[Label] = []
    for text, x, y in named:
        near = sum(abs(x - other.x) < NEAR_X and abs(y - other.y) < NEAR_Y for other in labels)
        align = "start" if x < 35 else "middle" if x < 75 else "end"
        labels.append(Label(x, y, text, align, is_low=y > 80, shift=near * (2.0 if y <= 80 else -2.0)))
    return labels


def _thin(points: Points) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = MOST_POINTS // 2
    kept: list[tuple[float, float]] = []
    for index in range(stretches):
        part = points[index * len(points) // stretches : (index + 1) * len(points) // stretches]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _path(points: Points, kind: str) -> str:
    """A line; or for dots strokes of no length, which round caps turn into circles at any stretch."""
    if kind.endswith("dots") or len(points) == 1:
        return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
