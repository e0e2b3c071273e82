"""The CI job of examples/ci, run here step by step as a runner would: its exit codes, and what it publishes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import junitparser
import pytest
import yaml
from conftest import CHAT_ROWS, REPOSITORY, save_base, write_recipe, write_rows

from ftune import folder
from ftune.recipe import load
from ftune.run.preview import check

EXAMPLE = REPOSITORY / "examples" / "ci"
WORKFLOW = yaml.safe_load((EXAMPLE / "github.yml").read_text(encoding="utf-8"))
[JOB] = WORKFLOW["jobs"].values()
STEPS = {step.get("name", step.get("uses")): step for step in JOB["steps"]}
OURS = ("Check", "Train", "Summary")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository, and a `ftune` on the path as pip would have put it there."""
    path = tmp_path_factory.mktemp("project")
    save_base(path / "base")
    write_rows(path / "train.jsonl", CHAT_ROWS)
    write_rows(path / "test.jsonl", CHAT_ROWS[:3])
    script = path / "bin" / "ftune"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m ftune "$@"\n')
    script.chmod(0o755)
    return path


def environment(project: Path, name: str) -> dict[str, str]:
    own = {"RECIPE": str(project / "recipe.yaml"), "RUN": str(project / name), "OMP_NUM_THREADS": "1"}
    own |= {"GITHUB_STEP_SUMMARY": str(project / f"{name}.summary"), "FTUNE_CACHE": str(project / "cache")}
    return {**os.environ, **own, "PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}", "CI": "true"}


def run_job(project: Path, name: str, **sections: Any) -> tuple[dict[str, int], Path, str]:
    """The job's steps of ours, in the shell that the runner uses: their exit codes, the run folder, the summary."""
    sections = {"data": {"test": "test.jsonl"}, "evaluation": {"max_new_tokens": 2, "few_shot": 0}, **sections}
    write_recipe(project, output={"dir": name}, **sections)
    variables, codes = environment(project, name), {}
    for step in OURS:
        if any(codes.values()) and not str(STEPS[step].get("if", "")).startswith("always()"):
            continue
        command = ["bash", "-e", "-c", STEPS[step]["run"]]
        codes[step] = subprocess.run(command, cwd=project, env=variables, check=False, capture_output=True).returncode
    summary = Path(variables["GITHUB_STEP_SUMMARY"])
    return codes, project / name, summary.read_text(encoding="utf-8") if summary.is_file() else ""


def cases(path: Path) -> dict[str, junitparser.TestCase]:
    """junit.xml's cases by their names, read by a library."""
    xml = junitparser.JUnitXml.fromfile(str(path / "junit.xml"))
    suites = [xml] if isinstance(xml, junitparser.TestSuite) else list(xml)
    return {case.name: case for suite in suites for case in suite}


def failed(path: Path) -> list[str]:
    return [
        name for name, case in cases(path).items() if any(isinstance(one, junitparser.Failure) for one in case.result)
    ]


def test_every_gate_held_is_0(project: Path) -> None:
    codes, path, summary = run_job(project, "held", gates={"min_score": 0.0})
    assert codes == {"Check": 0, "Train": 0, "Summary": 0}
    assert summary == (path / "report.md").read_text(encoding="utf-8")
    assert failed(path) == []
    assert "min_score" in cases(path)


def test_a_failed_gate_is_1_and_is_named_everywhere(project: Path) -> None:
    codes, path, summary = run_job(project, "gated", gates={"min_score": 0.9, "min_gain": -1.0})
    assert codes == {"Check": 0, "Train": 1, "Summary": 0}
    assert failed(path) == ["min_score"]
    [failure] = cases(path)["min_score"].result
    assert re.fullmatch(r"min_score is \S+, its limit is 0\.900", failure.message)
    report = folder.read_json(path / "report.json")
    assert [gate["name"] for gate in report["gates"] if not gate["passed"]] == ["min_score"]
    assert "gate failed: min_score" in report["verdict"]
    assert "❌ min\\_score" in summary
    assert "✅ min\\_gain" in summary
    assert "✗ min_score" in (path / "report.html").read_text(encoding="utf-8")


def test_a_wrong_recipe_is_2_and_nothing_is_written(project: Path) -> None:
    codes, path, summary = run_job(project, "wrong", training={"learning_rat": 1})
    assert codes == {"Check": 2, "Summary": 0}
    assert (path.exists(), summary) == (False, "")


def test_what_fails_while_running_is_3(project: Path) -> None:
    training = {"learning_rate": 1e20, "max_grad_norm": 1e30, "max_steps": 50, "optimizer": "sgd"}
    codes, path, summary = run_job(project, "exploded", training=training)
    assert codes == {"Check": 0, "Train": 3, "Summary": 0}
    assert summary == ""
    assert not (path / "report.json").exists(), "nothing that could be taken for a result"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_cancelled_job_saves_its_checkpoint(project: Path, number: signal.Signals, code: int) -> None:
    """A runner signals every process of the step."""
    name = f"cancelled-{code}"
    write_recipe(project, output={"dir": name}, training={"max_steps": 100_000})
    command = ["bash", "-e", "-c", f"exec {STEPS['Train']['run']}"]
    variables = environment(project, name)
    with subprocess.Popen(
        command, cwd=project, env=variables, stderr=subprocess.DEVNULL, start_new_session=True
    ) as job:
        metrics = project / name / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(job.pid, number)
    assert job.returncode == code
    assert list((project / name / "checkpoints").glob("step-*"))


def test_the_workflow_goes_together_with_its_recipe() -> None:
    """Paths, names and rights that a workflow can get wrong without anybody noticing."""
    recipe = load(REPOSITORY / WORKFLOW["env"]["RECIPE"])
    assert recipe.output.dir == REPOSITORY / WORKFLOW["env"]["RUN"]
    assert check(recipe)["problems"] == []
    assert recipe.gates.min_score is not None
    assert {"checks": "write", "pull-requests": "write"}.items() <= WORKFLOW["permissions"].items()
    for name in ("Summary", "Run folder", "Gates", "Comment"):
        assert STEPS[name]["if"].startswith("always()"), f"{name} is for failed runs, too"
    for pattern in WORKFLOW[True]["pull_request"]["paths"]:  # YAML 1.1 reads `on` as true
        assert list(REPOSITORY.glob(pattern.replace("/**", ""))), f"nothing lies at {pattern}"
    used = set(re.findall(r"\$(?:\{\{ env\.)?([A-Z][A-Z_]+)", (EXAMPLE / "github.yml").read_text(encoding="utf-8")))
    known = WORKFLOW["env"].keys() | STEPS["Comment"]["env"].keys() | {"GITHUB_STEP_SUMMARY"}
    assert used <= known


def test_the_other_job_runs_the_same_commands() -> None:
    [other] = yaml.safe_load((EXAMPLE / "gitlab.yml").read_text(encoding="utf-8")).values()
    assert other["script"] == [STEPS["Check"]["run"], STEPS["Train"]["run"]]
    assert other["before_script"] == [STEPS["Install"]["run"]]
    assert {key: other["variables"][key] for key in ("RECIPE", "RUN")} == {
        key: WORKFLOW["env"][key] for key in ("RECIPE", "RUN")
    }
    assert other["artifacts"]["reports"]["junit"] == "$RUN/junit.xml"
    assert other["artifacts"]["when"] == "always"


def test_the_page_shows_the_jobs_as_they_are_and_names_tests_that_exist() -> None:
    page = (REPOSITORY / "docs" / "ci.md").read_text(encoding="utf-8")
    for name in ("github.yml", "gitlab.yml"):
        assert (EXAMPLE / name).read_text(encoding="utf-8") in page, f"docs/ci.md shows another {name}"
    named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", page)
    assert len(named) >= 6
    for file, test in named:
        assert f"def {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), f"{file} has no {test}"
