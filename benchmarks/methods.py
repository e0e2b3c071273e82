"""Every method on the same task: score, forgetting, parameters, time and size, over several seeds.

    python benchmarks/methods.py --seeds 0,1,2                 measures, one `ftune train` a method and seed
    python benchmarks/methods.py --task banking77              the same on another task, see tasks.py
    python benchmarks/methods.py --rates 0.3,1,3 --methods ia3 looks for a method's learning rate
    python benchmarks/methods.py --write                       writes docs/methods.md's tables from the results

Results gather in benchmarks/results/methods.json. A rate is given as a multiple of the method's default. Runs are
processes of one thread; --jobs says how many at once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from tasks import TASKS

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
LAST_STEPS = 25
"""Over how many of the last steps the training loss is averaged."""
PAGE = REPOSITORY / "docs" / "methods.md"
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "linear_probe": {"name": "linear_probe"},
    "lora": {"name": "lora"},
    "lora, rank-stabilized": {"name": "lora", "rank_stabilized": True, "alpha": 8},
    "lora, pissa": {"name": "lora", "init": "pissa", "dropout": 0.0},
    "qlora": {"name": "qlora"},
    "dora": {"name": "dora"},
    "adalora": {"name": "adalora"},
    "vera": {"name": "vera"},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "bottleneck, serial": {"name": "bottleneck"},
    "bottleneck, parallel": {"name": "bottleneck", "placement": "parallel"},
    "prefix_tuning": {"name": "prefix_tuning"},
    "prompt_tuning": {"name": "prompt_tuning"},
    "prompt_tuning, deep": {"name": "prompt_tuning", "depth": "deep"},
}


def measure(variant: str, seed: int, multiple: float, options: argparse.Namespace) -> dict[str, Any]:
    """One run of a variant; a failure is a result, too."""
    found: dict[str, Any] = {"task": options.task, "variant": variant, "seed": seed, "multiple": multiple}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = TASKS[options.task](folder)
        command = [sys.executable, "-m", "ftune", "train", str(recipe), "--json"]
        command += [f"method={json.dumps(VARIANTS[variant])}", f"training.seed={seed}", f"output.dir={folder}/run"]
        command += ["gates.min_score=null", "evaluation.few_shot=0", *options.override]
        if multiple != 1:
            command.append(f"training.learning_rate={default_rate(recipe, command[6:]) * multiple}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FTUNE_CACHE": f"{folder}/cache"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode not in (0, 1):
            return {**found, "error": done.stderr.strip().splitlines()[-3:]}
        return found | figures(json.loads(done.stdout), folder / "run")


def default_rate(recipe: Path, overrides: list[str]) -> float:
    from ftune import recipe as recipes
    from ftune.run.inputs import resolve

    rate = resolve(recipes.load(recipe, overrides)).training.learning_rate
    assert rate is not None
    return rate


def figures(report: dict[str, Any], run: Path) -> dict[str, Any]:
    """What is kept of a run."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    saved = run / "adapter" if (run / "adapter").is_dir() else run / "merged"
    drops = [suite["drop"] for suite in (report["forgetting"] or {}).get("suites") or []]
    return {
        "rate": max(step["learning_rate"] for step in steps if "loss" in step),
        "metric": report["task"]["metric"],
        "score": report["task"]["tuned"],
        "zero_shot": report["task"]["zero_shot"],
        "training_loss": mean(losses[-LAST_STEPS:]),
        "worst_drop": max(drops, default=None),
        "mean_drop": mean(drops) if drops else None,
        "trainable": report["cost"]["trainable_parameters"],
        "seconds": report["cost"]["training_seconds"],
        "bytes": sum(file.stat().st_size for file in saved.glob("*.safetensors")),
        "live": report["artefact"]["adapter_live"],
    }


def table(results: list[dict[str, Any]], task: str) -> str:
    """Markdown: the mean over the seeds at each variant's default rate, the score's range in brackets."""
    lines = [
        "| method | score | worst forgetting | mean forgetting | trainable | seconds | MB on disk |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for variant in VARIANTS:
        runs = [r for r in results if r["variant"] == variant and r["task"] == task and r["multiple"] == 1]
        runs = [r for r in runs if "error" not in r]
        if not runs:
            continue
        scores = [r["score"] for r in runs]
        drops = [[f"{mean(r[key] for r in runs):.2f}" if runs[0][key] is not None else "-"][0] for key in DROPS]
        lines.append(
            f"| {variant} | {mean(scores):.3f} ({min(scores):.2f} to {max(scores):.2f}, n={len(scores)}) | {drops[0]} "
            f"| {drops[1]} | {runs[0]['trainable']:,} | {mean(r['seconds'] for r in runs):.0f} "
            f"| {runs[0]['bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


DROPS = ("worst_drop", "mean_drop")


def options_of_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="quickstart", choices=TASKS)
    parser.add_argument("--methods", help="names with semicolons between; default: all")
    parser.add_argument("--seeds", default="0", help="numbers with commas between")
    parser.add_argument("--rates", default="1", help="multiples of each method's default rate")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, help="where results gather; default: results/methods-TASK.json")
    parser.add_argument("--override", action="append", default=[], help="a recipe override, KEY=VALUE")
    parser.add_argument("--write", action="store_true", help="write the page from the results, measure nothing")
    return parser.parse_args()


def main() -> None:
    options = options_of_command_line()
    options.results = options.results or RESULTS / f"methods-{options.task}.json"
    results = json.loads(options.results.read_text()) if options.results.is_file() else []
    if not options.write:
        names = options.methods.split(";") if options.methods else list(VARIANTS)
        todo = [
            (name, seed, float(multiple))
            for seed in map(int, options.seeds.split(","))
            for multiple in options.rates.split(",")
            for name in names
        ]
        with ThreadPoolExecutor(options.jobs) as pool:
            for found in pool.map(lambda job: measure(*job, options), todo):
                same = ("task", "variant", "seed", "multiple")
                results = [r for r in results if any(r[key] != found[key] for key in same)] + [found]
                print(json.dumps(found), flush=True)
                options.results.parent.mkdir(parents=True, exist_ok=True)
                options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results, options.task))
    if options.write:
        write_page()


def write_page() -> None:
    """The tables of all results, between the page's marks."""
    page = PAGE.read_text(encoding="utf-8")
    start, end = page.index(MARKS[0]) + len(MARKS[0]), page.index(MARKS[1])
    parts = []
    for task in TASKS:
        file = RESULTS / f"methods-{task}.json"
        if file.is_file():
            parts.append(f"\n### {task}\n\n{table(json.loads(file.read_text()), task)}\n")
    PAGE.write_text(page[:start] + "\n" + "".join(parts) + "\n" + page[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
