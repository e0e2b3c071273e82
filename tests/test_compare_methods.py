"""`ftune compare`: the same recipe with several methods and seeds, each a run of its own."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_ROWS, ftune, save_base, write_recipe, write_rows
from sample_run import sample_report, sample_row, write_run

from ftune import folder, lock
from ftune.console.sweep import SweepProgress, print_sweep
from ftune.errors import UserError
from ftune.report import scatter, sweep
from ftune.report.sweep import Outcome, summarize
from ftune.report.sweep_pages import pictures, write_pages
from ftune.run.compare import run_process, why
from ftune.run.variants import Call, members, parse_methods

REPORT = sample_report()
EXPLODING = "{name: lora, rank: 4, alpha: 1e38, dropout: 0}"
"""Passes every check, and its loss is no number after the first step."""


def call(workspace: Path, methods: str, *overrides: str, **options: Any) -> Call:
    return Call(write_recipe(workspace), overrides, methods, **options)


def problems(*arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        members(call(*arguments, **options))
    return [problem.what for problem in caught.value.problems]


def test_methods_are_written_as_in_a_recipe() -> None:
    found = parse_methods(" lora,dora, {name: lora, rank: 4, target_modules: [q_proj, v_proj]},ia3", own="lora")
    assert [variant.label for variant in found] == [
        "lora",
        "dora",
        "lora rank=4 target_modules=[q_proj, v_proj]",
        "ia3",
    ]
    assert [variant.slug for variant in found] == ["lora", "dora", "lora-rank-4-target_modules-q_proj-v_proj", "ia3"]
    assert found[0].override == "", "the recipe's own method keeps its own keys"
    assert json.loads(found[2].override.removeprefix("method=")) == {
        "name": "lora", "rank": 4, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no method is named"),
        ("lora, lora", "lora is named twice"),
        ("{rank: 4}", "no method: {rank: 4}"),
        ("lora, 4", "no method: 4"),
        ("{name: lora", "not valid YAML"),
        ("lora]", "not valid YAML"),
        ("{name: lora, name: ia3}", 'duplicate key "name"'),
        ("!!python/name:os.system x", "YAML tag"),
    ],
)
def test_methods_that_cannot_be_read_are_refused_with_an_example(text: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        parse_methods(text, own="lora")
    [problem] = caught.value.problems
    assert problem.where == "--methods"


def test_every_problem_of_every_method_is_told_before_anything_is_written(workspace: Path) -> None:
    before = sorted(workspace.rglob("*"))
    told = problems(workspace, "lora, bitfit, {name: dora, rnk: 4}, nonsense, prefix_tuning", "output.save=merged")
    told_of = "\n".join(told)
    assert "bitfit: 0 trainable parameters" in told_of
    assert "dora rnk=4: " in told_of
    assert '"rnk"' in told_of
    assert "nonsense: unknown method 'nonsense'" in told_of
    assert "prefix_tuning: an adapter of prefix_tuning cannot be merged" in told_of
    assert [what for what in told if what.startswith("lora: ")] == []
    assert [path for path in sorted(workspace.rglob("*")) if path.name != "recipe.yaml"] == before


@pytest.mark.parametrize("methods", ["lora, ia3", "all"])
def test_a_problem_that_all_methods_have_is_told_once(workspace: Path, methods: str) -> None:
    (workspace / "train.jsonl").write_text("")
    [told] = [what for what in problems(workspace, methods) if "usable examples" in what]
    assert told.startswith("0 usable examples")


def test_all_leaves_out_what_this_base_cannot_have_and_says_so(workspace: Path) -> None:
    found = members(call(workspace, "all"))
    assert [(one["label"], one["reason"].partition(":")[0]) for one in found.left_out] == [
        ("bitfit", "0 trainable parameters")
    ]
    assert {"lora", "ia3", "full"} <= {member.variant.label for member in found.runs}


def test_seeds_are_counted_from_the_recipes_own(workspace: Path) -> None:
    found = members(call(workspace, "lora, ia3", "training.seed=5", seeds=2))
    assert [member.name for member in found.runs] == ["lora-seed5", "ia3-seed5", "lora-seed6", "ia3-seed6"]
    assert [member.settings.training.seed for member in found.runs] == [5, 5, 6, 6]
    assert found.folder == workspace / "run-compare"
    assert found.runs[0].settings.method.rank == 4, "the recipe's own rank"  # type: ignore[attr-defined]
    assert {member.settings.output.dir for member in found.runs} == {member.path for member in found.runs}


def test_an_override_that_no_run_reads_is_refused(workspace: Path) -> None:
    assert "method.rank=8 has no effect" in problems(workspace, "dora, ia3", "method.rank=8")[0]
    assert members(call(workspace, "lora, ia3", "method.rank=8")).runs[0].settings.method.rank == 8  # type: ignore[attr-defined]


def test_what_lies_there_is_not_touched_unless_told(workspace: Path) -> None:
    (workspace / "run-compare" / "lora-seed0").mkdir(parents=True)
    (workspace / "run-compare" / "lora-seed0" / "notes.txt").write_text("mine")
    assert problems(workspace, "lora, ia3") == ["this folder holds other files"]
    assert "exclude each other" in problems(workspace, "lora", resume=True, overwrite=True)[0]


def test_a_killed_process_is_told_by_its_signal(tmp_path: Path) -> None:
    """Case: out of memory, the kernel's way."""
    code = (
        "import os, signal, sys; print('half way', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended, lines = run_process([sys.executable, "-c", code], tmp_path / "x.log", SweepProgress(1))
    assert (ended, lines) == (-signal.SIGKILL, ["half way"])
    assert why(ended, lines) == "killed by SIGKILL (out of memory?)"
    assert (tmp_path / "x.log").read_text() == "half way\n"


def test_why_a_run_failed_is_what_it_said_last() -> None:
    lines = [
        "   note  x",
        "step 1/4",
        " failed  non-finite loss at step 2",
        "         at:  training",
        "         try: less",
    ]
    assert why(3, lines) == "non-finite loss at step 2 at: training try: less"
    assert why(3, ["step 1/4"]) == "ended with exit code 3"


def made_up(tmp_path: Path, label: str, seed: int, right: int, **cost: float) -> Outcome:
    report = json.loads(json.dumps(REPORT))
    report["task"] |= {"tuned": right / 100, "n": 100}
    report["forgetting"]["worst_drop"] = cost.pop("worst_drop", 0.1)
    report["cost"] |= {"training_seconds": 10.0} | cost
    report["gates"] = [{"name": "min_score", "limit": 0.5, "value": right / 100, "passed": right >= 50}]
    path = tmp_path / f"{label}-seed{seed}"
    write_run(path, report, [sample_row(index, 0, 0, float(index <= right)) for index in range(1, 101)])
    return Outcome(label, seed, path, 0, None)


def test_methods_are_averaged_over_seeds_and_set_against_the_best(tmp_path: Path) -> None:
    outcomes = [
        made_up(tmp_path, label, seed, right + 2 * seed, worst_drop=drop)
        for seed in (0, 1)
        for label, right, drop in (("lora", 90, 0.2), ("dora", 89, 0.3), ("ia3", 60, 0.01))
    ]
    document = summarize(tmp_path, outcomes, [])
    lora, dora, ia3 = document["methods"]
    assert lora["score"] == pytest.approx({"mean": 0.91, "min": 0.9, "max": 0.92})
    assert (lora["is_best"], lora["difference_to_best"]) == (True, None)
    assert dora["difference_to_best"]["difference"] == pytest.approx(-0.01)
    low, high = dora["difference_to_best"]["ci95"]
    assert low < 0 <= high
    assert ia3["difference_to_best"]["ci95"][1] < -0.2
    assert [m["is_undominated"] for m in document["methods"]] == [True, False, True]
    assert document["verdict"].startswith(
        "lora scores best, 0.91 (0.90 to 0.92 over 2 seeds), and dora does not clearly differ; ia3 forgets least, 0.01;"
    )
    assert document["exit_code"] == 0


@pytest.mark.parametrize(
    ("right", "failed", "exit_code"), [(90, False, 0), (40, False, 1), (90, True, 3), (40, True, 3)]
)
def test_a_failed_run_is_never_success(tmp_path: Path, right: int, failed: bool, exit_code: int) -> None:
    """A failed gate is 1; a failed run is 3, whatever the others did, and the pages name both."""
    outcomes = [made_up(tmp_path, "lora", 0, right), made_up(tmp_path, "dora", 0, 95)]
    if failed:
        outcomes.append(Outcome("ia3", 0, tmp_path / "ia3-seed0", 3, "non-finite loss | at step 2"))
    document = summarize(tmp_path, outcomes, [])
    write_pages(tmp_path, document)
    assert document["exit_code"] == exit_code
    page, text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("compare.html", "compare.md"))
    assert ("gate failed: min_score by lora" in document["verdict"]) is (right < 50)
    assert ("ia3 did not finish" in document["verdict"]) is failed
    assert ("non-finite loss | at step 2" in page) is failed
    assert ("non-finite loss \\| at step 2" in text) is failed
    assert not re.search(r"https?://|\bsrc=|\bhref=|url\(|@import|<script|<link|<iframe|\son\w+=", page)


def test_what_another_beats_in_everything_is_dominated() -> None:
    points = [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 2.0}, {"a": 0.5, "b": 3.0}, {"a": 1.0, "b": 1.0}]
    found = sweep.undominated(points, [lambda one: one["a"], lambda one: one["b"]])
    assert found == [points[0], points[2], points[3]]


def test_pictures_fade_the_dominated_and_no_label_covers_another(tmp_path: Path) -> None:
    outcomes = [
        made_up(tmp_path, name, 0, 90 + i % 4, worst_drop=0.02 + 0.004 * i, training_seconds=100.0 + 3 * i)
        for i, name in enumerate(
            ["lora", "dora", "adalora", "vera", "prefix_tuning", "prompt_tuning depth=deep", "full"]
        )
    ]
    for picture in (found := pictures(summarize(tmp_path, outcomes, []))):
        boxes = []
        for point in picture.points:
            left = (
                point.text_x - scatter.LETTER * len(point.label) * {"start": 0, "middle": 0.5, "end": 1}[point.anchor]
            )
            boxes.append((left, point.text_y - 6, left + scatter.LETTER * len(point.label), point.text_y + 6))
            assert boxes[-1][0] >= 40
            assert boxes[-1][2] <= scatter.WIDTH
        for index, (a, b, c, d) in enumerate(boxes):
            assert not any(a < g and e < c and b < h and f < d for e, f, g, h in boxes[index + 1 :]), picture.title
    assert [picture.title for picture in found] == [
        "Score against forgetting", "Score against memory", "Score against time",
    ]  # fmt: skip
    bright = [point.label for point in found[0].points if not point.is_dominated]
    assert bright == ["lora", "dora", "adalora", "vera"], "more score for more forgetting, and nothing behind"


def test_the_screen_is_clear_at_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [made_up(tmp_path, label, seed, 90) for seed in (0, 1) for label in ("lora", "prompt_tuning depth=deep")]
    print_sweep(summarize(tmp_path, outcomes, [{"label": "bitfit", "reason": "no biases"}]))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "compare.html" not in line) <= 80
    assert any(re.match(r"\s+lora\s+0\.900\s+\[0\.90, 0\.90\]\s+best\s+✓", line) for line in lines)
    assert any("left out: no biases" in line for line in lines)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Three methods, of which one fails while it runs: the recipe's folder, and what the command did."""
    workspace = tmp_path_factory.mktemp("compared")
    save_base(workspace / "base")
    write_rows(workspace / "train.jsonl", CHAT_ROWS)
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:3])
    recipe = write_recipe(workspace, data={"test": "test.jsonl"}, evaluation={"max_new_tokens": 2, "few_shot": 0})
    return workspace, ftune("compare", recipe, "--methods", f"lora, {EXPLODING}, ia3", "--json")


@pytest.mark.slow
def test_one_run_that_fails_does_not_take_the_others_along(compared: tuple[Path, Any]) -> None:
    workspace, done = compared
    assert done.returncode == 3, done.stderr
    document = json.loads(done.stdout)
    assert document == folder.read_json(workspace / "run-compare" / "compare.json")
    lora, exploding, ia3 = document["methods"]
    assert [lora["num_finished"], exploding["num_failed"], ia3["num_finished"]] == [1, 1, 1]
    [run] = exploding["runs"]
    assert (run["status"], run["exit_code"]) == ("failed", 3)
    assert "non-finite" in run["error"]
    assert lora["peak_memory_bytes"]["mean"] != ia3["peak_memory_bytes"]["mean"], "each process has its own peak"
    assert (workspace / "run-compare" / "lora-seed0" / "report.html").is_file()
    assert "non-finite" in (workspace / "run-compare" / "logs" / f"{run['path']}.log").read_text()
    assert re.search(r"run 2/3 .*\n(.*\n)*.*✗ 2/3.*non-finite", done.stderr)


@pytest.mark.slow
def test_resume_runs_only_what_has_not_finished(compared: tuple[Path, Any]) -> None:
    workspace, _ = compared
    root = workspace / "run-compare"
    before = {path: path.stat().st_mtime_ns for name in ("lora", "ia3") for path in (root / f"{name}-seed0").rglob("*")}
    done = ftune("compare", workspace / "recipe.yaml", "--methods", f"lora, {EXPLODING}, ia3", "--resume")
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("finished before") == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "Without a result" in done.stdout
    changed = ftune("compare", workspace / "recipe.yaml", "training.max_steps=3", "--methods", "lora, ia3", "--resume")
    assert changed.returncode == 2
    assert changed.stderr.count("training.max_steps: 4 -> 3") == 2
    again = ftune("compare", workspace / "recipe.yaml", "--methods", "lora, ia3")
    assert again.returncode == 2
    assert again.stderr.count("this folder holds a run already") == 2


@pytest.mark.slow
def test_a_signal_reaches_the_run_and_what_it_saved_is_resumed(workspace: Path) -> None:
    recipe = write_recipe(workspace, training={"max_steps": 100_000})
    command = [sys.executable, "-m", "ftune", "compare", str(recipe), "--methods", "lora, ia3"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = workspace / "run-compare" / "lora-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130, told
    assert "--resume" in told
    assert "Traceback" not in told
    assert "checkpoint saved" in (workspace / "run-compare" / "logs" / "lora-seed0.log").read_text()
    assert list((workspace / "run-compare" / "lora-seed0" / "checkpoints").glob("step-*"))
    assert not (workspace / "run-compare" / "ia3-seed0").exists()
    assert not (workspace / "run-compare" / lock.NAME).exists()
