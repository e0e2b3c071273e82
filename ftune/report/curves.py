"""Training curves as SVG paths in a 1000 x 1000 box, which the page stretches; labels stay text beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

SIZE = 1000
MOST_POINTS = 400  # of a path; longer series are thinned to the lowest and highest of each stretch
LOG_RATIO = 30  # values that spread further than this are drawn on a logarithmic axis
STRETCH = 40  # smoothing is the mean over the 1/40 of all points that surrounds one

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """`kind` is the CSS class it is drawn with: raw, smooth, dots or line."""

    name: str
    kind: str
    points: Points


@dataclass(frozen=True)
class Tick:
    place: float  # percent of the axis
    label: str


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    paths: list[tuple[str, str, str]]  # name, kind, SVG path
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    is_log: bool
    summary: str


def chart(title: str, unit: str, series: Sequence[Series], may_be_log: bool = True) -> Chart | None:
    """None when there is nothing finite to draw. Values of a logarithmic axis must be above 0."""
    series = [Series(one.name, one.kind, [p for p in one.points if math.isfinite(p[1])]) for one in series]
    values = [y for one in series for _, y in one.points]
    if not values:
        return None
    is_log = may_be_log and min(values) > 0 and max(values) / min(values) > LOG_RATIO
    last = max(x for one in series for x, _ in one.points)
    y_values = log_ticks(min(values), max(values)) if is_log else linear_ticks(0.0, max(values))
    low, high = _axis(y_values, values, is_log)

    def height(value: float) -> float:
        share = (_scale(value, is_log) - low) / (high - low)
        return SIZE * (1 - share)

    paths = [
        (one.name, one.kind, _path([(SIZE * x / last, height(y)) for x, y in _thin(one.points)], one.kind))
        for one in series
        if one.points
    ]
    first, final = series[0].points[0][1], series[0].points[-1][1]
    return Chart(
        title=title,
        unit=unit,
        paths=paths,
        x_ticks=[Tick(100 * x / last, f"{x:,.0f}") for x in linear_ticks(0, last) if x <= last],
        y_ticks=[Tick(height(y) * 100 / SIZE, f"{y:g}") for y in y_values if -1 <= height(y) <= SIZE + 1],
        is_log=is_log,
        summary=f"{title} from {first:.3g} at the start to {final:.3g} at step {last:,.0f}",
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
    if kind == "dots" or len(points) == 1:
        return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
