"""How long ftune takes to answer: wall and CPU seconds, the best of 5 runs, of what should feel instant.

Three answers without torch: the help, the recipe's JSON Schema and a misspelt key. Each is a process of its own,
as a user starts it; a first run that is not counted fills Python's cache of bytecode. CPU seconds are those of
user and system together, and hold on a busy machine too; wall seconds want an idle one.

    python benchmarks/start_up.py --output start_up.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

ROOT = Path(__file__).parent.parent
NUM_RUNS = 5
QUESTIONS = {
    "help": (["--help"], 0),
    "schema": (["schema"], 0),
    "misspelt_key": (["check", "recipes/quickstart.yaml", "training.learning_rat=1"], 2),
}


def measure(arguments: list[str], exit_code: int) -> tuple[float, float]:
    """Wall and CPU seconds of one run; one that ends with another exit code measures nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, started = getrusage(RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ftune", *arguments], cwd=ROOT, env=environment, capture_output=True, check=False
    )
    wall, after = time.perf_counter() - started, getrusage(RUSAGE_CHILDREN)
    assert done.returncode == exit_code, done.stderr.decode()
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a file to write the figures to as well")
    output = parser.parse_args().output
    figures = {}
    for name, (arguments, exit_code) in QUESTIONS.items():
        measure(arguments, exit_code)
        runs = [measure(arguments, exit_code) for _ in range(NUM_RUNS)]
        wall, cpu = (round(min(seconds), 3) for seconds in zip(*runs, strict=True))
        figures[name] = {"wall_seconds": wall, "cpu_seconds": cpu}
    text = json.dumps(figures, indent=2)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
