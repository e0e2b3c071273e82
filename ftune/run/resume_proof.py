"""`ftune verify RECIPE --resume`: the promise of exact resume, proved on the user's own recipe and machine.

A few steps are trained twice, in processes of their own: once straight, once killed with SIGKILL after half of them and
resumed. Then parameters, optimizer, the saved result and the lines of every step must be the same bytes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune import checkpoint, folder, recipe
from ftune.artifacts.checks import Check
from ftune.console.streams import note
from ftune.errors import RunError, UserError
from ftune.folder import RunFolder

LEFT_OUT: dict[str, Any] = {
    "data.validation": None,
    "data.test": None,
    "evaluation.probe": "off",
    "evaluation.previous": None,
    "evaluation.review": 0,
    "gates.min_score": None,
    "gates.min_gain": None,
    "gates.max_forgetting": None,
    "output.trackers": [],
    "output.save": "adapter",
    "training.select": "last",
    "training.evaluate_every": None,
    "training.epochs": None,
}
"""What is measured and told is left out: it changes no step."""
CLOCK = ("tokens_per_second", "memory")
"""What a line of metrics tells of the machine, not of the step."""
DIE = """
import os, signal, sys
from ftune import train
after, plain = int(sys.argv.pop(1)), train.train
def dying(*arguments):
    for step in plain(*arguments):
        yield step
        if step.step == after:
            os.kill(os.getpid(), signal.SIGKILL)
train.train = dying
from ftune.__main__ import main
sys.argv[0] = "ftune"
main()
"""
"""A training process that is killed when it turns to the step after; its checkpoint lies on the disk by then."""


def prove_resume(path: Path, overrides: list[str], steps: int) -> dict[str, Any]:
    """Train, kill, resume, compare; nothing is written where the recipe's runs go. Every check is told."""
    if steps < 2:
        raise UserError("a run of one step cannot be resumed in its middle", "--steps", "use 2 or more")
    recipe.load(path, overrides)  # what is wrong with it is told before anything is started
    with tempfile.TemporaryDirectory(prefix="ftune-resume-") as place:
        given = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in LEFT_OUT.items())]
        given += [f"training.max_steps={steps}", "training.checkpoint_every=1", f"training.keep_checkpoints={steps}"]
        straight, resumed = (RunFolder(Path(place) / name) for name in ("straight", "resumed"))
        note(f"training {steps} steps of {path}, undisturbed")
        _run(["-m", "ftune"], path, [*given, f"output.dir={straight.path}"])
        again = [*given, f"output.dir={resumed.path}"]
        after = steps // 2
        note(f"training them again, killed after step {after}")
        _run(["-c", DIE, str(after)], path, again, expected=-signal.SIGKILL)
        held = checkpoint.latest(resumed.checkpoints)
        if held is None or held.step != after or resumed.is_complete:
            raise RunError("the run was not killed where it should be", str(resumed.path), "report it")
        note("resuming it in a fresh process")
        _run(["-m", "ftune"], path, [*again, "--resume"])
        found = list(_compare(straight, resumed, after, steps))
    return {
        "target": str(path),
        "passed": all(check.passed for check in found),
        "checks": [check.as_dict() for check in found],
    }


def _run(program: list[str], path: Path, arguments: list[str], expected: int = 0) -> None:
    """`ftune train` in a process of its own; raises RunError with what it said where it ends otherwise."""
    command = [sys.executable, *program, "train", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    if done.returncode != expected:
        said = done.stderr.strip().splitlines()[-3:]
        what = f"the run ended with exit code {done.returncode} instead of {expected}: {' '.join(said)}"
        raise RunError(what, str(path), "see what `ftune train` says")


def _compare(straight: RunFolder, resumed: RunFolder, after: int, steps: int) -> Iterator[Check]:
    told = f"killed after step {after} of {steps}, and gone on in a fresh process"
    yield Check("killed_and_resumed", resumed.is_complete, told)
    for name, file in (("parameters", checkpoint.PARAMETERS), ("optimizer", checkpoint.OPTIMIZER)):
        differing = [
            step for step in range(1, steps + 1) if _bytes(straight, step, file) != _bytes(resumed, step, file)
        ]
        yield Check(name, not differing, _told(differing, "the same bytes after every step", "differ after steps"))
    lines = [_lines(run) for run in (straight, resumed)]
    differing = [one["step"] for one, other in zip(*lines, strict=False) if one != other]
    is_same = lines[0] == lines[1]
    yield Check("metrics", is_same, _told(differing, "the same losses, rates and rows", "differ in steps"))
    saved = [folder.checksums(run.adapter if run.adapter.is_dir() else run.merged) for run in (straight, resumed)]
    yield Check("saved", saved[0] == saved[1], "the same files" if saved[0] == saved[1] else "the saved files differ")


def _told(differing: list[int], same: str, other: str) -> str:
    return f"{other} {', '.join(map(str, differing))}" if differing else same


def _lines(run: RunFolder) -> list[dict[str, Any]]:
    lines = folder.read_json_lines(run.metrics)
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def _bytes(run: RunFolder, step: int, file: str) -> bytes:
    return (checkpoint.path_of(run.checkpoints, step) / file).read_bytes()
