"""report.json is what its JSON Schema says: of real runs of every kind, and of nothing else."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import CHAT_ROWS, REPOSITORY, chat, ftune, run, write_rows
from sample_run import sample_report

from ftune import folder
from ftune.report.schema import documentation, report_schema

VALIDATOR = jsonschema.Draft202012Validator(report_schema())
PROBE = [{"suite": "s", **chat(f"q{i}", "a")} for i in range(4)] + [{"text": "some words"}]
LABELS = [{"text": f"{'ab'[i % 2] * 4} {i}", "label": "xy"[i % 2]} for i in range(16)]
CLASSIFICATION = {"objective": {"name": "classification"}, "test_rows": LABELS[:4], "train_rows": LABELS}
KINDS: dict[str, dict[str, Any]] = {
    "nothing measured": {"test_rows": None, "probe_rows": None},
    "exact_match, with everything": {
        "evaluation": {"metric": "exact_match", "few_shot": 2},
        "gates": {"min_score": 0.5},
    },
    "contains, no probe": {"evaluation": {"metric": "contains"}, "probe_rows": None},
    "json_match, no test": {"evaluation": {"metric": "json_match"}, "test_rows": None},
    "loss": {"evaluation": {"metric": "loss"}},
    "accuracy": {**CLASSIFICATION, "evaluation": {"metric": "accuracy"}, "probe_rows": None},
    "f1": {**CLASSIFICATION, "evaluation": {"metric": "f1"}, "probe_rows": None},
    "full": {"method": {"name": "full"}},
    "ia3": {"method": {"name": "ia3"}},
    "prompt_tuning, which cannot be merged": {"method": {"name": "prompt_tuning", "virtual_tokens": 2}},
}


def errors(document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(document)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_of_every_kind_of_run_is_valid(workspace: Path, kind: str) -> None:
    sections = {"test_rows": CHAT_ROWS[:3], "probe_rows": PROBE, **copy.deepcopy(KINDS[kind])}
    evaluation = {"max_new_tokens": 2, **sections.pop("evaluation", {})}
    data: dict[str, Any] = {}
    write_rows(workspace / "train.jsonl", sections.pop("train_rows", CHAT_ROWS))
    if (rows := sections.pop("test_rows")) is not None:
        data["test"] = write_rows(workspace / "test.jsonl", rows).name
    if (rows := sections.pop("probe_rows")) is not None:
        evaluation["probe"] = write_rows(workspace / "probe.jsonl", rows).name
    document, path = run(workspace, data=data, evaluation=evaluation, training={"max_steps": 1}, **sections)
    assert errors(document) == []
    assert errors(folder.read_json(path / "report.json")) == []
    assert (document["task"] is not None) is ("test" in data)


def changed(path: str, value: Any) -> dict[str, Any]:
    document = complete()
    *around, last = path.split(".")
    part = document
    for key in around:
        part = part[int(key) if key.isdigit() else key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return document


def complete() -> dict[str, Any]:
    """A report with every part, those that only some runs have, too."""
    document = sample_report()
    document["cost"]["training_seconds"] = 180.0
    suite = document["forgetting"]["suites"][0]
    document["forgetting"] |= {"overall": {**suite, "name": None}, "kl_to_base_on_task": 0.2}
    document["path"] = [{"step": 0, "validation_loss": None, "score": 0.0, "worst_drop": 0.0, "general_loss": 2.4}]
    document["selection"] = {"select": "best", "step": 250, "reason": "the best score within gates.max_forgetting"}
    document["strengths"] = [{"strength": 0.5, "score": 0.8, "ci95": [0.7, 0.9], "worst_drop": 0.02}]
    whole: dict[str, Any] = json.loads(json.dumps({**document, "verdict": "good"}))
    return whole


def test_every_part_may_be_there_and_more_than_is_told() -> None:
    assert errors(complete()) == []
    assert errors({**complete(), "note_of_a_later_version": {"x": 1}}) == []
    assert errors(changed("task.rouge_1", 0.5)) == []


WRONG = [
    ("schema", 2), ("schema", ...), ("name", None), ("verdict", ...), ("gates", None), ("gates.0.passed", "yes"),
    ("gates.0.limit", ...), ("task.metric", 3), ("task.n", 0), ("task.ci95", [0.1]), ("task.tuned", "0.9"),
    ("task.gain", ...), ("forgetting.suites.0.verdict", "fine"), ("forgetting.suites.0.drop", None),
    ("forgetting.suites.0.name", ...), ("forgetting.general_loss", None), ("forgetting.overall.n", "4"),
    ("artefact", None), ("artefact.keys_loaded", "all"), ("artefact.tolerance", ...), ("cost.seconds", ...),
    ("cost", None), ("data.rows_in", 1.5), ("data.dropped", {"too_long": "4"}), ("path.0.step", -1),
    ("selection.select", ...), ("strengths.0.strength", "half"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{path}={value}" for path, value in WRONG])
def test_what_is_told_is_typed(path: str, value: Any) -> None:
    assert len(errors(changed(path, value))) == 1


def test_the_command_prints_a_valid_schema_and_the_page_is_made_from_it() -> None:
    done = ftune("schema", "--report")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == report_schema()
    jsonschema.Draft202012Validator.check_schema(report_schema())
    assert json.loads(ftune("schema").stdout)["title"] == "ftune recipe"
    assert (REPOSITORY / "docs" / "report.md").read_text(encoding="utf-8") == documentation()
