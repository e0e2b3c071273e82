"""A previous run as a baseline: its answers and scores on the same items, as its samples.jsonl has them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ftune import folder, stored
from ftune.errors import UserError
from ftune.folder import RunFolder

KEY = "evaluation.previous"
Item: TypeAlias = tuple[str, str]
"""Prompt and expected answer."""


@dataclass(frozen=True)
class Previous:
    """What the previous run's tuned model answered and what that scored, in the order of this run's test rows."""

    run: Path
    answers: list[str]
    scores: list[float]


def read(run: RunFolder, metric: str, sha256: str | None, items: Sequence[Item]) -> Previous:
    """The previous run's samples, put into the order of `items`.

    UserError where it has none, where it was scored by another metric (or by a function's file of another
    `sha256`), or where its items are not these; their row ids and their order may differ.
    """
    where = f"{KEY}: {run.path}"
    if not run.report.is_file() or not run.samples.is_file():
        raise UserError("no finished run lies here", where, "name the folder of a run that was measured on a test set")
    _check_metric(run, metric, sha256, where)
    samples = _samples(run)
    waiting: dict[Item, list[Mapping[str, Any]]] = {}
    for sample in reversed(samples):
        waiting.setdefault((sample["prompt"], sample["expected"]), []).append(sample)
    chosen = [waiting[item].pop() if waiting.get(item) else None for item in items]
    missing = [item for item, sample in zip(items, chosen, strict=True) if sample is None]
    if missing or len(samples) != len(items):
        told = f"; not among them is {missing[0][0][-120:]!r}" if missing else ""
        raise UserError(
            f"the previous run was measured on other items: {len(items) - len(missing)} of this run's {len(items)} "
            f"test rows are among its {len(samples)}{told}",
            where,
            "measure it on this test set: ftune eval RUN --recipe RECIPE; or set it to null",
        )
    found = [sample for sample in chosen if sample is not None]
    return Previous(
        run.path, [str(sample["tuned"]) for sample in found], [float(sample["scores"]["tuned"]) for sample in found]
    )


def _check_metric(run: RunFolder, metric: str, sha256: str | None, where: str) -> None:
    task = _read(lambda: dict(folder.read_json(run.report)["task"] or {}), where)
    if task.get("metric") != metric:
        told = f"the previous run was scored by {task.get('metric') or 'nothing'}, this one is by {metric}"
        raise UserError(told, where, "use the same evaluation.metric, or set it to null")
    if sha256 is not None:
        recorded = stored.read_object(run.manifest).get("metric") if run.manifest.is_file() else None
        if not isinstance(recorded, dict) or recorded.get("sha256") != sha256:
            hint = "measure it again: ftune eval RUN; or set it to null"
            raise UserError(f"{metric} is not the file that scored the previous run", where, hint)


def _samples(run: RunFolder) -> list[dict[str, Any]]:
    """Only those with everything that is read here."""

    def checked() -> list[dict[str, Any]]:
        found = folder.read_json_lines(run.samples)
        for sample in found:
            _ = str(sample["tuned"]), {(sample["prompt"], sample["expected"])}, float(sample["scores"]["tuned"])
        return found

    samples: list[dict[str, Any]] = _read(checked, f"{KEY}: {run.samples}")
    return samples


def _read(read: Callable[[], Any], where: str) -> Any:
    try:
        return read()
    except UserError as error:  # which names the file and the line
        problem = error.problems[0]
        raise UserError(problem.what, f"{KEY}: {problem.where}", problem.hint) from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        told = f"this is not what a run writes: {type(error).__name__}: {error}"
        raise UserError(told, where, "restore the file, or set it to null") from error
