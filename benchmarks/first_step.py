"""From the command to the end of the first optimizer step: `ftune train` and TRL's SFTTrainer on the same recipe.

    python benchmarks/first_step.py --runs 5

The quickstart's model and 4,000 training rows, LoRA, batch 8, interleaved. ftune audits, proves its masks and its
packing on the way, with an empty cache and with the one it left; TRL gets prompts and completions, and masks those.
Written to benchmarks/results/first_step.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "first_step.json"
QUICKSTART = REPOSITORY / "recipes" / "quickstart"
SIDES = ["ftune", "ftune, cached", "trl"]


def pairs(path: Path) -> list[dict[str, Any]]:
    """The rows as TRL reads prompts and completions."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows]


def trl(folder: str) -> None:
    """Train one step, and tell that it is done."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Told(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            print("step", flush=True)
            os._exit(0)

    arguments = SFTConfig(
        output_dir=folder, per_device_train_batch_size=8, max_steps=1, max_length=512, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    data = load_dataset("json", data_files=f"{folder}/train.jsonl", split="train", cache_dir=f"{folder}/cache")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(str(QUICKSTART / "base"), arguments, train_dataset=data, peft_config=lora)
    trainer.add_callback(Told())
    trainer.train()


def seconds(command: list[Any], environment: dict[str, str], is_done: Any) -> float:
    """Until it is done; then the process is killed."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    while not is_done(process):
        if process.poll():
            raise SystemExit(f"{command} failed")
        time.sleep(0.01)
    took = time.perf_counter() - began
    process.kill()
    process.wait()
    return took


def measure(side: str, place: Path, cache: Path) -> float:
    place.mkdir()
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1", "FTUNE_CACHE": str(cache)}
    if side == "trl":
        text = "".join(json.dumps(row) + "\n" for row in pairs(QUICKSTART / "train.jsonl"))
        (place / "train.jsonl").write_text(text, encoding="utf-8")
        command = [sys.executable, "-W", "ignore", __file__, "--train-with-trl", place]
        return seconds(command, environment, lambda process: process.stdout.readline() == b"step\n")
    metrics = place / "run" / "metrics.jsonl"
    recipe = REPOSITORY / "recipes" / "quickstart.yaml"
    chosen = [f"data.train={QUICKSTART / 'train.jsonl'}", f"output.dir={place / 'run'}", "training.epochs=1"]
    command = [sys.executable, "-m", "ftune", "train", recipe, *chosen]
    return seconds(command, environment, lambda process: metrics.exists() and b"\n" in metrics.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--train-with-trl", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_with_trl:
        return trl(options.train_with_trl)
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.runs):
            for side in SIDES:
                cache = Path(name, f"cache-{number}")  # the second of ftune's finds what the first left
                taken[side].append(measure(side, Path(name, f"{side}-{number}"), cache))
                print(f"{number + 1} {side}: {taken[side][-1]:.1f} s", file=sys.stderr, flush=True)
    found = {side: median(times) for side, times in taken.items()}
    ratios = {side: found[side] / found["trl"] for side in SIDES[:2]}
    RESULTS.write_text(json.dumps({"runs": options.runs, "seconds": found, "of_trl": ratios}, indent=1) + "\n")
    for side in SIDES:
        print(f"{side}: {found[side]:.1f} s, {found[side] / found['trl']:.2f} of TRL's")


if __name__ == "__main__":
    main()
