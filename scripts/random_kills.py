"""Kills a run at random moments with SIGKILL, SIGTERM and SIGINT, resumes it, and compares every byte with a run that
was left alone: adapter, merged model, the lines of every step, the numbers of the report.

    python scripts/random_kills.py 100 --seed 1

The run is made of the quickstart's model and a few of its rows; it tokenizes, loads, trains, evaluates on the way,
saves, merges and measures. A kill may hit the resumed run again. Exit code 1 if any of them ends otherwise.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kill_kit import whole_outcome  # noqa: E402

QUICKSTART = ROOT / "recipes" / "quickstart"
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
"""The exit code that each must end in, where it hits a living run."""
AGAIN = 0.3
"""How often the resumed run is killed, too."""
EARLIEST = 0.1
"""Of the clean run's time: before, Python itself may not have begun, and ends as it does."""


def write_recipe(folder: Path, steps: int) -> Path:
    for name, count in (("train", 96), ("test", 6), ("probe", 8)):
        lines = (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    recipe = {
        "model": str(QUICKSTART / "base"),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": "train.jsonl", "validation": 0.1, "test": "test.jsonl"},
        # A signal leaves a checkpoint of its own step: of several that are kept in the end, that may be one.
        "training": {
            "max_steps": steps,
            "batch_size": 8,
            "evaluate_every": 5,
            "checkpoint_every": 3,
            "keep_checkpoints": 1,
        },
        "evaluation": {"max_new_tokens": 4, "few_shot": 0, "review": 0, "probe": "probe.jsonl"},
        "output": {"save": "both"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def start(recipe: Path, run: Path) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if run.exists() else []
    command = [sys.executable, "-m", "ftune", "train", str(recipe), f"output.dir={run}", *resume]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FTUNE_CACHE": str(run.parent / "cache")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def finish(recipe: Path, run: Path) -> str:
    """Run to the end; what went wrong, or nothing."""
    process = start(recipe, run)
    _, said = process.communicate()
    text = said.decode(errors="replace")
    if process.returncode not in (0, 1):
        return f"exit code {process.returncode}: {text[-500:]}"
    return "a traceback" if "Traceback" in text else ""


def phase(run: Path) -> str:
    """What the run was about when it was hit, as its folder tells."""
    if not (run / "recipe.yaml").is_file():
        return "reading, loading"
    if not (run / "checkpoints").is_dir():
        return "first steps"
    if not (run / "adapter").is_dir():
        return "training, evaluating"
    return "measuring" if (run / "merged").is_dir() else "saving, merging"


def kill(recipe: Path, run: Path, moment: float, number: signal.Signals) -> tuple[str, str]:
    """Start, wait, kill: the phase that was hit, and what went wrong or nothing."""
    process = start(recipe, run)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        hit = phase(run)
        process.send_signal(number)
        _, said = process.communicate()
        # A run that had ended anyway, in the very moment, ends as it does.
        wrong = process.returncode not in (SIGNALS[number], 0, 1)
        told = f"{number.name}: exit code {process.returncode}: {said.decode(errors='replace')[-500:]}" if wrong else ""
        return hit, told or ("a traceback" if b"Traceback" in said else "")
    process.communicate()
    return "it had ended", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    hits, wrong, done = Counter[tuple[str, str]](), list[str](), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(folder, options.steps)
        began = time.monotonic()
        if told := finish(recipe, folder / "clean" / "run"):
            raise SystemExit(f"the clean run ended with {told}")
        seconds = time.monotonic() - began
        clean = whole_outcome(folder / "clean" / "run")
        print(f"the clean run took {seconds:.1f} s", flush=True)
        number = 0
        while done < options.kills:
            number += 1
            run = folder / f"run-{number}" / "run"
            problems = []
            while True:
                sent = rng.choice(list(SIGNALS))
                hit, told = kill(recipe, run, rng.uniform(EARLIEST, 1.0) * seconds, sent)
                hits[(sent.name, hit)] += 1
                done += 1
                problems += [told] if told else []
                if rng.random() > AGAIN or done >= options.kills:
                    break
            told = finish(recipe, run)
            found = {} if told else whole_outcome(run)
            problems += [told] if told else [f"{key} differs" for key in clean if clean[key] != found.get(key)]
            wrong += [f"run {number}: {problem}" for problem in problems]
            print(f"{done}/{options.kills} kills, {len(wrong)} problems", flush=True)
    for (sent_name, hit), count in sorted(hits.items()):
        print(f"{sent_name:8} {hit:22} {count}")
    print(*wrong, sep="\n")
    print(
        f"{done} kills, {number} runs: "
        + (f"{len(wrong)} problems" if wrong else "every one ends with the bytes of the clean run")
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
