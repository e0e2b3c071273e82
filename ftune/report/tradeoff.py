"""Learning against forgetting as charts: the path that training took, and the adapter at several strengths."""

from collections.abc import Mapping, Sequence
from typing import Any

from ftune.quantities import format_count
from ftune.report.curves import Across, Chart, Series, chart

MOST_ROWS = 12

Point = tuple[float, float]


def path_chart(report: Mapping[str, Any]) -> Chart | None:
    """Score over worst drop, joined in the order of the steps. None without two measured points."""
    points = path_points(report.get("path") or [])
    if len(points) < 2:
        return None
    chosen = (report.get("selection") or {}).get("step")
    named = [(_name(step, chosen, max(points)), point) for step, point in points.items()]
    series = [
        Series("evaluations in order", "line", list(points.values())),
        Series("an evaluation", "small dots", list(points.values())),
    ]
    if 0 in points:
        series += [Series("the base", "base dots", [points[0]]), Series("", "hole dots", [points[0]])]
    if chosen in points:
        series.append(Series("kept", "kept-one dots", [points[chosen]]))
    across = Across("worst drop", forgetting_limit(report), [(name, point) for name, point in named if name])
    return chart("Score over forgetting", str(_metric(report)), series, may_be_log=False, across=across)


def path_points(path: Sequence[Mapping[str, Any]]) -> dict[int, Point]:
    """(worst drop, score) by step, where both were measured; the base has forgotten nothing."""
    found: dict[int, Point] = {}
    for entry in sorted(path, key=lambda entry: int(entry["step"])):
        step, score, drop = int(entry["step"]), entry.get("score"), entry.get("worst_drop")
        drop = 0.0 if drop is None and step == 0 else drop
        if score is not None and drop is not None:
            found[step] = (float(drop), float(score))
    return found


def shown_entries(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The path's entries for a table: of a long one some evenly spaced, the first, the last and the kept."""
    path = report.get("path") or []
    kept = (report.get("selection") or {}).get("step")
    last = len(path) - 1
    evenly = {round(place * last / (MOST_ROWS - 1)) for place in range(MOST_ROWS)} if last > 0 else {0}
    return [e for i, e in enumerate(path) if len(path) <= MOST_ROWS or i in evenly or e["step"] == kept]


def forgetting_limit(report: Mapping[str, Any]) -> float | None:
    """The gate max_forgetting's limit."""
    gates = report.get("gates") or []
    return next((float(gate["limit"]) for gate in gates if gate["name"] == "max_forgetting"), None)


def strength_charts(report: Mapping[str, Any]) -> list[Chart]:
    """Score and worst drop over the adapter's strength: in one chart, where both are shares."""
    entries = sorted(report.get("strengths") or [], key=lambda entry: float(entry["strength"]))

    def series(key: str, name: str, kind: str) -> list[Series]:
        points = [(float(entry["strength"]), float(entry[key])) for entry in entries if entry.get(key) is not None]
        return [Series(name, kind, points), Series("", f"{kind} dots", points)]

    score, drop = series("score", f"score ({_metric(report)})", "line"), series("worst_drop", "worst drop", "drop")
    is_share = all(0 <= y <= 1 for _, y in score[0].points)
    across = Across("strength")
    if is_share:
        found = [chart("Score and worst drop", "", [*score, *drop], may_be_log=False, across=across)]
    else:
        found = [
            chart("Score", str(_metric(report)), score, may_be_log=False, across=across),
            chart("Worst drop", "", drop, may_be_log=False, across=across),
        ]
    return [one for one in found if one is not None]


def _name(step: int, chosen: Any, last: int) -> str:
    words = ["base"] if step == 0 else []
    if step == chosen or (step == last and step != 0):
        words.append(f"step {format_count(step)}" + (", kept" if step == chosen else ""))
    return ", ".join(words)


def _metric(report: Mapping[str, Any]) -> str:
    return str((report.get("task") or {}).get("metric") or "score").replace("_", " ")
