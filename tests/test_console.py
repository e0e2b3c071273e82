"""What the terminal shows: results on stdout alone, plain lines in a log, nothing cut or coloured by accident."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sample_run import sample_report

from ftune import quantities
from ftune.console import documents, progress, streams, summary
from ftune.errors import Interrupted, Problem, RunError, UserError

ROOT = Path(__file__).parent.parent
PROGRESS = """
from ftune.console import progress, streams
with progress.training_progress(200, first_step=100) as training:
    for step in range(101, 201):
        training.update(step, 2.0, 12345.6, 2**30, 1e-4, step / 100)
        if step == 150:
            with progress.task_progress("validation", 4) as task:
                for _ in range(4):
                    task.advance()
streams.note("done")
print("result")
"""


@pytest.fixture(autouse=True)
def _fresh_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles are made once a process; each test gets its own, on its own captured streams."""
    monkeypatch.setenv("COLUMNS", "80")
    streams.results.cache_clear()
    streams.messages.cache_clear()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True, check=True
    )


def test_a_log_gets_few_plain_lines_and_stdout_only_results() -> None:
    done = run(PROGRESS, FORCE_COLOR="1", TERM="xterm-256color")
    assert done.stdout == "result\n"
    lines = done.stderr.splitlines()[:-1]
    assert "\x1b" not in "".join(lines), "colour may be forced, a moving bar may not"
    assert 3 <= len(lines) <= 25
    assert re.match(
        r"step 101/200  loss 2\.0000  12\.3k tokens/s  1\.00 GiB  epoch 1\.01  learning rate 1\.0e-04  0:0\d", lines[0]
    )
    assert lines[-1].startswith("step 200/200")
    assert any(line.startswith("validation  4/4") for line in lines)


def test_time_left_counts_from_where_a_resumed_run_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    clock = progress._Clock(200, first=100, started=now)
    assert clock.seconds_left is None
    now, clock.done = 1030.0, 150
    assert clock.seconds_left == pytest.approx(30.0)
    assert clock.times() == "0:30 · 0:30 left"


def test_an_error_names_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    long_path = "/data/" + "very-long-folder/" * 8 + "train.jsonl"
    problems = [Problem("unknown key [red]x[/red]", "recipe.yaml:3", "rank"), Problem("no such file", long_path)]
    streams.print_error(UserError.collect(problems))
    output = capsys.readouterr()
    assert output.out == ""
    assert "2 problems" in output.err
    assert "unknown key [red]x[/red]" in output.err
    assert "at:  recipe.yaml:3" in output.err
    assert "try: rank" in output.err
    assert long_path in output.err, "a path in a log stays in one piece"


@pytest.mark.parametrize(
    ("error", "label"),
    [(UserError("a"), "  error  a"), (RunError("a"), " failed  a"), (Interrupted("a"), "stopped  a")],
)
def test_a_stop_is_not_called_an_error(error: Exception, label: str, capsys: pytest.CaptureFixture[str]) -> None:
    streams.print_error(error)  # type: ignore[arg-type]
    assert capsys.readouterr().err.rstrip("\n") == label


def test_json_is_one_document_that_every_parser_reads(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"text": "ü\u2028 [bold]" + "x" * 200, "number": 1e-4}
    documents.print_json(document)
    output = capsys.readouterr()
    assert json.loads(output.out) == document
    assert output.err == ""
    with pytest.raises(ValueError, match="JSON"):
        documents.print_json({"loss": float("nan")})


def test_the_summary_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    report = {**sample_report(), "verdict": "Tuned 0.97 beats everything."}
    summary.print_report(report, Path("runs/quickstart"))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for words in ("Tuned 0.97 beats everything.", "0.970", "[0.944, 0.984]", "84/84", "runs/quickstart/report.html"):
        assert words in text
    (line,) = [line for line in text.splitlines() if "sorting" in line]
    assert line.split() == ["sorting", "0.940", "→", "0.820", "0.120", "[0.07,", "0.17]", "0.11", "forgot"]


def test_the_summary_says_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    summary.print_report({"schema": 1, "name": "bare", "forgetting": {"reason": "no probe"}}, None)
    text = capsys.readouterr().out
    assert text.count("not measured") >= 5
    assert "not measured, no probe" in text
    assert "None" not in text


def test_an_ascii_terminal_still_tells_pass_from_fail() -> None:
    code = """
from ftune.console.checks import print_checks
checks = [{"name": "a", "passed": True, "told": "yes"}, {"name": "b", "passed": False, "told": "no"}]
print_checks({"target": "run", "passed": False, "checks": checks})
"""
    lines = run(code, PYTHONIOENCODING="ascii").stdout.splitlines()
    assert [line.split() for line in lines[1:3]] == [["a", "+", "yes"], ["b", "x", "no"]]


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        ("count", 12345, "12,345"),
        ("count", 8.03e9, "8.03B"),
        ("bytes", 2**30 * 1.5, "1.50 GiB"),
        ("bytes", 512, "512 B"),
        ("duration", 59.6, "1:00"),
        ("duration", 3723, "1:02:03"),
        ("duration", 90000, "1 d 01:00"),
        ("rate", 12345.6, "12.3k tokens/s"),
        ("score", -0.0001, "0.000"),
        ("score", None, "not measured"),
        ("interval", None, ""),
        ("difference", 0.0, "0"),
        ("difference", 2.41e-6, "2.4e-06"),
        ("gate", True, "yes"),
        ("gate", 0.95, "0.950"),
        ("gate", 1e-5, "1.0e-05"),
    ],
)
def test_numbers_as_people_read_them(function: str, value: object, text: str) -> None:
    assert getattr(quantities, f"format_{function}")(value) == text


def test_a_sparkline_ends_where_the_series_ends() -> None:
    assert quantities.sparkline([4.0, 3.0, 2.0, 1.0], 4) == "█▆▃▁"
    assert quantities.sparkline([float(value) for value in range(1000)], 8) == "▁▂▃▄▅▆▇█"
    assert quantities.sparkline([1.0], 8) == ""
    assert quantities.sparkline([1.0] * 3, 8) == "▁▁▁"
