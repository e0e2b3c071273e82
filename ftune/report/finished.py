"""Finished runs as they are compared with each other: what their folders say, and a name that tells them apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune import folder
from ftune.errors import Problem, UserError
from ftune.folder import RunFolder
from ftune.recipe.document import read
from ftune.stored import read_object


@dataclass(frozen=True)
class Finished:
    """What a run folder holds; everything but the report may be missing, and is then empty."""

    name: str
    path: Path
    report: dict[str, Any]
    recipe: dict[Any, Any]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    probe: list[dict[str, Any]]

    def part(self, name: str) -> dict[str, Any]:
        """A part of report.json; empty when it was not measured."""
        found: dict[str, Any] = self.report.get(name) or {}
        return found

    @property
    def bytes_on_disk(self) -> int | None:
        return trained_bytes(self.path)


def trained_bytes(path: Path) -> int | None:
    """Size of the weights that a run has saved: of its adapter, else of the whole model. None where there are none."""
    run = RunFolder(path)
    sizes = [
        file.stat().st_size for file in (run.adapter if run.adapter.is_dir() else run.merged).glob("*.safetensors")
    ]
    return sum(sizes) if sizes else None


def read_runs(paths: Sequence[Path]) -> list[Finished]:
    """Raises UserError with everything that is no finished run, or is named twice."""
    problems: list[Problem] = []
    for index, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:index]]:
            problems.append(Problem("this run is named twice", str(path), "name every run once"))
        elif not path.is_dir():
            problems.append(Problem("no such folder", str(path), "name the folder of a finished run"))
        elif not RunFolder(path).report.is_file():
            what = "this run is not finished" if RunFolder(path).is_run else "no report.json in this folder"
            problems.append(Problem(what, str(path), "finish it with ftune train RECIPE --resume"))
    if problems:
        raise UserError.collect(problems)
    return [_read(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell it from the others."""
    whole = [path.resolve() for path in paths]
    names = []
    for path in whole:
        for count in range(1, len(path.parts) + 1):
            ending = path.parts[-count:]
            if sum(other.parts[-count:] == ending for other in whole) == 1:
                break
        names.append("/".join(ending))
    return names


def _read(path: Path, name: str) -> Finished:
    run = RunFolder(path)

    def lines(file: Path) -> list[dict[str, Any]]:
        return folder.read_json_lines(file) if file.is_file() else []

    return Finished(
        name,
        path,
        read_object(run.report),
        read(run.recipe).data if run.recipe.is_file() else {},
        read_object(run.manifest) if run.manifest.is_file() else {},
        lines(run.metrics),
        lines(run.samples),
        lines(path / "probe.jsonl"),
    )
