"""From the command to the end of the first optimizer step: `ftune train` and TRL's SFTTrainer on the same recipe.

    python benchmarks/first_step.py --runs 5

LoRA of rank 16, batch 8, interleaved, on two tasks: 512 chat rows with the lengths of `workload.py` on its Llama, and
the quickstart's 4,000 short rows on its small model. ftune audits, proves its masks and its packing on the way and
reads a probe, with an empty cache and with the one it left; TRL gets prompts and completions, and masks those.
Written to benchmarks/results/first_step.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "first_step.json"
QUICKSTART = REPOSITORY / "recipes" / "quickstart"
TASKS = ["workload", "quickstart"]
SIDES = ["ftune", "ftune, cached", "trl"]
ROWS = 512


def make_task(task: str, folder: Path) -> None:
    """`base`, `train.jsonl` and `recipe.yaml`, in a folder."""
    folder.mkdir()
    base, rows = QUICKSTART / "base", (QUICKSTART / "train.jsonl").read_text(encoding="utf-8")
    if task == "workload":
        base, rows = folder / "base", "".join(chat_rows(rows.splitlines()))
        save_base(base)
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    recipe = {
        "model": str(base), "data": {"train": "train.jsonl", "max_length": 1024},
        "method": {"name": "lora", "rank": 16, "alpha": 32}, "training": {"batch_size": 8, "epochs": 1},
    }  # fmt: skip
    if task == "quickstart":
        recipe["evaluation"] = {"probe": str(QUICKSTART / "probe.jsonl")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def save_base(path: Path) -> None:
    """The workload's Llama, under the quickstart's tokenizer."""
    import torch
    from transformers import AutoTokenizer
    from workload import model_of

    model_of("llama", torch.float32).save_pretrained(path)
    AutoTokenizer.from_pretrained(QUICKSTART / "base").save_pretrained(path)


def chat_rows(lines: list[str]) -> Iterator[str]:
    """As long as the workload's rows, one token in four in the answer, of the words of other rows."""
    from transformers import AutoTokenizer
    from workload import SUPERVISED, rows_of

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    words = cycle(
        word for line in lines for message in json.loads(line)["messages"] for word in message["content"].split()
    )

    def text(tokens: int) -> str:
        found, count = list[str](), 0
        while count < tokens:
            found.append(next(words))
            count += len(tokenizer(" " + found[-1], add_special_tokens=False)["input_ids"])
        return " ".join(found)

    for row in rows_of(ROWS, 100):
        answer = len(row.input_ids) // SUPERVISED
        turns = [("user", text(len(row.input_ids) - answer)), ("assistant", text(answer))]
        yield json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


def pairs(path: Path) -> list[dict[str, Any]]:
    """The rows as TRL reads prompts and completions."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows]


def trl(folder: str, base: str) -> None:
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
        output_dir=folder, per_device_train_batch_size=8, max_steps=1, max_length=1024, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    data = load_dataset("json", data_files=f"{folder}/train.jsonl", split="train", cache_dir=f"{folder}/cache")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(base, arguments, train_dataset=data, peft_config=lora)
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


def measure(side: str, task: Path, place: Path, cache: Path) -> float:
    place.mkdir()
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1", "FTUNE_CACHE": str(cache)}
    if side == "trl":
        text = "".join(json.dumps(row) + "\n" for row in pairs(task / "train.jsonl"))
        (place / "train.jsonl").write_text(text, encoding="utf-8")
        base = yaml.safe_load((task / "recipe.yaml").read_text(encoding="utf-8"))["model"]
        command = [sys.executable, "-W", "ignore", __file__, "--train-with-trl", place, base]
        return seconds(command, environment, lambda process: process.stdout.readline() == b"step\n")
    metrics = place / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "ftune", "train", task / "recipe.yaml", f"output.dir={place / 'run'}"]
    return seconds(command, environment, lambda process: metrics.exists() and b"\n" in metrics.read_bytes())


def compare(task: str, num_runs: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_task(task, folder / "task")
        for number in range(num_runs):
            for side in SIDES:
                cache = folder / f"cache-{number}"  # the second of ftune's finds what the first left
                taken[side].append(measure(side, folder / "task", folder / f"{side}-{number}", cache))
                print(f"{task} {number + 1} {side}: {taken[side][-1]:.1f} s", file=sys.stderr, flush=True)
    found = {side: median(times) for side, times in taken.items()}
    return {"runs": num_runs, "seconds": found, "of_trl": {side: found[side] / found["trl"] for side in SIDES[:2]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--train-with-trl", nargs=2, metavar=("FOLDER", "BASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_with_trl:
        return trl(*options.train_with_trl)
    found = {task: compare(task, options.runs) for task in TASKS}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for task, figures in found.items():
        for side, ratio in figures["of_trl"].items():
            print(f"{task}, {side}: {figures['seconds'][side]:.1f} s, TRL {figures['seconds']['trl']:.1f}: {ratio:.2f}")


if __name__ == "__main__":
    main()
