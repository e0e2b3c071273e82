"""The terminal: the only package that imports rich. Results go to stdout, progress and messages to stderr."""

from ftune.console.checks import print_check, print_checks, print_merge, print_rows
from ftune.console.progress import TaskProgress, TrainingProgress, task_progress, training_progress
from ftune.console.streams import note, print_error, print_json, warn
from ftune.console.summary import print_report
from ftune.console.tables import print_methods, print_plan, print_plans

__all__ = [
    "TaskProgress",
    "TrainingProgress",
    "note",
    "print_check",
    "print_checks",
    "print_error",
    "print_json",
    "print_merge",
    "print_methods",
    "print_plan",
    "print_plans",
    "print_report",
    "print_rows",
    "task_progress",
    "training_progress",
    "warn",
]
