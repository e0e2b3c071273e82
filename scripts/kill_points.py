"""Kill a whole run at every file operation, resume it, and compare what it ends with; likewise SIGTERM and a full disk.

Loading, training with an evaluation on the way, adapter, merged model, measuring, report: all are under way somewhere.
Then the saves of a run of two processes, DDP and FSDP, the first of which is killed. Each run is forked from this
process, which has imported everything.

    python scripts/kill_points.py --every 10 --only killed ddp
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}

from kill_kit import (  # noqa: E402
    FULL,
    KILLED,
    STOPPED,
    Operations,
    check_ended,
    check_two_ended,
    make_run,
    make_shared_run,
    operations_of,
    saves_of_two,
    train_run,
    whole_outcome,
)

ALONE = {"killed": KILLED, "stopped": STOPPED, "full": FULL}
SHARED = ("ddp", "fsdp")


class Sweep:
    """Points that are tried one after another, and what went wrong."""

    def __init__(self, every: int) -> None:
        self.every, self.began, self.failures = every, time.monotonic(), list[str]()

    def over(self, what: str, points: Sequence[tuple[int, str]], check: Callable[[int, str], None]) -> None:
        before = len(self.failures)
        chosen = points[:: self.every]
        for number, name in chosen:
            try:
                check(number, f"{number}, {name}")
            except AssertionError as error:
                self.failures.append(f"{what} at {error}")
        told = f"{len(chosen)} of {len(points)} points, {len(self.failures) - before} failures"
        print(f"{what}: {told}, {time.monotonic() - self.began:.0f} s", flush=True)

    def whole_run(self, what: str, place: Path) -> None:
        settings, log = make_run(place), place / "run.log"
        run = settings.output.dir
        train_run(settings)
        clean = whole_outcome(run)
        shutil.rmtree(run)
        names = operations_of(lambda: train_run(settings), run, place / "operations.log")

        def check(number: int, told: str) -> None:
            check_ended(settings, Operations(run, number, ALONE[what]), clean, log, told)

        self.over(what, list(enumerate(names, 1)), check)

    def saves(self, what: str, place: Path) -> None:
        settings = make_shared_run(place, what)
        clean, points = saves_of_two(settings, place)
        self.over(what, points, lambda number, told: check_two_ended(settings, number, clean, place / "run.log", told))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every so manieth operation")
    parser.add_argument("--only", nargs="+", choices=[*ALONE, *SHARED], default=[*ALONE, *SHARED])
    options = parser.parse_args()
    sweep = Sweep(options.every)
    with tempfile.TemporaryDirectory(prefix="ftune-kills-") as name:
        for what in options.only:
            (sweep.saves if what in SHARED else sweep.whole_run)(what, Path(name, what))
    print("\n".join(sweep.failures) or "every resumed run ended with the bytes of the clean one")
    return 1 if sweep.failures else 0


if __name__ == "__main__":
    sys.exit(main())
