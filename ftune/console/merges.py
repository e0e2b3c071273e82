"""`ftune merge`: where the model lies, its proof, and what several adapters in one model cost each of them."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from ftune.console.tables import Fact, distances, mark, new_table, print_facts, print_titled
from ftune.quantities import format_difference, format_interval, format_score


def print_merge(merged: Mapping[str, Any]) -> None:
    """`ftune merge`: where the model lies, and the proof; of a quantized merge, what rounding did to it."""
    if "error_over_change" in merged:
        _print_quantized_merge(merged)
        return
    difference, limit = (format_difference(merged[key]) for key in ("merged_max_diff", "tolerance"))
    rows: list[Fact] = [
        ("folder", Text(str(merged["output"]), style="cyan")),
        ("keys loaded", str(merged["keys_loaded"])),
        ("same as adapter", mark(True) + Text(f" logits differ by at most {difference} (limit {limit})")),
    ]
    if over := merged.get("distance_to_trained"):
        rows.insert(1, ("merged into", f"the base in full precision; trained over {merged['trained_over']}"))
        rows += distances(over, merged["kl_to_trained"])
    print_facts("Merged", [*rows, *_held(merged)])


def _print_quantized_merge(merged: Mapping[str, Any]) -> None:
    ratio, kl = merged["error_over_change"], merged["kl_to_trained"]["quantized"]
    difference = format_difference(merged["distance_to_trained"]["quantized"])
    rows: list[Fact] = [
        ("folder", Text(str(merged["output"]), style="cyan")),
        ("keys loaded", str(merged["keys_loaded"])),
        ("merged into", f"{merged['merged_into']}, the weights it was trained over, rounded again"),
        ("rounding", mark(ratio < 1) + Text(f" its error is {ratio:.0%} of what the adapter changes")),
        ("from trained", f"logits differ by at most {difference}, KL {kl:.2g} nats a token"),
    ]
    print_facts("Merged", [*rows, *_held(merged)])


def _held(merged: Mapping[str, Any]) -> list[Fact]:
    """What held of the files besides the logits: their names alone, what was seen is in --json and `ftune verify`."""
    rows: list[Fact] = []
    if names := [str(check["name"]).replace("_", " ") for check in merged.get("checks") or []]:
        rows.append(("as trained", mark(True) + Text(f" {', '.join(names)}")))
    if changed := merged.get("forced_base"):
        rows.append(("base", mark(False) + Text(f" not the one trained on: {', '.join(changed)}; forced")))
    return rows


def print_combination(merged: Mapping[str, Any]) -> None:
    """Several adapters in one: the proof, and each parent beside what came out."""
    difference, limit = (format_difference(merged[key]) for key in ("combined_max_diff", "tolerance"))
    how = str(merged["combine"])
    how += f", density {merged['density']:g}" if merged.get("density") is not None else ""
    how += f", seed {merged['seed']}" if merged.get("seed") is not None else ""
    rows: list[Fact] = [
        ("folder", Text(str(merged["output"]), style="cyan")),
        ("combined by", how),
        ("same as in memory", mark(True) + Text(f" logits differ by at most {difference} (limit {limit})")),
    ]
    print_facts("Combined", [*rows, *_held(merged)])
    table = new_table("parent", "method", "weight", "KL from it", "largest difference", num_left=2)
    for parent in merged["adapters"]:
        far = parent["distance"]
        cells = (f"{parent['weight']:g}", f"{far['kl']:.2g}", format_difference(far["max_difference"]))
        table.add_row(Text(str(parent["name"])), str(parent["method"]), *cells)
    print_titled("How far from each parent (KL in nats a token)", table)
    _print_tasks(merged)


def _print_tasks(merged: Mapping[str, Any]) -> None:
    """What is left of each parent's skill, where it is known what that was."""
    table = new_table("on the task of", "metric", "parent", "combined", "gain", "95 %", "forgot", num_left=2)
    reasons: list[Fact] = []
    for parent in merged["adapters"]:
        task, forgetting = parent.get("task"), parent.get("forgetting") or {}
        if parent.get("reason"):
            reasons.append((str(parent["name"]), Text(f"not measured: {parent['reason']}", style="dim")))
            continue
        scores = (None, None, None) if task is None else (task["parent"], task["combined"], task["gain"])
        table.add_row(
            Text(str(parent["name"])),
            "-" if task is None else f"{task['metric']} (n={task['n']})",
            format_score(scores[0]),
            format_score(scores[1]),
            format_score(scores[2], signed=True),
            format_interval(None if task is None else task["ci95"]),
            format_score(forgetting.get("worst_drop")),
        )
    if table.rows:
        print_titled("What is left of their skills", table)
    if reasons:
        print_facts("Without a score", reasons)
