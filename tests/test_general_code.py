"""The general probe's programs, run: what they print is the keyed answer and no other choice."""

import re
import shutil
import sqlite3
import subprocess
import sys

import pytest
from general_kit import ITEMS, Item, find, right, wrong

FENCE = re.compile(r"```(\w+)\n(.*?)\n```", re.DOTALL)
RUNNERS = {"python": [sys.executable, "-I", "-c"], "javascript": ["node", "-e"], "shell": ["bash", "-c"]}
# What the program should have been, line for line, and what it then prints.
CORRECTIONS = {
    "sum of the list, 12": ("total = v", "total += v", "12"),
    "numbers 1 to 5": ("while n < last:", "while n <= last:", "1\n2\n3\n4\n5"),
    "average of the list, 4.0": ("count = len(xs) - 1", "count = len(xs)", "4.0"),
}


def program(item: Item) -> tuple[str, str]:
    """The language and the text of the program that a prompt shows."""
    ((language, text),) = FENCE.findall(item["prompt"])
    return language, text


def printed(language: str, text: str) -> str:
    if language == "sql":
        *before, last = [statement for statement in text.split(";") if statement.strip()]
        database = sqlite3.connect(":memory:")
        try:
            database.executescript(";".join(before) + ";")
            return "\n".join(", ".join(map(str, row)) for row in database.execute(last))
        finally:
            database.close()
    if shutil.which(RUNNERS[language][0]) is None:
        pytest.skip(f"{RUNNERS[language][0]} is not installed")
    done = subprocess.run([*RUNNERS[language], text], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


RUN = [item for item in ITEMS["code"] if FENCE.search(item["prompt"]) and "Which line is wrong" not in item["prompt"]]


@pytest.mark.parametrize("item", RUN, ids=lambda item: item["id"])
def test_a_program_prints_the_keyed_answer_and_no_other(item: Item) -> None:
    result = printed(*program(item))
    assert right(item) == result
    assert result not in wrong(item)


@pytest.mark.parametrize("words", CORRECTIONS)
def test_correcting_the_keyed_line_and_no_other_mends_the_program(words: str) -> None:
    item = find("code", words)
    line, corrected, output = CORRECTIONS[words]
    language, text = program(item)
    assert right(item) == line
    assert all(choice in text for choice in item["choices"])
    assert printed(language, text) != output
    assert printed(language, text.replace(line, corrected)) == output


def test_most_items_of_code_are_run() -> None:
    assert len(RUN) + len(CORRECTIONS) >= 40
