"""What the dry run and the proofs found: problems, a merge, a verification."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ftune.console.audit import print_audit
from ftune.console.streams import format_problem, results
from ftune.console.tables import Fact, distances, mark, print_facts, print_plan, print_titled
from ftune.errors import Problem
from ftune.quantities import format_difference


def print_check(found: Mapping[str, Any]) -> None:
    """`ftune check`: every problem, or what the data and the plan are."""
    problems = [Problem(**problem) for problem in found["problems"]]
    if problems:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(justify="right", style="red")
        grid.add_column(overflow="fold")
        for number, problem in enumerate(problems, 1):
            grid.add_row(str(number), format_problem(problem))
        print_titled(f"{len(problems)} problem{'s' * (len(problems) > 1)}", grid)
    if found.get("data"):
        print_audit(found["data"])
    if found.get("plan"):
        print_plan(found["plan"])
    if not problems:
        results().print(mark(True) + Text(" no problems found"))


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
    print_facts("Merged", rows)


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
    print_facts("Merged", rows)


def print_checks(found: Mapping[str, Any]) -> None:
    """`ftune verify`: each check, whether it held, what it saw."""
    checks = found["checks"]
    rows = [(check["name"].replace("_", " "), mark(check["passed"]) + Text(f" {check['told']}")) for check in checks]
    print_facts(str(found["target"]), rows)
    failed = sum(not check["passed"] for check in checks)
    results().print(Text("every check held", "green") if found["passed"] else Text(f"{failed} failed", "bold red"))
