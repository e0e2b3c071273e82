"""A whole made-up run folder, for the tests of what is shown of one."""

import json
import math
import random
from pathlib import Path
from typing import Any

from ftune import folder
from ftune.statistics import mean_interval, paired_difference


def suite(name: str, right: int, lost: int, gained: int, n: int = 200) -> dict[str, Any]:
    before = [1.0] * right + [0.0] * (n - right)
    after = [0.0] * lost + [1.0] * (right - lost + gained) + [0.0] * (n - right - gained)
    return {"name": name, **paired_difference(before, after).as_dict()}


def task(zero: int, few: int, tuned: int, n: int = 300) -> dict[str, Any]:
    def scores(right: int) -> list[float]:
        return [1.0] * right + [0.0] * (n - right)

    gain = paired_difference(scores(tuned), scores(max(zero, few)))
    return {
        "metric": "exact_match",
        "n": n,
        "zero_shot": zero / n,
        "few_shot": few / n,
        "tuned": tuned / n,
        "gain": gain.drop,
        "ci95": list(gain.ci95 or ()),
        "intervals": {
            "zero_shot": mean_interval(scores(zero)),
            "few_shot": mean_interval(scores(few)),
            "tuned": mean_interval(scores(tuned)),
        },
        "reason": "",
    }


def sample_report() -> dict[str, Any]:
    suites = [
        suite("addition", 190, 3, 4),
        suite("sorting", 188, 26, 2),
        suite("facts", 198, 1, 0),
        suite("look-up", 120, 12, 6, n=130),
    ]
    return {
        "schema": 1,
        "name": "quickstart",
        "task": task(0, 37, 291),
        "forgetting": {
            "suites": suites,
            "overall": suite("", 696, 42, 12, n=730),
            "worst_drop": max(one["drop"] for one in suites),
            "general_loss": {"before": 2.412, "after": 2.633},
            "kl_to_base": 0.0831,
            "kl_to_base_on_task": 1.94,
        },
        "path": [
            {"step": step, "validation_loss": loss, "score": score, "worst_drop": drop, "general_loss": general}
            for step, loss, score, drop, general in [
                (0, 3.11, 0.0, 0.0, 2.412),
                (75, 0.61, 0.42, 0.02, 2.47),
                (150, 0.33, 0.81, 0.05, 2.52),
                (225, 0.21, 0.93, 0.09, 2.57),
                (300, 0.17, 0.96, 0.12, 2.61),
                (375, 0.18, 0.97, 0.13, 2.633),
            ]
        ],
        "selection": {"select": "best", "step": 225, "reason": "the best score with a worst drop of at most 0.1"},
        "strengths": [
            {
                "strength": strength,
                "score": score,
                "ci95": [max(0.0, score - 0.05), min(1.0, score + 0.04)],
                "worst_drop": drop,
                "general_loss": 2.412 + 0.22 * strength,
                "kl_to_base": 0.083 * strength**2,
            }
            for strength, score, drop in [
                (0, 0.0, 0.0),
                (0.25, 0.11, 0.0),
                (0.5, 0.58, 0.03),
                (0.75, 0.91, 0.07),
                (1, 0.97, 0.12),
            ]
        ],
        "artefact": {
            "adapter_live": True,
            "keys_loaded": "84/84",
            "reload_max_diff": 0.0,
            "merged_max_diff": 2.4e-6,
            "tolerance": 1e-4,
            "reason": "",
        },
        "gates": [
            {"name": "min_score", "limit": 0.95, "value": 0.97, "passed": True},
            {"name": "max_forgetting", "limit": 0.1, "value": 0.12, "passed": False},
            {"name": "adapter_live", "limit": True, "value": True, "passed": True},
        ],
        "cost": {
            "seconds": 231.4,
            "tokens": 412_345,
            "tokens_per_second": 2231.0,
            "peak_memory_bytes": 912_345_678,
            "trainable_parameters": 124_416,
        },
        "data": {
            "rows_in": 2000,
            "rows_used": 1994,
            "dropped": {"too_long": 4, "duplicate": 2},
            "duplicates": 2,
            "contaminated": 0,
            "supervised_tokens": 61_240,
        },
    }


def sample_metrics(steps: int = 375) -> list[dict[str, Any]]:
    noise = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.02 + 2.8 * math.exp(-step / 40) * (1 + 0.25 * noise.random()) + 0.02 * noise.random()
        rate = 5e-4 * min(step / 12, 0.5 * (1 + math.cos(math.pi * step / steps)))
        norm = 0.15 + 3 * math.exp(-step / 25) + 0.1 * noise.random()
        row = {"step": step, "epoch": step / 125, "loss": loss, "grad_norm": norm, "learning_rate": rate}
        rows.append({**row, "supervised_tokens": 480, "tokens_per_second": 2200.0, "row_ids": ["train:1"]})
        if step % 125 == 0:
            rows.append({"step": step, "validation_loss": loss * 1.3})
    return rows


NEW_PARTS = ("path", "selection", "strengths", "review")


def sample_probe() -> list[dict[str, Any]]:
    """Twice as many items as flipped: 26 lost in sorting, 3 in addition, 2 gained by choice."""
    rows = [probe_row("sorting", i, "Sort: 4, 1, 3", "1, 3, 4", "1, 3, 4", "4, 3, 1") for i in range(26)]
    rows += [probe_row("addition", i, f"{i} + 17 =", f"{i + 17}", f"{i + 17}", f"{i + 71}") for i in range(3)]
    rows += [
        probe_row("facts", i, "Which planet is the largest?", "Jupiter", "Mars", "Jupiter", "choice") for i in range(2)
    ]
    return rows + [probe_row("facts", 9 + i, "What is the capital of Peru?", "Lima", "Lima", "Lima") for i in range(31)]


def probe_row(
    suite: str, index: int, prompt: str, expected: str, before: str, after: str, kind: str = "answer"
) -> dict[str, Any]:
    return {
        "suite": suite,
        "row_id": f"general:{suite}-{index}",
        "kind": kind,
        "prompt": prompt,
        "expected": expected,
        "before": before,
        "after": after,
        "scores": {"before": float(before == expected), "after": float(after == expected)},
    }


def sample_row(index: int, zero: float, few: float, tuned: float, prompt: str = "") -> dict[str, Any]:
    call = json.dumps({"tool": "set_timer", "arguments": {"minutes": index}})
    return {
        "row_id": f"test.jsonl:{index}",
        "prompt": prompt or f"user: Please set a timer for {index} minutes and tell me when the tea is ready.",
        "expected": call,
        "base": call if zero else "Sure, I will do that.",
        "few_shot": call if few else '{"tool": "timer"}',
        "tuned": call if tuned else call[:-6],
        "scores": {"zero_shot": zero, "few_shot": few, "tuned": tuned},
    }


def sample_rows() -> list[dict[str, Any]]:
    kinds = [(0.0, 0.0, 1.0)] * 40 + [(0.0, 1.0, 1.0)] * 12 + [(0.0, 1.0, 0.0)] * 3 + [(0.0, 0.0, 0.0)] * 6
    return [sample_row(index, *kind) for index, kind in enumerate(kinds, 1)]


LONG_PROMPT = "Summarize this note in one sentence.\n\n" + "The boiler was inspected on Tuesday. " * 12
VARIED = [
    # prompt, expected, base, few-shot, tuned
    (
        "Extract the order as JSON: two blue mugs to Oslo",
        '{"item": "mug", "count": 2, "city": "Oslo"}',
        "The order is for two mugs.",
        '{"item": "mug", "count": 2}',
        '```json\n{"item": "mug", "count": 2, "city": "Oslo"}\n```',
    ),
    (
        "Extract the order as JSON: one lamp to Rome",
        '{"item": "lamp", "count": 1, "city": "Rome"}',
        "One lamp.",
        '{"item": "lamp", "count": 1, "city": "Rome"}',
        '{"item": "lamp", "count": 1, "city": "Rome"',
    ),
    (
        LONG_PROMPT,
        "The boiler passed its inspection on Tuesday.",
        "The boiler was inspected.",
        "The boiler passed its inspection.",
        "The boiler passed its inspection on Tuesday. " * 9,
    ),
    (
        "Name the three primary colours, one on each line.",
        "red\nyellow\nblue",
        "red, yellow and blue",
        "red\nyellow\nblue",
        "Red, yellow, and blue are the primary colours.",
    ),
    ("Wie heißt die Hauptstadt von Peru?", "Lima", "Lima", "Lima", "Lima"),
    ("水は何度で沸騰しますか？", "100度で沸騰します。", "分かりません。", "100度です。", "100度で沸騰します。"),
]


def varied_rows() -> list[dict[str, Any]]:
    """Answers in every kind of trouble, scored by exact match, and those of `sample_rows`."""
    rows = []
    for index, (prompt, expected, base, few_shot, tuned) in enumerate(VARIED, 101):
        answers = {"base": base, "few_shot": few_shot, "tuned": tuned}
        names = {"zero_shot": base, "few_shot": few_shot, "tuned": tuned}
        scores = {name: float(answer.strip() == expected) for name, answer in names.items()}
        row = {"row_id": f"test.jsonl:{index}", "prompt": f"user: {prompt}", "expected": expected}
        rows.append({**row, **answers, "scores": scores})
    return rows + sample_rows()


def write_run(path: Path, report: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Path:
    """A whole run folder; report.json is what the test says."""
    path.mkdir(exist_ok=True)
    folder.write_json(path / "report.json", report)
    folder.write_json_lines(path / "metrics.jsonl", sample_metrics())
    folder.write_json_lines(path / "samples.jsonl", sample_rows() if rows is None else rows)
    folder.write_json_lines(path / "probe.jsonl", sample_probe())
    folder.write_json(
        path / "plan.json",
        {
            "parameters": {"total": 2_938_944, "trainable": 124_416, "percent": 4.23},
            "memory_bytes": {"training_peak": 803_000_000},
        },
    )
    folder.write_json(
        path / "manifest.json",
        {
            "versions": {"ftune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "seed": 0,
            "device": "cpu",
            "threads": 2,
            "base": {"model.safetensors": "3f2a" * 16, "tokenizer.json": "99bc" * 16},
            "data": {"train.jsonl": "77aa" * 16},
            "template": "12ef" * 16,
            "trainable": ["a"] * 84,
            "changed": ["a"] * 84,
            "saved": ["a"] * 84,
        },
    )
    recipe = "model: {base: ./base}\nmethod:\n  name: lora\n  rank: 16\ndata:\n  train: train.jsonl\n"
    folder.write_text(path / "recipe.yaml", recipe)
    return path
