"""Kill a whole run at every file operation, resume it, and compare what it ends with; likewise SIGTERM and a full disk.

Loading, training with an evaluation on the way, adapter, merged model, measuring, report: all are under way somewhere.
Each run is forked from this process, which has imported everything. `kill_points.py EVERY` takes every so manieth.
"""

import os
import shutil
import sys
import tempfile
import time
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
    make_run,
    operations_of,
    train_run,
    whole_outcome,
)


def main(every: int) -> int:
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="ftune-kills-"))
    settings, log = make_run(place), place / "run.log"
    run = settings.output.dir
    train_run(settings)
    clean = whole_outcome(run)
    shutil.rmtree(run)
    names = operations_of(lambda: train_run(settings), run, place / "operations.log")
    print(f"{len(names)} file operations in a run; taking each {every}.", flush=True)
    failures: list[str] = []
    for how in (KILLED, STOPPED, FULL):
        points = range(1, len(names) + 1, every)
        for number in points:
            try:
                check_ended(settings, Operations(run, number, how), clean, log, f"{number}, {names[number - 1]}")
            except AssertionError as error:
                failures.append(f"{how} at {error}")
        print(f"{how}: {len(points)} points, {len(failures)} failures, {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(failures) or "every resumed run ended with the bytes of the clean one")
    shutil.rmtree(place)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
