"""`ftune report`: a run's pages from its folder alone, and a person's verdicts taken into them. Needs no model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftune import folder, lock, report, stored
from ftune.console.streams import note
from ftune.errors import UserError
from ftune.folder import RunFolder
from ftune.report.review import identity, obstacle
from ftune.report.verdicts import read_verdicts, summary


def rebuild_report(path: Path, verdicts: Path | None = None) -> Path:
    """Render a run's report again from its folder alone; with a file of verdicts, these become part of it."""
    run = RunFolder(path)
    if not run.report.is_file():
        raise UserError("no report.json in this folder", str(path), "name the folder of a finished run")
    stored.refuse_links(path)
    with lock.hold(path):
        if verdicts is not None:
            take_verdicts(run, verdicts)
        with stored.as_written(path):
            written = report.render(path)
        record(run, [*written, run.verdicts.name, run.report.name] if verdicts is not None else written)
    return path / "report.html"


def take_verdicts(run: RunFolder, verdicts: Path) -> None:
    """Check the verdicts, keep them in the run folder and count them in report.json."""
    rows = folder.read_json_lines(run.samples) if run.samples.is_file() else []
    recipe = stored.read_text(run.recipe) if run.recipe.is_file() else None
    if reason := obstacle(recipe, rows):
        raise UserError(f"this run has no review sheet: {reason}", str(run.path), "leave out --review")
    judged = (run.samples.name, run.report.name)
    recorded = run.recorded if run.is_complete else {}
    if changed := folder.changed_files(run.path, {name: recorded[name] for name in judged if name in recorded}):
        raise UserError(
            f"changed since the run wrote it: {', '.join(changed)}",
            str(run.path),
            "restore it, or `ftune eval` the run",
        )
    document = read_verdicts(verdicts, identity(recipe, rows), rows)
    with stored.as_written(run.samples):
        found = summary(document["verdicts"], rows)
    with stored.as_written(verdicts):
        folder.write_json(run.verdicts, document)
    folder.write_json(run.report, {**stored.read_object(run.report), "review": found})
    note(f"{found['n']} verdicts taken into {run.report}")


def kept_verdicts(run: RunFolder) -> dict[str, Any]:
    """The `review` part for a report that is written anew, where the kept verdicts are about its very answers."""
    if not run.verdicts.is_file():
        return {}
    rows = folder.read_json_lines(run.samples)
    try:
        document = read_verdicts(run.verdicts, identity(stored.read_text(run.recipe), rows), rows)
    except UserError as error:
        note(f"the review is left out of the report: {error.problems[0].what}")
        return {}
    return {"review": summary(document["verdicts"], rows)}


def record(run: RunFolder, names: Iterable[str]) -> None:
    """The checksums of files that were written, or removed, after the run was finished."""
    if not run.is_complete:
        return
    files, manifest = dict(run.recorded), stored.read_object(run.manifest)
    for name in names:
        files.pop(name, None)
        if (run.path / name).is_file():
            files[name] = folder.sha256_file(run.path / name)
    folder.write_json(run.manifest, {**manifest, "files": dict(sorted(files.items()))})
