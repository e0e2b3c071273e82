"""`ftune compare`: the same recipe with several methods and seeds, each a whole run in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftune import folder, lock, signals, stored
from ftune.console.streams import note
from ftune.console.sweep import SweepProgress, sweep_progress
from ftune.errors import ExitCode
from ftune.quantities import format_duration, format_score
from ftune.report.sweep import Outcome, summarize
from ftune.report.sweep_pages import write_pages
from ftune.run.variants import Call, Member, members
from ftune.signals import Stopped

LABELS = ("failed", "error", "stopped")
"""With one of these words begins what a run says of its end."""
MOST_LINES = 200
"""The last lines of a run that its end is looked for in."""


def compare_methods(call: Call) -> dict[str, Any]:
    """Check everything, run what is not there yet, and write compare.json and its pages; returns compare.json.

    A run that fails does not stop the others. Raises UserError before anything is written, Interrupted after the run
    in progress has saved its checkpoint.
    """
    found = members(call)
    if found.learning_rate is not None:
        note(f"every method is trained at the recipe's learning rate, {found.learning_rate:g}, not at its own")
    if found.runs[0].settings.data.test is None:
        note("the recipe has no data.test: the methods are compared by forgetting and cost alone")
    outcomes = {member.name: Outcome.waiting(member.variant.label, member.seed, member.path) for member in found.runs}
    stored.refuse_links(found.folder)
    with lock.hold(found.folder), sweep_progress(len(found.runs)) as progress:
        for member in found.runs:
            outcomes[member.name] = run_member(call, member, outcomes[member.name], found.folder, progress)
            document = summarize(found.folder, list(outcomes.values()), found.left_out)
            write_pages(found.folder, document)
    return document


def run_member(call: Call, member: Member, waiting: Outcome, root: Path, progress: SweepProgress) -> Outcome:
    progress.begin(member.name)
    if call.resume and member.run.is_complete:
        progress.end(None, "finished before")
        return replace(waiting, exit_code=0)
    began = time.monotonic()
    code, lines = run_process(command(call, member), root / "logs" / f"{member.name}.log", progress)
    is_done = code in (ExitCode.OK, ExitCode.GATE_FAILED) and member.run.is_complete
    if is_done:
        told = told_of(folder.read_json(member.run.report))
        progress.end(code == ExitCode.OK, f"{told}, {format_duration(time.monotonic() - began)}")
        return replace(waiting, exit_code=code)
    error = why(code, lines)
    progress.end(False, error)
    return replace(waiting, exit_code=code, error=error)


def command(call: Call, member: Member) -> list[str]:
    options = ["--overwrite"] if call.overwrite else ["--resume"] if call.resume and member.run.is_run else []
    return [sys.executable, "-m", "ftune", "train", str(call.recipe), *member.overrides, *options, "--json"]


def run_process(arguments: Sequence[str], log: Path, progress: SweepProgress) -> tuple[int, list[str]]:
    """Run one process to its end; its messages go into the log and to the progress. A signal that stops us is passed
    on once, and the process has its time to save."""
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | {"NO_COLOR": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=MOST_LINES)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        ) as process,
    ):

        def listen() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                file.write(line)
                file.flush()
                last.append(line.rstrip())
                if line.strip():
                    progress.tell(line)

        try:
            listen()
            code = process.wait()
        except Stopped as stopped:
            process.send_signal(stopped.number)
            listen()
            process.wait()
            hint = "ftune compare ... --resume goes on where it stopped"
            raise signals.interrupted(stopped.number, "", str(log), hint) from None
    return code, list(last)


def why(code: int, lines: Sequence[str]) -> str:
    """What a failed run said at its end, on one line; or how it was ended."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    starts = [index for index, line in enumerate(lines) if line.split()[:1] and line.split()[0] in LABELS]
    said = " ".join(" ".join(lines[starts[-1] :]).split()[1:]) if starts else ""
    return said or f"ended with exit code {code}"


def told_of(document: dict[str, Any]) -> str:
    """A finished run in a few words."""
    task, forgetting = document.get("task") or {}, document.get("forgetting") or {}
    parts = []
    if task.get("tuned") is not None:
        parts.append(f"{task['metric']} {format_score(task['tuned'])}")
    if forgetting.get("worst_drop") is not None:
        parts.append(f"worst forgetting {format_score(forgetting['worst_drop'])}")
    if failed := [str(gate["name"]) for gate in document["gates"] if not gate["passed"]]:
        parts.append(f"gate failed: {', '.join(failed)}")
    return ", ".join(parts) or "done"
