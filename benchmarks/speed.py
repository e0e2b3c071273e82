"""Training speed and memory beside peers: interleaved runs of the same rows, each in a process of its own.

    python benchmarks/speed.py                       LoRA in float32 and bfloat16, beside TRL padded and padding-free
    python benchmarks/speed.py --cases full,probe    other cases; all of them take two hours
    python benchmarks/speed.py --cases quick         a few steps of a tiny shape, to see that it works
    python benchmarks/speed.py --cases ""            no runs, only the table of the results so far

Medians of --runs runs; the losses of every side must agree. Wants an idle machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from workload import SHAPES, SUPERVISED, VOCABULARY

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "speed.json"
TRL = ["trl, padded", "trl, padding-free"]
PRODUCTS_SECONDS = 2.0
"""Before and after each of ftune's runs: the rate of this machine changes by the minute."""
SAME_LOSS = {"float32": 1e-5, "bfloat16": 2e-2}
"""How far losses may lie apart, relative."""
CASES: dict[str, list[dict[str, Any]]] = {
    "quick": [{"shape": "tiny", "steps": 3, "peers": ["trl, padding-free"]}],
    "lora": [{"dtype": "float32"}, {"dtype": "bfloat16"}],
    "full": [{"method": "full", "peers": ["trl, padded"]}],
    "prompt": [{"method": "prompt_tuning", "peers": ["trl, padded"]}],
    "probe": [{"method": "linear_probe", "steps": 40, "epochs": 5, "peers": ["naive loop"]}],
    "qlora": [{"quantization": "nf4", "steps": 4}],
    "shapes": [{"shape": "qwen2"}, {"shape": "gpt2"}],
    "equal": [{"length": 180}],
    "alone": [{"dtype": "float32", "peers": []}, {"dtype": "bfloat16", "peers": []}],
    "trainer": [{"peers": ["transformers"]}, {"grouped": True, "peers": ["transformers"]}],
}
"""A case's `peers` are TRL's two ways, if none are given."""


def run(case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", REPOSITORY / "benchmarks" / "sides.py", json.dumps(case)]
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), **os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(case: dict[str, Any], num_runs: int) -> dict[str, Any]:
    """A B C A B C ...: each side's medians, and how often ftune's they are."""
    peers = case.get("peers", TRL)
    asked = {key: value for key, value in case.items() if key != "peers"}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ["ftune", *peers]}
    sizes, dtype = shape_sizes(asked), asked.get("dtype", "float32")
    rates = []
    for number in range(num_runs):
        for side, those in runs.items():
            before = product_rate(sizes, dtype) if side == "ftune" else 0.0
            those.append(run({**asked, "side": side}))
            if side == "ftune":
                rates.append((before + product_rate(sizes, dtype)) / 2)
            print(f"{number + 1} {side}: {those[-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    ours = runs["ftune"][0]
    apart = {side: relative(runs[side][0]["losses"], ours["losses"]) for side in peers}
    limit = SAME_LOSS[ours["dtype"]]
    if too_far := {side: value for side, value in apart.items() if value > limit}:
        raise SystemExit(f"{case}: losses differ, so there is nothing to compare: {too_far}")
    figures = {
        side: {key: median(found[key] for found in those) for key in ("tokens_per_second", "peak_bytes")}
        for side, those in runs.items()
    }
    speed, not_asked = figures["ftune"]["tokens_per_second"], {*figures["ftune"], "side", "losses", "tokens"}
    share = {
        way: median(one["tokens_per_second"] * cost / rate for one, rate in zip(runs["ftune"], rates, strict=True))
        for way, cost in operations_of(ours).items()
    }
    return {
        "case": {key: value for key, value in ours.items() if key not in not_asked},
        "runs": num_runs,
        "figures": figures,
        "losses_apart": apart,
        "speed": {side: speed / figures[side]["tokens_per_second"] for side in peers},
        "memory": {side: figures[side]["peak_bytes"] / figures["ftune"]["peak_bytes"] for side in peers},
        "share": share if ours["epochs"] == 1 else None,
    }


def relative(theirs: list[float], ours: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(theirs, ours, strict=True))


def operations_of(case: dict[str, Any]) -> dict[str, float]:
    """What a token costs at least in matrix products, in operations.

    "weights", the usual estimate: 4 for each weight with adapters, 6 in full fine-tuning.
    "products", what is really multiplied: no embedding, and the vocabulary for the supervised quarter of the tokens.
    """
    shape = SHAPES[case["shape"]]
    width, inner = shape_sizes(case)
    layers = case["layers"] or shape.get("num_hidden_layers") or shape["n_layer"]
    heads = shape.get("num_attention_heads") or shape["n_head"]
    shared = shape.get("num_key_value_heads", heads) / heads
    matrices = 2 if case["shape"] == "gpt2" else 3
    body = layers * (width * width * (2 + 2 * shared) + matrices * width * inner)
    vocabulary = width * shape.get("vocab_size", VOCABULARY)
    passes = 6 if case["method"] == "full" else 4
    return {"weights": passes * (body + vocabulary), "products": passes * (body + vocabulary / SUPERVISED)}


def shape_sizes(case: dict[str, Any]) -> tuple[int, int]:
    """The width of the states, and that inside the MLP."""
    shape = SHAPES[case.get("shape", "llama")]
    return shape.get("hidden_size") or shape["n_embd"], shape.get("intermediate_size") or shape["n_inner"]


def product_rate(sizes: tuple[int, int], dtype: str, tokens: int = 1440) -> float:
    """Operations a second of one matrix product of this size, repeated for PRODUCTS_SECONDS."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    width, inner = sizes
    a, b = (torch.randn(size, width, dtype=getattr(torch, dtype)) for size in (tokens, inner))
    torch.nn.functional.linear(a, b)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + PRODUCTS_SECONDS:
        torch.nn.functional.linear(a, b)
        count += 1
    return 2 * tokens * width * inner * count / (time.perf_counter() - began)


def versions() -> dict[str, str]:
    import peft
    import transformers
    import trl

    capabilities = torch.cpu.get_capabilities()
    modules = {"torch": torch, "transformers": transformers, "trl": trl, "peft": peft}
    machine = {
        "machine": platform.machine(),
        "processor": str(capabilities["cpu_name"]),
        "cores": str(os.cpu_count()),
        "instructions": ", ".join(name for name in ("avx2", "avx512_bf16", "amx_bf16") if capabilities[name]),
    }
    return machine | {name: str(module.__version__) for name, module in modules.items()}


def table(results: list[dict[str, Any]]) -> str:
    """A row for each pair of sides."""
    lines = [
        "| case | peer | ftune tokens/s | the peer's | ratio | ftune MB | the peer's | ratio | of its products (4N) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for found in results:
        ours = found["figures"]["ftune"]
        share = f"{found['share']['products']:.0%} ({found['share']['weights']:.0%})" if found["share"] else ""
        if not found["speed"]:
            peak = f"{ours['peak_bytes'] / 1e6:,.0f}"
            lines.append(
                f"| {name_of(found['case'])} | | {ours['tokens_per_second']:,.0f} | | | {peak} | | | {share} |"
            )
        for peer, ratio in found["speed"].items():
            theirs = found["figures"][peer]
            lines.append(
                f"| {name_of(found['case'])} | {peer} | {ours['tokens_per_second']:,.0f} "
                f"| {theirs['tokens_per_second']:,.0f} | **{ratio:.2f}** | {ours['peak_bytes'] / 1e6:,.0f} "
                f"| {theirs['peak_bytes'] / 1e6:,.0f} | **{found['memory'][peer]:.2f}** | {share} |"
            )
    return "\n".join(lines)


def name_of(case: dict[str, Any]) -> str:
    name = ", ".join(str(case[key]) for key in ("shape", "method", "dtype"))
    name += f", {case['quantization']}" if case["quantization"] != "none" else ""
    name += f", {case['epochs']} epochs" if case["epochs"] > 1 else ""
    name += f", {case['length']} tokens each" if case["length"] else ""
    return name + (", grouped by length" if case["grouped"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="lora", help=f"of {', '.join(CASES)}; several with commas between")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = json.loads(options.results.read_text()) if options.results.is_file() else {"versions": {}, "results": []}
    for name in filter(None, options.cases.split(",")):
        for case in CASES[name]:
            found = compare(case, options.runs)
            same = [found["case"], list(found["speed"])]
            known["results"] = [r for r in known["results"] if [r["case"], list(r["speed"])] != same] + [found]
            known["versions"] = versions()
            options.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(table(known["results"]))


if __name__ == "__main__":
    main()
