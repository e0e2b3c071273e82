"""One of several processes that train one recipe after another: `torchrun ... several.py RECIPE OUT JOB...`.

Each job is a list of overrides in JSON, with `resume`, `stop` (after how many steps) and `fail` (a step that a process
fails in) besides. OUT gets, for each process, what became of every job.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ftune import recipe, train
from ftune.engine import Engine
from ftune.errors import FtuneError
from ftune.run import training

close = Engine.close
Engine.close = lambda self: None  # type: ignore[method-assign]
rank = int(os.environ["RANK"])


def stopping(after: int) -> Any:
    """The loop, with a signal in the second process after so many steps."""

    def steps(*arguments: Any) -> Any:
        for step in train_as_it_is(*arguments):
            if step.step == after and rank == 1:
                os.kill(os.getpid(), 15)
            yield step

    return steps


train_as_it_is = train.train


def do(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    train.train = stopping(job["stop"]) if "stop" in job else train_as_it_is
    try:
        report = training.train_run(recipe.load(path, job["overrides"]), resume=job.get("resume", False))
    except FtuneError as error:
        return {"exit_code": int(error.exit_code), "error": str(error)}
    return {"exit_code": 0, "verdict": report and report["verdict"]}


def main(path: str, out: str, *jobs: str) -> None:
    found = [do(Path(path), json.loads(job)) for job in jobs]
    Path(f"{out}-{rank}.json").write_text(json.dumps(found))
    close(Engine())


if __name__ == "__main__":
    main(*sys.argv[1:])
