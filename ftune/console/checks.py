"""What the dry run and the proofs found: problems, a verification."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from ftune.console.audit import print_audit
from ftune.console.streams import format_problem, results
from ftune.console.tables import mark, print_facts, print_plan, print_titled
from ftune.errors import Problem


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


def print_checks(found: Mapping[str, Any]) -> None:
    """`ftune verify`: each check, whether it held, what it saw."""
    checks = found["checks"]
    rows = [(check["name"].replace("_", " "), mark(check["passed"]) + Text(f" {check['told']}")) for check in checks]
    print_facts(str(found["target"]), rows)
    failed = sum(not check["passed"] for check in checks)
    results().print(Text("every check held", "green") if found["passed"] else Text(f"{failed} failed", "bold red"))
