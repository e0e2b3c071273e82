"""A metric of the user's own: loaded before anything else, told about when it fails, and any number it gives."""

import hashlib
import re
import subprocess
import sys

import pytest
from conftest import CHAT_ROWS, ftune, make_tokenizer, run, write_recipe, write_rows

from ftune import data, folder, recipe
from ftune.data import Example
from ftune.errors import UserError
from ftune.evaluate import function
from ftune.run import preview
from ftune.run.afterwards import evaluate_target
from ftune.run.targets import resolve

EXAMPLE = Example("test.jsonl:7", "", None, {"prompt": "q", "completion": "12"})
SECTIONS = {"data": {"train": "train.jsonl", "test": "test.jsonl", "deduplicate": "off", "decontaminate": False}}


def load(path, text, name="score"):
    file = path / "judge.py"
    file.write_text(text, encoding="utf-8")
    return function.load(file, name)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def score(expected, answer): return len(answer) / len(expected)", 0.5),
        ("def score(expected, answer, strict=True): return True", 1.0),
        ("score = lambda *texts: len(texts)", 2.0),
        ("import numpy\ndef score(expected, answer): return numpy.float32(-7.5)", -7.5),
        ("import torch\ndef score(expected, answer): return torch.tensor(1e9)", 1e9),
        ("def score(a, b, row): return row['weight'] + (a == '12')", 4.0),
        ("def score(a, b, *, row): row['weight'] = 9; return 0", 0.0),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass Found:\n    right: int\n"
            "def score(expected, answer): return Found(3).right",
            3.0,
        ),
    ],
)
def test_whatever_takes_two_texts_and_gives_a_number_scores(tmp_path, text, found):
    own = load(tmp_path, text)
    rows = {"test.jsonl:7": {"weight": 3}} if own.takes_row else {}
    own = function.replace(own, rows=rows)
    assert own(EXAMPLE, "a") == found
    assert type(own(EXAMPLE, "a")) is float
    assert rows in ({}, {"test.jsonl:7": {"weight": 3}}), "the row itself is not the function's to change"
    assert own.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["judge.py"], "nothing is written beside it"


@pytest.mark.parametrize(
    ("text", "told", "where"),
    [
        ("def other(a, b): return 1", r"no function 'score'.*\n.*it has other", "judge.py"),
        ("x = 1\ny = 1 / 0", "running the file: ZeroDivisionError", "judge.py:2"),
        ("x = 1\ndef score(a, b) return 1", "running the file: SyntaxError", "judge.py:2"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'", "judge.py:1"),
        ("raise SystemExit(3)", "running the file: SystemExit: 3", "judge.py:1"),
        ("score = 3", "score is no function but a int", "judge.py"),
        ("def score(a): return 1", "does not take an expected and an answered text: too many", "judge.py"),
        ("def score(a, b, c): return 1", "missing a required argument: 'c'", "judge.py"),
        ("def score(row, a): return 1", "does not take", "judge.py"),
        ("async def score(a, b): return 1", "gives no number but a coroutine", "judge.py"),
        ("def score(a, b): yield 1", "gives no number but a generator", "judge.py"),
        ("score = max", "does not take an expected", "judge.py"),
    ],
)
def test_file_that_cannot_be_used_is_told_with_its_line(tmp_path, text, told, where):
    with pytest.raises(UserError, match=told) as caught:
        load(tmp_path, text)
    assert caught.value.problems[0].where == str(tmp_path / where)


def test_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        function.load(tmp_path / "none.py", "score")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return 1 / 0", r"judge.py:2: score\(\) on row test.jsonl:7: ZeroDivisionError: division by zero"),
        ("return None", "on row test.jsonl:7 gave None, which is no finite number"),
        ("return '1'", "gave '1', which is no finite number"),
        ("return float('nan')", "gave nan"),
        ("return float('inf')", "gave inf"),
        ("return 10 ** 400", "which is no finite number"),
        ("return [1, 2]", r"gave \[1, 2\]"),
        ("return 1j", "gave 1j"),
        ("raise SystemExit", "on row test.jsonl:7: SystemExit"),
    ],
)
def test_failure_names_the_row(tmp_path, body, told):
    own = load(tmp_path, f"def score(expected, answer):\n    {body}")
    with pytest.raises(UserError, match=told):
        own(EXAMPLE, "a")


def test_what_it_prints_is_no_result(tmp_path, capfd):
    own = load(tmp_path, "print('hello')\ndef score(expected, answer):\n    print('scoring')\n    return 1")
    own(EXAMPLE, "a")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "hello\nscoring\n"


# In a recipe


def write(workspace, text, metric="judge.py:score", **sections):
    (workspace / "judge.py").write_text(text, encoding="utf-8")
    write_rows(workspace / "test.jsonl", [{**row, "points": i} for i, row in enumerate(CHAT_ROWS[:6])])
    evaluation = {"metric": metric, "few_shot": 2, "max_new_tokens": 8}
    return recipe.load(write_recipe(workspace, **SECTIONS, evaluation={**evaluation, **sections}))


def test_path_is_the_recipes_and_stays_in_the_dump(workspace):
    loaded = write(workspace, "def score(a, b): return 1")
    assert loaded.evaluation.metric == f"{workspace / 'judge.py'}:score"
    copy = workspace / "elsewhere" / "recipe.yaml"
    copy.parent.mkdir()
    copy.write_text(recipe.dump(loaded))
    assert recipe.load(copy) == loaded


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise RuntimeError('at once')", "running the file: RuntimeError: at once"),
        ("def score(a): return 1", "too many positional"),
        ("import json\ndef score(a, b): return float(json.loads(b) is a)", "on row test.jsonl:1: JSONDecodeError"),
        ("def score(a, b, row): return row['pionts']", "KeyError: 'pionts'"),
        ("def score(a, b): return 1 if b else None", "answer=''|gave None"),
    ],
)
def test_check_tells_what_the_function_cannot_do_before_anything_is_loaded(workspace, text, told, monkeypatch):
    loaded = write(workspace, text)
    problems = preview.check(loaded)["problems"]
    assert len(problems) == 1
    assert re.search(told, problems[0]["what"])
    monkeypatch.setattr("ftune.run.training.load_base", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=told):
        run(workspace, **SECTIONS, evaluation={"metric": "judge.py:score"})
    assert not (workspace / "run").exists()


def test_the_file_is_not_run_by_a_recipe_that_is_wrong(workspace):
    (workspace / "judge.py").write_text("open('was-run', 'w')\ndef score(a, b): return 1")
    path = write_recipe(workspace, **SECTIONS, evaluation={"metric": "judge.py:score", "few_shots": 1})
    assert ftune("check", path, cwd=workspace).returncode == 2
    assert not (workspace / "was-run").exists()
    path = write_recipe(workspace, **SECTIONS, evaluation={"metric": "judge.py:score"})
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:2])
    assert ftune("check", path, cwd=workspace).returncode == 0
    assert (workspace / "was-run").exists(), "the test above would have seen it"


def test_numbers_of_any_size_go_through_the_whole_report(workspace):
    """Scores below 0: gates, intervals, bars and verdict; the row is the file's, with keys no shape knows."""
    text = "def score(expected, answer, row):\n    return -1000 * row['points'] - abs(len(answer) - len(expected))"
    write(workspace, text)
    gates = {"min_score": -1e6, "min_gain": 1e6}
    evaluation = {"metric": "judge.py:score", "few_shot": 2, "max_new_tokens": 8}
    report, path = run(workspace, **SECTIONS, evaluation=evaluation, gates=gates)
    task = report["task"]
    assert task["metric"] == "judge.py:score"
    assert task["tuned"] <= -2500.0
    low, high = task["intervals"]["tuned"]
    assert low <= task["tuned"] <= high <= 0
    assert [gate["passed"] for gate in report["gates"][:2]] == [True, False]
    assert report["verdict"].startswith(f"Tuned {task['tuned']:.2f}")
    manifest = folder.read_json(path / "manifest.json")
    assert manifest["metric"] == {
        "file": str(workspace / "judge.py"),
        "function": "score",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    page = (path / "report.html").read_text()
    assert "judge.py:score on 6 held-out items" in page
    samples = folder.read_json_lines(path / "samples.jsonl")
    assert [row["scores"]["tuned"] // -10 for row in samples] == sorted(
        row["scores"]["tuned"] // -10 for row in samples
    )
    (workspace / "judge.py").write_text("def score(expected, answer): return 5")
    again = evaluate_target(resolve(path))
    assert again["task"]["tuned"] == 5.0
    assert again["task"]["ci95"] is None, "of equal scores without bounds nothing is known"
    assert folder.read_json(path / "manifest.json")["metric"]["sha256"] != manifest["metric"]["sha256"]


def test_function_that_fails_after_training_can_be_mended_and_the_run_resumed(workspace, monkeypatch):
    text = "def score(expected, answer):\n    assert answer in ('', expected), 'strange'\n    return 1"
    write(workspace, text)
    sections = {**SECTIONS, "evaluation": {"metric": "judge.py:score", "few_shot": 0, "max_new_tokens": 8}}
    with pytest.raises(UserError, match=r"judge.py:2: score\(\) on row test.jsonl:\d: AssertionError: strange"):
        run(workspace, **sections)
    (workspace / "judge.py").write_text("def score(expected, answer): return 0.5")
    monkeypatch.setattr("ftune.train.accumulate", lambda *_: pytest.fail("it trained again"))
    report, _ = run(workspace, resume=True, **sections)
    assert report["task"]["tuned"] == 0.5


def test_rows_are_found_by_their_id(tmp_path):
    own = load(tmp_path, "def score(a, b, row): return row['points']")
    path = write_rows(tmp_path / "test.jsonl", [{**row, "points": i} for i, row in enumerate(CHAT_ROWS[:3])])
    examples = data.load(make_tokenizer(), [data.Source(path)], data.Rules()).examples
    own = own.with_rows(path)
    assert [own(example, "") for example in examples] == [0.0, 1.0, 2.0]
    assert not load(tmp_path, "def score(a, b): return 1").with_rows(path).rows


def test_help_and_schema_run_no_file(tmp_path):
    """Importing what answers at once loads neither the function's module nor torch."""
    code = "import sys, ftune.recipe; sys.exit('torch' in sys.modules or 'ftune.evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
