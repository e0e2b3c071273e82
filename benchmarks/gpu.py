"""Everything that only a GPU can answer, in one call of under ten minutes: random weights in real shapes, no download.

    python benchmarks/gpu.py                 writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --reduced       the same on tiny shapes and whatever device there is, in a minute

LoRA and QLoRA on an 8B Llama 3.1, full fine-tuning of a 1B Llama 3.2, QLoRA on a 70B Llama 3.1 in 48 GB, each beside
transformers + PEFT on the same rows, padded, where that fits; the loss head alone beside its bare matrix products; and
attention alone, row by row and by each kernel for packed rows.
Each runs in a process of its own (all in one if reduced); what does not fit, or no longer into the time, is told so.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import sides
import torch
from sides import Timer
from torch import nn
from workload import ALPHA, LEARNING_RATE, RANK, Row, rows_of, start

from ftune import attention_on_gpu as on_gpu

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu.json"
MEAN_LENGTH = 180
LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "8B": LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1B": LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"tie_word_embeddings": True},
    "70B": LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
REDUCED = {
    "vocab_size": 512, "max_position_embeddings": 1024, "num_key_value_heads": 2, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    shape: str
    method: str
    tokens: int
    """About as many in a step."""
    quantization: str = "none"
    limit_gb: int | None = None
    has_peer: bool = True
    steps: int = 4
    """The first is not timed."""
    is_reduced: bool = False

    @property
    def name(self) -> str:
        limit = f", {self.limit_gb} GB" if self.limit_gb else ""
        return f"{self.shape}, {self.method}, {self.quantization}, {self.tokens} tokens a step{limit}"


CASES = [
    Case("8B", "lora", 2048),
    Case("8B", "lora", 8192),
    Case("8B", "qlora", 2048, "nf4"),
    Case("8B", "qlora", 8192, "nf4"),
    Case("1B", "full", 8192),
    Case("70B", "qlora", 2048, "nf4", limit_gb=48, has_peer=False),
]
HEADS = [128256, 151936]
"""Vocabularies of Llama 3 and Qwen 2.5."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shape_of(case: Case) -> dict[str, Any]:
    return {**SHAPES[case.shape], **(REDUCED if case.is_reduced else {})}


@torch.no_grad()
def build(case: Case) -> Any:
    """The shape with random weights on the device, a layer at a time, quantized as it comes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.float32 if case.method == "full" or device().type == "cpu" else torch.bfloat16
    config = AutoConfig.for_model("llama", **shape_of(case), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and case.quantization != "none" and module is not head:
            model.set_submodule(path, quantized_layer(module, case.quantization, dtype))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.ones(parameter.shape, dtype=dtype, device=device())
            if parameter.dim() > 1:
                values.normal_(0, 0.02)
            setattr(module, name, nn.Parameter(values))
    model.tie_weights()
    with device():
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if case.quantization != "none":
        from ftune import quantized
        from ftune.recipe import ModelSection

        quantized.settle(model, ModelSection(base=REPOSITORY, quantization=case.quantization), dtype)
    return model


def quantized_layer(plain: nn.Linear, quantization: str, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    values = torch.randn(plain.weight.shape, dtype=torch.bfloat16, device=device()) * 0.02
    layer = Linear4bit(
        plain.in_features, plain.out_features, bias=False, compute_dtype=dtype, compress_statistics=True,
        quant_type=quantization, device="meta",
    )  # fmt: skip
    layer.weight = Params4bit(values, requires_grad=False, quant_type=quantization, compress_statistics=True).to(
        device()
    )
    return layer


def rows_per_step(case: Case) -> int:
    return max(2, case.tokens // MEAN_LENGTH)


def as_side(case: Case) -> sides.Case:
    return sides.Case("ftune", method=case.method, steps=case.steps, batch_size=rows_per_step(case))


def ours(case: Case, model: Any, rows: list[Row], timer: Timer) -> None:
    sides.train_ours(
        as_side(case), model, rows, timer, learning_rate=LEARNING_RATE / 100, micro_batch_tokens=2 * case.tokens
    )


def peer(case: Case, model: Any, rows: list[Row], timer: Timer) -> None:
    """transformers' model, PEFT's layers, padded batches, AdamW: a plain loop."""
    from peft import LoraConfig, get_peft_model

    if case.method == "full":
        model.requires_grad_(True)
    else:
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
        model = get_peft_model(model, lora)
        model.enable_input_require_grads()
    start(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE / 100, weight_decay=0.0)
    for batch in batches_of(case, rows):
        longest = max(len(row.input_ids) for row in batch)
        ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in batch], device=device())
        labels = torch.tensor([row.labels + [-100] * (longest - len(row.labels)) for row in batch], device=device())
        loss = model(input_ids=ids, attention_mask=ids != 0, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        timer.step(loss.item())


def batches_of(case: Case, rows: list[Row]) -> list[list[Row]]:
    """The rows of each step, in the order in which ftune takes them."""
    size, order = rows_per_step(case), sides.order(as_side(case), len(rows))
    return [[rows[i] for i in order[begin : begin + size]] for begin in range(0, len(order), size)]


def measure(case: Case, side: str) -> dict[str, Any]:
    """One side of a case, in this process."""
    on_gpu = device().type == "cuda"
    if case.limit_gb and on_gpu:
        whole = torch.cuda.get_device_properties(device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.limit_gb * 2**30 / whole))
    rows = rows_of(case.steps * rows_per_step(case), shape_of(case)["vocab_size"])
    model = build(case)
    weights = sum(p.numel() for p in model.parameters()) if case.quantization == "none" else weights_of(case)
    timer = Timer()
    if case.shape != "1B":
        model.activation_checkpointing_enable({"use_reentrant": False})
    {"ftune": ours, "peer": peer}[side](case, model, rows, timer)
    tokens = sum(len(row.input_ids) for batch in batches_of(case, rows)[1:] for row in batch)
    speed = tokens / (timer.ends[-1] - timer.ends[0])
    passes = 6 if case.method == "full" else 4
    dtype = torch.float32 if case.method == "full" or not on_gpu else torch.bfloat16
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    share = speed * passes * weights / product_rate(dtype, case.is_reduced)
    return {"tokens_per_second": speed, "peak_bytes": peak, "share_of_products": share, "losses": timer.losses}


def weights_of(case: Case) -> int:
    """How many weights the shape has, quantized or not."""
    shape = shape_of(case)
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    shared = shape["num_key_value_heads"] / shape["num_attention_heads"]
    return int(layers * (width * width * (2 + 2 * shared) + 3 * width * inner) + 2 * width * shape["vocab_size"])


def seconds_of(function: Any, times: int = 20) -> float:
    """The median of calls, each waited for."""
    taken = []
    for _ in range(times + 2):
        began = time.perf_counter()
        function()
        if device().type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return median(taken[2:])


def product_rate(dtype: torch.dtype, is_reduced: bool) -> float:
    """Operations a second of a large matrix product."""
    tokens, width, inner = (256, 64, 128) if is_reduced else (8192, 4096, 14336)
    a = torch.randn(tokens, width, dtype=dtype, device=device())
    b = torch.randn(inner, width, dtype=dtype, device=device())
    return 2 * tokens * width * inner / seconds_of(lambda: nn.functional.linear(a, b))


def measure_head(vocabulary: int, is_reduced: bool) -> dict[str, Any]:
    """The loss of 4,096 positions with its gradient, beside the two products it cannot do without."""
    from ftune import loss

    count, width, vocabulary = (64, 64, 512) if is_reduced else (4096, 4096, vocabulary)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    hidden = torch.randn(count, width, dtype=dtype, device=device(), requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, device=device()) * 0.02
    targets = torch.randint(vocabulary, (count,), device=device())

    def head(states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, weight)

    def whole() -> None:
        loss.token_losses(head, hidden, targets, vocabulary).sum().backward()

    def bare() -> None:
        with torch.no_grad():
            _ = head(hidden) @ weight

    took, least = seconds_of(whole), seconds_of(bare)
    return {"vocabulary": vocabulary, "seconds": took, "of_products": took / least}


def measure_attention(way: str, tokens: int, is_reduced: bool) -> dict[str, Any]:
    """Packed attention with its gradients, with an 8B's heads, and how far it lies from its definition in float32."""
    from ftune import attention

    heads, kv_heads, size = (4, 2, 16) if is_reduced else (32, 8, 128)
    rows = rows_of(max(2, tokens // MEAN_LENGTH), SHAPES["8B"]["vocab_size"])
    bounds = (0, *torch.tensor([len(row.input_ids) for row in rows]).cumsum(0).tolist())
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    shapes = [(1, count, bounds[-1], size) for count in (heads, kv_heads, kv_heads)] + [(1, bounds[-1], heads, size)]
    drawn = [torch.randn(shape, device=device()).to(dtype) for shape in shapes]

    def attend(way: str, dtype: torch.dtype) -> list[torch.Tensor]:
        *inputs, upstream = (states.detach().to(dtype).requires_grad_() for states in drawn)
        output, _ = attention._segment_attention(nn.Module(), *inputs, None, way=way, segment_bounds=bounds)
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    pairs = zip(attend(way, dtype), attend("eager", torch.float32), strict=True)
    apart = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
    seconds = seconds_of(lambda: attend(way, dtype))
    return {"way": way, "tokens": bounds[-1], "rows": len(rows), "seconds": seconds, "apart": apart}


def check_packing() -> float:
    """The largest difference between packed and single rows on this device, float32, logits."""
    from ftune import comparing

    case = Case("8B", "lora", 256, is_reduced=True)
    model = build(case).to(torch.float32)
    return float(comparing.prove_packing(model, "auto"))


def in_child(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--task", json.dumps(task)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"not_run": "out of time"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"not_run": lines[-1] if lines else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def do(task: dict[str, Any]) -> dict[str, Any]:
    """A task, in this process."""
    if "head" in task:
        return measure_head(task["head"], task["is_reduced"])
    if "attention" in task:
        return measure_attention(task["attention"], task["tokens"], task["is_reduced"])
    if "packing" in task:
        return {"packed_rows_differ_by": check_packing()}
    return measure(Case(**task["case"]), task["side"])


def machine() -> dict[str, Any]:
    import bitsandbytes
    import peft
    import transformers

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    modules = {"torch": torch, "transformers": transformers, "peft": peft, "bitsandbytes": bitsandbytes}
    return {"card": card, **{name: str(module.__version__) for name, module in modules.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="tiny shapes, on a CPU where there is no GPU")
    parser.add_argument("--seconds", type=float, default=560, help="what has not begun by then is left out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        return print("\n" + json.dumps(do(options.task)))
    if not options.reduced and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --reduced tries the script on tiny shapes")
    until = time.monotonic() + options.seconds
    found: dict[str, Any] = {"machine": machine(), "is_reduced": options.reduced, "cases": {}}

    def ask(task: dict[str, Any]) -> dict[str, Any]:
        if options.reduced:
            told = do(task)
        elif until > time.monotonic():
            told = in_child(task, until - time.monotonic())
        else:
            told = {"not_run": "out of time"}
        print(json.dumps(task), json.dumps(told), file=sys.stderr, flush=True)
        return told

    found["packing"] = ask({"packing": True})
    found["heads"] = [ask({"head": vocabulary, "is_reduced": options.reduced}) for vocabulary in HEADS]
    ways = ["sdpa", on_gpu.FLASH, on_gpu.FLEX] if torch.cuda.is_available() else ["sdpa"]
    found["attention"] = [
        ask({"attention": way, "tokens": tokens, "is_reduced": options.reduced})
        for tokens in ([400] if options.reduced else [2048, 8192])
        for way in ways
    ]
    for case in CASES:
        chosen = asdict(case) | ({"is_reduced": True, "tokens": 400, "steps": 2} if options.reduced else {})
        both = ["ftune", "peer"] if case.has_peer else ["ftune"]
        found["cases"][case.name] = {side: ask({"case": chosen, "side": side}) for side in both}
        options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
