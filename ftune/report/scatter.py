"""Methods as points of a picture, score against a cost: inline SVG, labels placed so that none covers another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ftune.report.curves import linear_ticks, log_ticks

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 44
LETTER, LINE = 6.3, 13.0
"""Width of a letter and height of a line of a label, in units of the box; letters are counted as wide ones."""
REACHES = (9, 16, 26, 38, 52)
"""How far from its point a label may stand; from the third on a line leads to it."""
LEADING = 20
LONGEST = 26
"""Letters of a label in the picture; what is longer is cut, and told whole when pointed at."""
LOG_RATIO = 12

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """What is to be drawn: a mean with its range on both axes."""

    label: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


@dataclass(frozen=True)
class Point:
    """A mark's place; `low` and `high` are the ends of its ranges. `anchor` is SVG's text-anchor."""

    label: str
    x: float
    y: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    is_dominated: bool
    text_x: float
    text_y: float
    anchor: str
    has_lead: bool
    told: str


@dataclass(frozen=True)
class Scatter:
    title: str
    x_title: str
    y_title: str
    better: str
    points: list[Point]
    front: str
    """SVG path of the stairs through the undominated points."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    is_log: bool


@dataclass(frozen=True)
class Axis:
    """`form` writes a value. Less is better unless `is_more_better`."""

    title: str
    form: "Form"
    is_more_better: bool = False
    may_be_log: bool = False


class Form:
    """How values of an axis are written."""

    def __init__(self, scale: float = 1.0, digits: int = 3) -> None:
        self.scale, self.digits = scale, digits

    def __call__(self, value: float) -> str:
        return f"{value / self.scale:.{self.digits}g}"


def scatter(title: str, marks: Sequence[Mark], x: Axis, y: Axis) -> Scatter | None:
    """None when there is nothing to compare."""
    if len(marks) < 2:
        return None
    across, x_ticks, is_log = _scale([v / x.form.scale for m in marks for v in m.x], x, (LEFT, WIDTH - RIGHT))
    up, y_ticks, _ = _scale([v / y.form.scale for m in marks for v in m.y], y, (HEIGHT - BOTTOM, TOP))
    places = [(across(m.x[0] / x.form.scale), up(m.y[0] / y.form.scale)) for m in marks]
    front = _front(marks, x, y)
    texts = [m.label if len(m.label) <= LONGEST else m.label[: LONGEST - 1] + "…" for m in marks]
    labels = _labels(texts, places)
    points = [
        Point(
            label=texts[index],
            x=place[0],
            y=place[1],
            x_range=(across(mark.x[1] / x.form.scale), across(mark.x[2] / x.form.scale)),
            y_range=(up(mark.y[1] / y.form.scale), up(mark.y[2] / y.form.scale)),
            is_dominated=index not in front,
            text_x=label[0],
            text_y=label[1],
            anchor=label[2],
            has_lead=label[3],
            told=f"{mark.label}: {y.title.lower()} {y.form(mark.y[0])}, {x.title.lower()} {x.form(mark.x[0])}",
        )
        for index, (mark, place, label) in enumerate(zip(marks, places, labels, strict=True))
    ]
    better = f"better: {'up' if y.is_more_better else 'down'} and to the {'right' if x.is_more_better else 'left'}"
    stairs = _stairs([places[index] for index in front])
    return Scatter(title, x.title, y.title, better, points, stairs, x_ticks, y_ticks, is_log)


def _front(marks: Sequence[Mark], x: Axis, y: Axis) -> list[int]:
    """The marks that no other one equals or beats on both axes."""

    def cost(mark: Mark) -> tuple[float, float]:
        return (-mark.x[0] if x.is_more_better else mark.x[0], -mark.y[0] if y.is_more_better else mark.y[0])

    costs = [cost(mark) for mark in marks]
    return [
        index for index, (a, b) in enumerate(costs) if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in costs)
    ]


def _stairs(places: Sequence[tuple[float, float]]) -> str:
    ordered = sorted(places, key=lambda place: (place[0], -place[1]))
    path = f"M{ordered[0][0]:.1f} {ordered[0][1]:.1f}"
    return path + "".join(f"H{x:.1f}V{y:.1f}" for x, y in ordered[1:])


class _Scaled:
    """A value's place between two ends of the box."""

    def __init__(self, low: float, high: float, ends: tuple[float, float], is_log: bool) -> None:
        self.low, self.high, self.ends, self.is_log = low, high, ends, is_log

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._of(self.low)) / (self._of(self.high) - self._of(self.low))
        return self.ends[0] + share * (self.ends[1] - self.ends[0])

    def _of(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def _scale(
    values: Sequence[float], axis: Axis, ends: tuple[float, float]
) -> tuple[_Scaled, list[tuple[float, str]], bool]:
    low, high = min(values), max(values)
    is_log = axis.may_be_log and low > 0 and high / low > LOG_RATIO
    if is_log:
        ticks = log_ticks(low, high)
        low, high = low / 1.3, high * 1.3
    else:
        room = (high - low) * 0.08 or abs(high) * 0.1 or 0.05
        ticks = linear_ticks(low - room, high + room, 4)
        low, high = low - room, high + room
    place = _Scaled(low, high, ends, is_log)
    return place, [(place(tick), f"{tick:g}") for tick in ticks if low <= tick <= high], is_log


def _labels(texts: Sequence[str], places: Sequence[tuple[float, float]]) -> list[tuple[float, float, str, bool]]:
    """Beside its point, or further off in one of eight directions, where it covers neither point nor label. The most
    crowded points choose first."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    order = sorted(range(len(places)), key=lambda index: -_crowd(places[index], places))
    found: dict[int, tuple[float, float, str, bool]] = {}
    for index in order:
        choices = [
            (label, [box, *_lead(label, places[index])]) for label, box in _choices(texts[index], *places[index])
        ]
        free = [choice for choice in choices if not any(_overlap(box, taken, skip=index) for box in choice[1])]
        label, boxes = (free or choices[:1])[0]
        taken += boxes
        found[index] = label
    return [found[index] for index in range(len(places))]


def _crowd(place: tuple[float, float], places: Sequence[tuple[float, float]]) -> float:
    return sum(1 / (1 + math.dist(place, other)) for other in places)


def _choices(text: str, x: float, y: float) -> list[tuple[tuple[float, float, str, bool], Box]]:
    width = LETTER * len(text)
    found = []
    for reach in REACHES:
        for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7)):
            anchor = "middle" if across == 0 else "start" if across > 0 else "end"
            at_x, at_y = x + across * reach, y + down * (reach + 4)
            left = at_x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (left - 1, at_y - LINE / 2, left + width + 1, at_y + LINE / 2)
            if box[0] >= LEFT - 2 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM + 4:
                found.append(((at_x, at_y, anchor, reach > LEADING), box))
    return found or [((x, y - 10, "middle", False), (x - width / 2, y - 16, x + width / 2, y - 4))]


def _lead(label: tuple[float, float, str, bool], place: tuple[float, float]) -> list[Box]:
    """What the line to a far label covers: small boxes along it, but for its two ends."""
    if not label[3]:
        return []
    shares = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    spots = [(place[0] + (label[0] - place[0]) * s, place[1] + (label[1] - place[1]) * s) for s in shares]
    return [(x - 1, y - 1, x + 1, y + 1) for x, y in spots]


def _overlap(box: Box, taken: Sequence[Box], skip: int) -> bool:
    return any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for index, other in enumerate(taken)
        if index != skip
    )
