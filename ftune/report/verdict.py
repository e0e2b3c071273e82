"""The report in one sentence: did fine-tuning beat prompting, and what was forgotten for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftune.quantities import LOWER_IS_BETTER, format_interval, format_score

DIGITS = 2


def verdict(report: Mapping[str, Any]) -> str:
    """Says what was measured and no more; numbers with their 95 % intervals."""
    task = report.get("task") or {}
    parts = [_task(task), *_previous(task.get("previous") or {}), _forgetting(report.get("forgetting") or {})]
    failed = [str(gate["name"]) for gate in report.get("gates") or [] if not gate["passed"]]
    if failed:
        parts.append(f"gate{'s' * (len(failed) > 1)} failed: {', '.join(failed)}")
    return "; ".join(parts) + "."


def _task(task: Mapping[str, Any]) -> str:
    tuned = task.get("tuned")
    if tuned is None:
        return "The task was not measured" + because(task)
    intervals, gain, interval = task.get("intervals") or {}, task.get("gain"), task.get("ci95")
    measured = [(name, task[key]) for name, key in BASELINES if task.get(key) is not None]
    named = " and ".join(f"{name} {format_score(score, DIGITS)}" for name, score in measured)
    baseline = f"the better of {named}" if len(measured) > 1 else named
    subject = _with_interval(f"Tuned {format_score(tuned, DIGITS)}", intervals.get("tuned"))
    if task.get("metric") in LOWER_IS_BETTER:
        subject = subject.replace("Tuned", f"Tuned {task['metric']}", 1)
    if not measured or gain is None:
        return subject + ", with no baseline to compare"
    reached = ": few-shot already reaches it" if task.get("baseline") == "few_shot" else ""
    size = _with_interval(format_score(abs(gain), DIGITS), _size(interval, gain))
    if interval is None:
        relation = "is better than" if gain > 0 else "is worse than" if gain < 0 else "equals"
        by = f" by {size}, without an interval" if gain else ""
        return f"{subject} {relation} {baseline}{by}" + (reached if gain <= 0 else "")
    if interval[0] > 0:
        return f"{subject} beats {baseline} by {size}"
    if interval[1] < 0:
        return f"{subject} is worse than {baseline} by {size}{reached}"
    signed = _with_interval(format_score(gain, DIGITS, signed=True), interval)
    return f"{subject} does not clearly differ from {baseline}, gain {signed}{reached}"


def _previous(previous: Mapping[str, Any]) -> list[str]:
    """A part of the sentence where a previous run was named."""
    if previous.get("gain") is None:
        return []
    gain = _with_interval(format_score(previous["gain"], DIGITS, signed=True), previous.get("ci95"))
    name = Path(str(previous["run"])).name
    return [f"gain over the previous run {name}, {format_score(previous['tuned'], DIGITS)}: {gain}"]


BASELINES = (("zero-shot", "zero_shot"), ("few-shot", "few_shot"))


def _forgetting(forgetting: Mapping[str, Any]) -> str:
    suites = [suite for suite in forgetting.get("suites") or [] if suite.get("drop") is not None]
    if not suites:
        return "forgetting was not measured" + because(forgetting)
    worst = max(suites, key=lambda suite: float(suite["drop"]))
    drop = _with_interval(format_score(worst["drop"], DIGITS), worst.get("ci95"))
    sentence = f"worst forgetting: {worst['name']} {drop} ({worst['verdict']})"
    forgotten = sum(suite["verdict"] == "forgot" for suite in suites)
    return f"{sentence}, {forgotten} of {len(suites)} skills forgotten" if forgotten > 1 else sentence


def because(part: Mapping[str, Any]) -> str:
    """The recorded reason in brackets, or nothing."""
    return f" ({part['reason']})" if part.get("reason") else ""


def _with_interval(text: str, interval: Any) -> str:
    return f"{text} {format_interval(interval, DIGITS)}" if interval else text


def _size(interval: Any, gain: float) -> Any:
    """The interval of |gain|."""
    return [-interval[1], -interval[0]] if interval and gain < 0 else interval
