"""From a run folder to what people and programs read: report.md, report.html, junit.xml; and the verdict."""

from ftune.report.pages import render
from ftune.report.verdict import verdict

__all__ = ["render", "verdict"]
