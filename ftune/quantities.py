"""Numbers as people read them, the same on the screen and in the report, and lists of them as people write them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ftune.errors import UserError

NOT_MEASURED = "not measured"
LOWER_IS_BETTER = ("loss", "perplexity")
"""Metrics whose gain is what they fell by."""


def format_count(count: float | None) -> str:
    """12,345 in full; from ten million on 12.3M, 8.03B."""
    if count is None:
        return NOT_MEASURED
    if abs(count) < 10_000_000:
        return f"{count:,.0f}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(count) >= size:
            return f"{_three_digits(count / size)}{letter}"
    raise AssertionError(count)


def format_rate(per_second: float | None, unit: str = "tokens/s") -> str:
    if per_second is None:
        return NOT_MEASURED
    if per_second >= 1e6:
        return f"{_three_digits(per_second / 1e6)}M {unit}"
    if per_second >= 10_000:
        return f"{_three_digits(per_second / 1e3)}k {unit}"
    return f"{per_second:,.0f} {unit}" if per_second >= 10 else f"{per_second:.1f} {unit}"


def format_bytes(size: float | None) -> str:
    """Binary units: 1 GiB = 2**30 bytes."""
    if size is None:
        return NOT_MEASURED
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(size) >= 2**power:
            return f"{_three_digits(size / 2**power)} {unit}"
    return f"{size:.0f} B"


def format_duration(seconds: float | None) -> str:
    """0:07, 12:34, 1:02:03; 2 d 03:04 above a day."""
    if seconds is None:
        return NOT_MEASURED
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_score(score: float | None, digits: int = 3, signed: bool = False) -> str:
    """Never -0.000."""
    if score is None:
        return NOT_MEASURED
    text = f"{score:+.{digits}f}" if signed else f"{score:.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def format_interval(interval: Sequence[float] | None, digits: int = 3) -> str:
    """[low, high], or nothing where no interval was recorded."""
    if interval is None:
        return ""
    return f"[{format_score(interval[0], digits)}, {format_score(interval[1], digits)}]"


def format_difference(difference: float | None) -> str:
    """The largest difference of two sets of logits: 0 exactly, else 2.4e-07."""
    if difference is None:
        return NOT_MEASURED
    return "0" if difference == 0 else f"{difference:.1e}"


def format_gate(value: float | bool | None) -> str:
    """A gate's limit or value: a score, the tiny difference of two sets of logits, or yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or abs(value) >= 1e-3:
        return format_score(value)
    return format_difference(value)


def are_all(keys_loaded: str) -> bool:
    """Whether `84/84` means every one."""
    found, _, wanted = keys_loaded.partition("/")
    return found == wanted


def worst_fields(task: Mapping[str, Any], most: int = 10) -> list[tuple[str, float]]:
    """The fields of JSON answers that are right least often, with their shares; none where all are right."""
    wrong = [(name, share) for name, share in (task.get("fields") or {}).items() if share < 1]
    if task.get("unexpected_fields"):
        wrong.append(("(no unexpected field)", 1 - task["unexpected_fields"]))
    return sorted(wrong, key=lambda pair: pair[1])[:most]


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of a (smooth) series in at most `width` block characters, sampled evenly, the last too."""
    blocks = "▁▂▃▄▅▆▇█"
    width = min(width, len(values))
    if width < 2:
        return ""
    samples = [values[index * (len(values) - 1) // (width - 1)] for index in range(width)]
    low, high = min(samples), max(samples)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((sample - low) * scale)] for sample in samples)


def _three_digits(value: float) -> str:
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}"


def numbers(text: str | None, option: str) -> list[float]:
    """Numbers with commas between."""
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"{text!r} is not a list of numbers", option, "write them with commas between: 0,0.5,1")
    return found
