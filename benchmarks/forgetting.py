"""What the evidence says on the quickstart: LoRA at its default rate, full fine-tuning at ten times its own, the step
that `select: best` keeps, and an adapter at several strengths.

    python benchmarks/forgetting.py --jobs 2

Each is an `ftune` process of its own. Written to benchmarks/results/forgetting.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "forgetting.json"
RECIPES = REPOSITORY / "recipes"
TOO_FAST = 10
"""How many times its default rate full fine-tuning gets."""
LIMIT = 0.1
"""Of the gate that `last` fails and `best` meets."""
STRENGTHS = "0,0.25,0.5,0.75,1"
WATCHED = [
    f"data.train={RECIPES / 'quickstart' / 'train.jsonl'}",
    "data.validation=0.05",
    "training.epochs=null",
    "training.max_steps=60",
    "training.warmup=0.5",
    "training.evaluate_every=5",
    f"gates.max_forgetting={LIMIT}",
    "gates.min_score=null",
]
"""Nothing is rehearsed, so everything will be forgotten; watched from the first steps on. (With its rehearsal, the
recipe's last step is also the one that forgets least.)"""


def ftune(*arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of a command; 0 and 1 are results."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ftune", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    return done.returncode, json.loads(done.stdout)


def train(recipe: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """What a run's report says, in short."""
    chosen = [f"output.dir={folder}", "evaluation.few_shot=0", "evaluation.review=0", *overrides]
    code, report = ftune("train", str(RECIPES / recipe), *chosen)
    suites = report["forgetting"]["suites"]
    return {
        "exit_code": code,
        "score": report["task"]["tuned"],
        "worst_drop": report["forgetting"]["worst_drop"],
        "forgot": [suite["name"] for suite in suites if suite["verdict"] == "forgot"],
        "suites": len(suites),
        "general_loss": report["forgetting"]["general_loss"],
        "failed_gates": [gate["name"] for gate in report["gates"] if not gate["passed"]],
        "selection": report["selection"],
        "path": report["path"],
        "seconds": report["cost"]["seconds"],
    }


def default_rate(method: str) -> float:
    from ftune import recipe as recipes
    from ftune.run.inputs import resolve

    rate = resolve(recipes.load(RECIPES / "quickstart.yaml", [f"method={{name: {method}}}"])).training.learning_rate
    assert rate is not None
    return rate


def lora(folder: Path) -> dict[str, Any]:
    found = train("quickstart.yaml", folder / "lora")
    _, report = ftune("eval", str(folder / "lora"), "--strengths", STRENGTHS)
    return {**found, "strengths": report["strengths"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="those whose name holds this; the others' results stay")
    options = parser.parse_args()
    fast = f"training.learning_rate={TOO_FAST * default_rate('full')}"
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name)
        full = ("quickstart.yaml", folder / "fast", "method={name: full}", fast, "gates.min_score=null")
        wanted: dict[str, tuple[Any, ...]] = {"lora": (lora, folder), "full, ten times its rate": (train, *full)}
        for select in ("last", "best"):
            watched = ("quickstart.yaml", folder / select, *WATCHED, f"training.select={select}")
            wanted[f"watched, {select}"] = (train, *watched)
        waiting = {name: pool.submit(*call) for name, call in wanted.items() if options.only in name}
        found = json.loads(RESULTS.read_text()) if options.only else {}
        found |= {name: future.result() for name, future in waiting.items()}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name, one in found.items():
        told = f"forgot {len(one['forgot'])} of {one['suites']}, worst drop {one['worst_drop']:.3f}"
        print(f"{name}: exit {one['exit_code']}, score {one['score']:.3f}, {told}, {one['selection']['reason']}")
    for row in found["lora"]["strengths"]:
        print(row)


if __name__ == "__main__":
    main()
