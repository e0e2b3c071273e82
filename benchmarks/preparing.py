"""Rows -> examples: rows a second and peak memory of ftune, and of datasets with TRL's SFTTrainer on the same rows.

    python benchmarks/preparing.py                    both, 50,000 rows each, then ftune alone on 1,000,000
    python benchmarks/preparing.py --rows 10000 --many 0

ftune's seconds are those of preparing rows, as TRL's are; duplicates, contamination (2,000 items) and the order of an
epoch are timed apart, and the peak of memory is that of all. Rows are conversations of one turn, about 60 words, in the
form that both read (prompt and completion as messages). Each measurement is a process of its own, with its children;
memory is their proportional set size, sampled. Written to benchmarks/results/preparing.json.
Needs a tokenizer with a chat template: $FTUNE_REAL_DATA/models/qwen2.5-tokenizer.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "preparing.json"
WORDS = [
    "time",
    "way",
    "year",
    "work",
    "day",
    "part",
    "number",
    "people",
    "world",
    "place",
    "house",
    "water",
    "night",
    "mind",
    "state",
    "book",
    "eye",
    "hand",
    "word",
    "case",
]
SAMPLED_EVERY = 0.5
"""Seconds between two looks at memory."""

OURS = """
import json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from ftune import batches, data
from ftune.clean import Item
from ftune.recipe import DataSection
from ftune.run.cleaning import clean_rows
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
began = time.perf_counter()
dataset = data.load(tokenizer, [data.Source(Path(sys.argv[1]))], data.Rules(max_length=1024), None)
prepared = time.perf_counter()
items = [Item(f"held:{i}", f"What is the colour of the house with the number {i} in the long street?", f"{i}")
         for i in range(2000)]
cleaned = clean_rows(dataset, DataSection(train=Path(sys.argv[1])), items, 0).train
clean = time.perf_counter()
lengths, mixture = cleaned.examples.lengths, cleaned.mixture
steps = len(mixture) // 64
tokens = sum(int(lengths[batches.step_indices(step + 1, mixture, 64, 0)].sum()) for step in range(steps))
for step in range(200):
    chosen = [cleaned.examples[i] for i in batches.step_indices(step + 1, mixture, 64, 0)]
    packed = list(batches.micro_batches(chosen, 4096))
print(json.dumps({"seconds": prepared - began, "rows": len(dataset), "tokens": int(dataset.examples.lengths.sum()),
                  "supervised": dataset.audit.supervised_tokens, "cleaning_seconds": clean - prepared,
                  "ordering_seconds": time.perf_counter() - clean, "rows_after_cleaning": len(cleaned)}))
"""
THEIRS = """
import json, os, sys, time
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                     vocab_size=len(tokenizer))
model = LlamaForCausalLM(config)
began = time.perf_counter()
rows = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
settings = SFTConfig(output_dir=sys.argv[3] + "/out", max_length=1024, packing=False, report_to=[], use_cpu=True,
                     dataset_num_proc=os.cpu_count(), completion_only_loss=True, bf16=False)
trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
seconds = time.perf_counter() - began
made = trainer.train_dataset
first = made[0]
print(json.dumps({"seconds": seconds, "rows": len(made), "tokens": sum(map(len, made["input_ids"])),
                  "supervised": sum(map(sum, made["completion_mask"])) if "completion_mask" in first else None}))
"""


def write_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            asked = " ".join(rng.choices(WORDS, k=rng.randint(10, 40)))
            told = " ".join(rng.choices(WORDS, k=rng.randint(10, 60)))
            row = {
                "prompt": [{"role": "user", "content": f"{i}: {asked}?"}],
                "completion": [{"role": "assistant", "content": f"{told}."}],
            }
            file.write(json.dumps(row) + "\n")


def memory_of(process: psutil.Process) -> int:
    """Bytes of a process and its children; shared pages are split among those who share them."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure(code: str, rows: Path, tokenizer: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "FTUNE_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", code, str(rows), str(tokenizer), cache]
        peak = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as started:
            process = psutil.Process(started.pid)
            while started.poll() is None:
                try:
                    peak = max(peak, memory_of(process))
                except psutil.Error:
                    break
                time.sleep(SAMPLED_EVERY)
            assert started.stdout is not None
            told = started.stdout.read()
        if started.returncode:
            raise SystemExit(f"failed with {started.returncode}")
    found: dict[str, Any] = json.loads(told.strip().splitlines()[-1])
    return {**found, "rows_per_second": found["rows"] / found["seconds"], "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--many", type=int, default=1_000_000)
    options = parser.parse_args()
    tokenizer = Path(os.environ["FTUNE_REAL_DATA"], "models", "qwen2.5-tokenizer")
    found: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_rows(path, options.rows)
        found["ftune"] = measure(OURS, path, tokenizer)
        found["trl"] = measure(THEIRS, path, tokenizer)
        found["ratio"] = found["ftune"]["rows_per_second"] / found["trl"]["rows_per_second"]
        if options.many:
            write_rows(path, options.many)
            found["ftune, many"] = measure(OURS, path, tokenizer)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
