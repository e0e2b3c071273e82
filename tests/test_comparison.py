"""`ftune report A B`: what differs between finished runs, and how sure the difference of their scores is."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ftune
from sample_run import sample_report, sample_row, write_run

from ftune import folder
from ftune.console.comparison import print_comparison
from ftune.errors import UserError
from ftune.report.comparison import compare_runs
from ftune.report.finished import distinct_names

RECIPE = {
    "model": {"base": "/models/base"},
    "method": {"name": "lora", "rank": 8, "alpha": 16.0},
    "data": {"train": "/data/train.jsonl", "test": "/data/test.jsonl"},
    "training": {"seed": 0, "learning_rate": 0.001},
    "evaluation": {"probe": "/data/probe.jsonl"},
    "output": {"dir": "/runs/a"},
}
MANIFEST = {
    "versions": {"ftune": "0.1.0", "torch": "2.13.0"},
    "seed": 0,
    "device": "cpu",
    "threads": 2,
    "base": {"model.safetensors": "3f2a" * 16, "tokenizer.json": "99bc" * 16},
    "data": {"/data/train.jsonl": "77aa" * 16, "/data/test.jsonl": "88bb" * 16, "/data/probe.jsonl": "99cc" * 16},
    "template": "12ef" * 16,
}
NUM_ITEMS = 200
REPORT = sample_report()


def items(right: int, n: int = NUM_ITEMS) -> list[dict[str, Any]]:
    """The first `right` of n answers are right."""
    return [sample_row(index, 0.0, 0.0, float(index <= right)) for index in range(1, n + 1)]


def make_run(
    path: Path,
    right: int,
    changes: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    **task: Any,
) -> Path:
    """A made-up run whose score is `right` of its items; `changes` are recipe keys."""
    rows = items(right) if rows is None else rows
    report = copy.deepcopy(REPORT)
    mean = sum(row["scores"]["tuned"] for row in rows) / len(rows) if rows else right / NUM_ITEMS
    report["task"] |= {"tuned": mean, "n": len(rows) or NUM_ITEMS} | task
    report["gates"] = report["gates"][:1]
    recipe = copy.deepcopy(RECIPE)
    recipe["output"]["dir"] = str(path)
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        recipe[section][name] = value
    write_run(path, report, rows)
    folder.write_text(path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    folder.write_json(path / "manifest.json", {**MANIFEST, **(manifest or {})})
    return path


def compare(*paths: Path) -> dict[str, Any]:
    return compare_runs(paths)[0]


def values(document: dict[str, Any], group: str) -> dict[str, list[Any]]:
    return {row["name"]: row["values"] for row in document["differences"][group]}


def test_the_verdict_says_how_much_better_and_what_differs(tmp_path: Path) -> None:
    a = make_run(tmp_path / "A", 140)
    b = make_run(tmp_path / "B", 160, {"method.rank": 16, "training.seed": 1})
    document = compare(a, b)
    [pair] = document["task_pairs"]
    assert (pair["n"], pair["num_better"], pair["num_worse"], pair["reason"]) == (200, 20, 0, "")
    assert pair["difference"] == pytest.approx(0.1)
    low, high = pair["ci95"]
    assert 0.05 < low < 0.1 < high < 0.15
    assert document["verdict"] == (
        f"B scores 0.10 higher [{low:.2f}, {high:.2f}] than A; worst forgetting: A 0.12, B 0.12; "
        "method.rank 8 → 16, training.seed 0 → 1 differ."
    )


def test_the_other_order_turns_the_sign(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "A", 140), make_run(tmp_path / "B", 160)
    [there], [back] = compare(a, b)["task_pairs"], compare(b, a)["task_pairs"]
    assert back["difference"] == -there["difference"]
    assert (back["num_better"], back["num_worse"]) == (0, 20)
    assert compare(b, a)["verdict"].startswith("A scores 0.10 lower [0.0")


def test_a_difference_within_its_interval_is_no_difference(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "A", 140), make_run(tmp_path / "B", 142)
    assert re.match(r"B does not clearly differ from A, \+0\.01 \[-0\.0\d, 0\.0\d\]; ", compare(a, b)["verdict"])


def test_pairing_goes_by_the_item_and_not_by_its_place(tmp_path: Path) -> None:
    rows = items(160)
    random.Random(1).shuffle(rows)
    a = make_run(tmp_path / "A", 140)
    straight = compare(a, make_run(tmp_path / "B", 160))["task_pairs"]
    [shuffled] = compare(a, make_run(tmp_path / "C", 160, rows=rows))["task_pairs"]
    assert [{**shuffled, "run": "B"}] == straight


def test_equal_questions_are_paired_in_their_order(tmp_path: Path) -> None:
    def twice(first: float, second: float) -> list[dict[str, Any]]:
        rows = [sample_row(1, 0, 0, first), sample_row(1, 0, 0, second)]
        return [{**row, "expected": "same", "prompt": "same"} for row in rows] * 10

    a, b = make_run(tmp_path / "A", 0, rows=twice(1.0, 0.0)), make_run(tmp_path / "B", 0, rows=twice(1.0, 1.0))
    [pair] = compare(a, b)["task_pairs"]
    assert (pair["n"], pair["num_better"], pair["num_worse"]) == (20, 10, 0)


REST = (("test", "88bb" * 16), ("probe", "99cc" * 16))
OBSTACLES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "other items": ({"rows": items(160, 150)}, "different items: A 200, B 150, the same in both 150", False),
    "other answers expected": (
        {"rows": [{**row, "expected": "other"} for row in items(160)]},
        "different items: A 200, B 200, the same in both 0",
        False,
    ),
    "another metric": ({"metric": "contains"}, "scored by exact_match in A, contains in B", False),
    "not measured": ({"tuned": None}, "the task was not measured in B", False),
    "no mean of items": ({"tuned": 0.7}, "exact_match is not the mean of its items' scores", True),
    "no items, the same file": ({"rows": []}, "B has no scores of single items", True),
    "no items, another file": (
        {"rows": [], "manifest": {"data": {**MANIFEST["data"], "/data/test.jsonl": "0" * 64}}},
        "B has no scores of single items",
        False,
    ),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_paired_is_said_with_its_reason(tmp_path: Path, name: str) -> None:
    options, reason, has_difference = OBSTACLES[name]
    document = compare(make_run(tmp_path / "A", 140), make_run(tmp_path / "B", 160, **options))
    [pair] = document["task_pairs"]
    assert reason in pair["reason"]
    assert pair["ci95"] is None
    assert (pair["difference"] is not None) is has_difference
    assert reason in document["verdict"]
    assert ("without an interval" if has_difference else "B cannot be compared with A") in document["verdict"]


def test_of_a_loss_less_is_better(tmp_path: Path) -> None:
    loss = {"metric": "loss", "ci95": None, "intervals": None}
    a = make_run(tmp_path / "A", 0, rows=[], **loss | {"tuned": 1.5})
    b = make_run(tmp_path / "B", 0, rows=[], **loss | {"tuned": 1.2})
    assert compare(a, b)["verdict"].startswith("B's loss is 0.30 lower than A's, without an interval (")


def test_files_are_compared_by_their_contents(tmp_path: Path) -> None:
    a = make_run(tmp_path / "A", 140)
    moved = make_run(
        tmp_path / "moved", 140, {"data.train": "/other/train.jsonl", "model.base": "/other/base"},
        {"data": {"/other/train.jsonl": "77aa" * 16, **{f"/data/{name}.jsonl": digest for name, digest in REST}}},
    )  # fmt: skip
    document = compare(a, moved)
    assert [row["name"] for row in document["differences"]["moved"]] == ["model.base", "data.train"]
    assert not values(document, "recipe")
    assert not values(document, "data")
    assert document["verdict"].endswith("; nothing that was recorded differs.")
    edited = make_run(tmp_path / "edited", 140, None, {"data": {**MANIFEST["data"], "/data/train.jsonl": "00ff" * 16}})
    document = compare(a, edited)
    assert [files[0]["sha256"][:4] for files in values(document, "data")["data.train"]] == ["77aa", "00ff"]
    assert document["verdict"].endswith("; the content of data.train differs.")


def test_weights_of_data_still_count_where_the_files_are_the_same(tmp_path: Path) -> None:
    once = make_run(tmp_path / "once", 140, {"data.train": [{"path": "/data/train.jsonl", "weight": 1.0}]})
    twice = make_run(tmp_path / "twice", 140, {"data.train": [{"path": "/data/train.jsonl", "weight": 2.0}]})
    assert list(values(compare(once, twice), "recipe")) == ["data.train"]


def test_base_versions_and_machine_are_compared(tmp_path: Path) -> None:
    a = make_run(tmp_path / "A", 140)
    manifest = {
        "base": {**MANIFEST["base"], "model.safetensors": "4444" * 16},
        "versions": {"ftune": "0.2.0", "torch": "2.13.0"},
        "device": "cuda",
    }
    document = compare(a, make_run(tmp_path / "B", 140, None, manifest))
    assert values(document, "base") == {"model.safetensors": ["3f2a" * 16, "4444" * 16]}
    assert values(document, "versions") == {"ftune": ["0.1.0", "0.2.0"]}
    assert values(document, "machine") == {"device": ["cpu", "cuda"]}
    assert document["verdict"].endswith("; the base, ftune 0.1.0 → 0.2.0, device cpu → cuda differ.")


def test_another_method_is_told_by_its_name_and_not_by_every_key(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "A", 140), make_run(tmp_path / "B", 140)
    recipe = {**RECIPE, "method": {"name": "ia3", "target_modules": "auto"}}
    folder.write_text(b / "recipe.yaml", yaml.safe_dump(recipe))
    document = compare(a, b)
    assert document["verdict"].endswith("; method.name lora → ia3 differs.")
    assert values(document, "recipe")["method.rank"] == [8, "(absent)"]


def test_skills_are_paired_where_both_probes_have_their_items(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "A", 140), make_run(tmp_path / "B", 140)
    for path, right in ((a, 10), (b, 30)):
        folder.write_json_lines(path / "probe.jsonl", [
            {"suite": "sorting", "row_id": str(i), "kind": "answer", "prompt": f"q{i}", "expected": "a",
             "scores": {"before": 1.0, "after": float(i < right)}} for i in range(40)
        ])  # fmt: skip
    pairs = {pair["suite"]: pair for pair in compare(a, b)["forgetting_pairs"]}
    assert (pairs["sorting"]["difference"], pairs["sorting"]["num_better"]) == (0.5, 20)
    assert pairs["addition"]["difference"] is None
    assert "no scores of single items" in pairs["addition"]["reason"]


def test_everything_that_is_no_finished_run_is_told_at_once(tmp_path: Path) -> None:
    a = make_run(tmp_path / "A", 140)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("model: x")
    with pytest.raises(UserError) as caught:
        compare(a, tmp_path / "begun", tmp_path / "nowhere", tmp_path, a / "." / "." / "..", a)
    told = [(problem.what, Path(problem.where).name) for problem in caught.value.problems]
    assert told == [
        ("this run is not finished", "begun"),
        ("no such folder", "nowhere"),
        ("no report.json in this folder", tmp_path.name),
        ("this run is named twice", ".."),
        ("this run is named twice", "A"),
    ]


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    paths = [Path("/x/one/run"), Path("/x/two/run"), Path("/x/three")]
    assert distinct_names(paths) == ["one/run", "two/run", "three"]


def test_what_an_old_run_lacks_is_said_and_not_invented(tmp_path: Path) -> None:
    a = make_run(tmp_path / "A", 140)
    (tmp_path / "old").mkdir()
    folder.write_json(tmp_path / "old" / "report.json", {"schema": 1})
    document, words = compare_runs([a, tmp_path / "old"], tmp_path / "page.html")
    assert document["verdict"].startswith("old cannot be compared with A (the task was not measured in old)")
    assert "None" not in (tmp_path / "page.html").read_text()
    print_comparison(document, words)


@pytest.mark.parametrize("ending", [".html", ".md"])
def test_the_page_tells_everything_and_needs_nothing_from_outside(tmp_path: Path, ending: str) -> None:
    a, b = make_run(tmp_path / "A", 140), make_run(tmp_path / "B", 160, {"method.rank": 16})
    hostile = "<script>alert('x')</script> | \x1b[31m"
    report = folder.read_json(b / "report.json")
    report["forgetting"]["suites"][0]["name"] = hostile
    report["gates"][0] |= {"passed": False}
    folder.write_json(b / "report.json", report)
    page = tmp_path / f"page{ending}"
    document, _ = compare_runs([a, b], page)
    text = page.read_text(encoding="utf-8")
    for part in ("method.rank", "min_score", "sorting", "0.800", "+0.100", "124,416"):
        assert part in text.replace("\\", ""), part
    assert not re.search(r"https?://|\bsrc=|\bhref=|url\(|@import|<script|<link|<iframe|\son\w+=", text)
    assert "\x1b" not in text
    assert "gate failed in B: min_score" in document["verdict"]
    if ending == ".html":
        assert "default-src 'none'" in text
        assert document["verdict"] in text


def test_the_screen_is_clear_at_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_run(tmp_path / "A", 140), make_run(tmp_path / "B", 160, {"method.rank": 16})
    print_comparison(*compare_runs([a, b]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"\s+method\.rank\s+8\s+16", line) for line in lines)
    assert any(
        re.match(r"\s+B against A\s+\+0\.100\s+\[0\.\d{3}, 0\.\d{3}\]\s+< 0\.001\s+20\s+0", line) for line in lines
    )


def test_the_command_compares_and_a_single_run_is_still_rebuilt(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "A", 140), make_run(tmp_path / "B", 160)
    done = ftune("report", a, b, "--json", "--output", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task_pairs"][0]["num_better"] == 20
    assert (tmp_path / "page.md").is_file()
    done = ftune("report", a)
    assert (done.returncode, done.stdout.strip()) == (0, str(a / "report.html"))
    for wrong in (["report", a, tmp_path], ["report", a, b, "--output", "x.pdf"], ["report", a, "--output", "x.md"]):
        done = ftune(*wrong)
        assert (done.returncode, done.stdout) == (2, ""), wrong
