"""The report says what was measured and nothing else, from the run folder alone."""

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from sample_run import sample_report, sample_row, sample_rows, task, write_run

from ftune import folder
from ftune.errors import UserError
from ftune.report import curves, flips, render, samples, verdict

HOSTILE = "<script>alert('x')</script> & \"quotes\" ]]> | cell \x00\x1b[31m"
PAGES = ("report.html", "report.md", "junit.xml")


def read(path: Path) -> tuple[str, str, ElementTree.Element]:
    page, text, xml = ((path / name).read_text(encoding="utf-8") for name in PAGES)
    return page, text, ElementTree.fromstring(xml)


def test_the_verdict_says_what_was_learned_and_what_forgotten() -> None:
    assert verdict(sample_report()) == (
        "Tuned 0.97 [0.94, 0.98] beats the better of zero-shot 0.00 and few-shot 0.12 by 0.85 [0.80, 0.89]; "
        "worst forgetting: sorting 0.12 [0.07, 0.17] (forgot); gate failed: max_forgetting."
    )


def test_the_verdict_does_not_claim_what_the_interval_does_not_carry() -> None:
    assert "does not clearly differ from" in verdict({"task": task(100, 102, 104)})
    assert "is worse than the better of" in verdict({"task": task(0, 200, 120)})
    assert verdict({}) == "The task was not measured; forgetting was not measured."
    without = {"task": {**task(0, 0, 290), "few_shot": None}, "forgetting": {"reason": "no probe"}}
    first, second = verdict(without).split("; ")
    assert re.fullmatch(r"Tuned 0\.97 \[.*\] beats zero-shot 0\.00 by 0\.97 \[.*\]", first)
    assert second == "forgetting was not measured (no probe)."


def test_the_verdict_knows_that_a_lower_loss_is_better() -> None:
    loss = {
        "metric": "loss",
        "n": 9,
        "zero_shot": 4.28,
        "few_shot": None,
        "tuned": 0.8,
        "gain": 3.48,
        "ci95": None,
    }
    sentence = verdict({"task": loss})
    assert sentence.startswith("Tuned loss 0.80 is better than zero-shot 4.28 by 3.48, without an interval;")


def test_the_page_tells_everything(tmp_path: Path) -> None:
    report = sample_report()
    render(write_run(tmp_path, report))
    page, text, _ = read(tmp_path)
    for name in ("addition", "sorting", "facts", "look-up"):
        assert name in page
        assert name in text
    assert verdict(report) in page
    assert {"✗ forgot", "✓ kept", "84/84", "2.4e-06", "61,240", "torch 2.13.0", "rank: 16"} <= {
        part
        for part in ("✗ forgot", "✓ kept", "84/84", "2.4e-06", "61,240", "torch 2.13.0", "rank: 16")
        if part in page
    }
    assert page.count("<article") == samples.MOST_SHOWN + flips.MOST_SHOWN
    assert page.count('<figure class="chart"') == 3 + 2, "of training; path and strengths"


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    render(write_run(tmp_path, sample_report()))
    page, _, _ = read(tmp_path)
    assert not re.search(r"https?://|\bsrc=|\bhref=|url\(|@import|<script|<link|<iframe|\son\w+=", page)
    assert "default-src 'none'" in page


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    report = sample_report()
    report["name"] = report["forgetting"]["suites"][0]["name"] = report["gates"][1]["name"] = HOSTILE
    report["data"]["dropped"] = {HOSTILE: 2}
    row = {**sample_row(1, 0, 0, 1, prompt=HOSTILE), "base": HOSTILE, "tuned": HOSTILE, "expected": HOSTILE}
    run = write_run(tmp_path, report, [row])
    folder.write_text(run / "recipe.yaml", f"model: {HOSTILE}")
    render(run)
    page, text, xml = read(run)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<script" not in text
    assert "\x1b" not in page + text
    (line,) = [line for line in text.splitlines() if "n = 200" in line and "alert" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == 7, "a bar in a name must not end a cell"
    assert any("<script>" in str(case.get("name")) for case in xml.iter("testcase"))


def test_what_is_missing_is_said_and_not_invented(tmp_path: Path) -> None:
    folder.write_json(tmp_path / "report.json", {"schema": 1})
    render(tmp_path)
    page, text, xml = read(tmp_path)
    for words in (
        "Not measured",
        "No gates were set",
        "The steps were not recorded",
        "No answers were recorded",
    ):
        assert words in page
    for words in ("manifest was not recorded", "recipe was not recorded"):
        assert words in page
    assert "None" not in page
    assert "Not measured" in text
    assert xml.get("failures") == "0"
    assert xml.get("skipped") == "4"


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("task", None),
        ("task", {"few_shot": None, "reason": "evaluation.few_shot is 0"}),
        ("task", {"tuned": None, "gain": None, "ci95": None, "reason": "no test set"}),
        ("forgetting", None),
        ("forgetting", {"suites": [], "reason": "the probe is off"}),
        ("forgetting", {"general_loss": {"before": None, "after": None}, "kl_to_base": None}),
        ("artefact", {"merged_max_diff": None, "reason": "prefixes cannot be merged"}),
        ("cost", {"seconds": None, "peak_memory_bytes": None}),
        ("data", {"dropped": {}, "duplicates": None}),
    ],
)
def test_each_part_may_be_missing(tmp_path: Path, part: str, changes: dict[str, Any] | None) -> None:
    report = sample_report()
    report[part] = None if changes is None else {**report[part], **changes}
    render(write_run(tmp_path, report))
    page, text, _ = read(tmp_path)
    assert "not measured" in page.lower() or part in ("data", "task")
    assert "None" not in page
    assert "None" not in text
    if changes and changes.get("reason"):
        assert changes["reason"] in page


def test_junit_counts_the_failures(tmp_path: Path) -> None:
    report = sample_report()
    report["artefact"] = {**report["artefact"], "keys_loaded": "80/84", "merged_max_diff": None}
    render(write_run(tmp_path, report))
    _, _, xml = read(tmp_path)
    assert (xml.get("tests"), xml.get("failures"), xml.get("skipped")) == ("10", "2", "1")
    failed = {
        case.get("name"): case.find("failure") for case in xml.iter("testcase") if case.find("failure") is not None
    }
    assert set(failed) == {"max_forgetting", "keys_loaded"}
    message = failed["max_forgetting"]
    assert message is not None
    assert message.get("message") == "max_forgetting is 0.120, its limit is 0.100"
    properties = {p.get("name"): p.get("value") for p in xml.iterfind(".//testcase[@name='sorting']//property")}
    assert properties["verdict"] == "forgot"


def test_markdown_for_a_pull_request(tmp_path: Path) -> None:
    render(write_run(tmp_path, sample_report()))
    _, text, _ = read(tmp_path)
    assert text.startswith("# quickstart\n\nTuned 0.97 [0.94, 0.98] beats")
    assert "| ❌ max\\_forgetting | 0.120 | 0.100 |" in text
    assert "| tuned | 0.970 | [0.944, 0.984] |" in text
    assert "| sorting (n = 200) | 0.940 → 0.820 | 0.120 | " in text
    assert "2,000 rows in, 1,994 used, 6 dropped (too\\_long 4, duplicate 2)." in text
    assert len(text.splitlines()) < 75


def test_a_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path, sample_report())
    render(run)
    first = {name: (run / name).read_bytes() for name in PAGES}
    manifest = folder.read_json(run / "manifest.json")
    folder.write_json(run / "manifest.json", {**manifest, "files": folder.checksums(run)})
    render(run)
    assert first == {name: (run / name).read_bytes() for name in PAGES}, "also when the manifest has its checksums"


def test_no_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.json"):
        render(tmp_path)


def test_the_bad_news_comes_first() -> None:
    shown, counts = samples.choose(sample_rows())
    assert [one.kind for one in shown] == sorted((one.kind for one in shown), key=list(samples.KINDS).index)
    assert [number for _, number in counts] == [3, 6, 40, 12]
    assert sum(one.kind == "regression" for one in shown) == 3
    assert len(samples.choose(sample_rows()[:5])[0]) == 5
    assert samples.choose([])[0] == []


def test_curves_keep_the_extremes_and_skip_what_is_no_number() -> None:
    spike = [(float(step), 9.0 if step == 5000 else 1.0) for step in range(1, 10_001)]
    drawn = curves.chart("Loss", "", [curves.Series("loss", "raw", [*spike, (10_001.0, math.nan)])])
    assert drawn is not None
    assert drawn.paths[0][2].count("L") < curves.MOST_POINTS
    assert "nan" not in drawn.paths[0][2]
    heights = [float(height) for height in re.findall(r" (\d+\.\d)", drawn.paths[0][2])]
    assert min(heights) < 150, "the spike is near the top"
    assert curves.chart("Loss", "", []) is None


@pytest.mark.parametrize(("high", "ticks"), [(1.0, [0, 0.25, 0.5, 0.75, 1.0]), (375.0, [0, 100, 200, 300, 400])])
def test_ticks_are_round(high: float, ticks: list[float]) -> None:
    assert curves.linear_ticks(0, high) == ticks


def test_smoothing_does_not_lag() -> None:
    line = [(float(step), 100.0 - step) for step in range(200)]
    assert [round(y, 9) for _, y in curves.smooth(line)][:190] == [y for _, y in line][:190]
    zigzag = [(float(step), float(step % 2)) for step in range(200)]
    assert all(0.3 < y < 0.7 for _, y in curves.smooth(zigzag)[20:-20])
    assert curves.smooth([]) == []
