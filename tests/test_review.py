"""The review sheet shows what is worth judging, the same each time, and takes verdicts back only if they fit."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ftune, the_problem
from sample_run import sample_report, sample_row, sample_rows, varied_rows, write_run

from ftune import folder
from ftune.errors import UserError
from ftune.recipe import load
from ftune.report import render
from ftune.report.drift import form_drift, length_drift
from ftune.report.marking import MOST_WORDS, Piece, mark
from ftune.report.review import MOST_BYTES, obstacle, review_sheet
from ftune.report.strata import STRATA, choose
from ftune.report.verdicts import summary
from ftune.run.reporting import kept_verdicts, rebuild_report

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert('x')</script> {{ 7 * 7 }} \u202e\x1b[31m"
RECIPE = "evaluation: {review: 50}\n"


def scored(index: int, zero: float, tuned: float) -> dict[str, Any]:
    """An item whose texts are all as expected, so that its scores alone say what it is."""
    row = sample_row(index, 1, 1, 1)
    return {**row, "scores": {"zero_shot": zero, "few_shot": None, "tuned": tuned}, "few_shot": None}


# Which outputs


def test_every_kind_gets_its_places_and_regressions_come_largest_first() -> None:
    rows = [scored(index, 0.0, 1.0) for index in range(300)]
    rows += [scored(300 + index, 0.5 + index / 40, 0.25) for index in range(20)]
    rows += [{**scored(400 + index, 0.0, 1.0), "tuned": "x"} for index in range(20)]
    rows += [{**scored(500 + index, 0.0, 1.0), "tuned": '{"tool": "' + "x" * 300 + '"}'} for index in range(20)]
    rows += [scored(600 + index, 0.0, 0.0) for index in range(20)] + [scored(700 + i, 1.0, 1.0) for i in range(20)]
    chosen, counts = choose(rows, 48)
    assert dict(counts) == {
        "regressions": 20,
        "still wrong": 20,
        "in another form than expected": 40,
        "much longer or shorter than expected": 40,
        "wins": 340,
        "as good before": 20,
    }
    assert [sum(one.stratum == name for one in chosen) for name in STRATA] == [8] * 6
    drops = [one.row["scores"]["zero_shot"] for one in chosen if one.stratum == "regression"]
    assert drops == [0.5 + index / 40 for index in range(19, 11, -1)]
    assert [one.stratum for one in chosen] == sorted((one.stratum for one in chosen), key=list(STRATA).index)


def test_what_one_kind_does_not_need_the_others_get() -> None:
    rows = [scored(index, 0.0, 1.0) for index in range(60)] + [scored(60, 1.0, 0.0)]
    chosen, _ = choose(rows, 50)
    assert len(chosen) == 50
    assert [one.stratum for one in chosen].count("regression") == 1
    assert len({one.row["row_id"] for one in chosen}) == 50
    assert len(choose(rows, 500)[0]) == 61
    assert choose([], 50)[0] == []


def test_the_choice_is_the_same_each_time_and_not_the_head_of_the_file() -> None:
    rows = [scored(index, 0.0, 1.0) for index in range(400)]
    first = [one.row["row_id"] for one in choose(rows, 20)[0]]
    assert first == [one.row["row_id"] for one in choose(rows[::-1], 20)[0]], "whatever the order of the file"
    assert max(int(row_id.split(":")[1]) for row_id in first) > 200


def test_each_output_says_why_it_is_there() -> None:
    by_id = {one.row["row_id"]: one for one in choose(varied_rows(), 67)[0]}
    assert by_id["test.jsonl:102"].stratum == "regression"
    assert by_id["test.jsonl:102"].reasons == [
        "few-shot scored 1.00, tuned 0.00",
        "tuned answers in another form: no longer valid JSON",
    ]
    assert "in a markdown fence" in by_id["test.jsonl:101"].reasons[1]
    assert by_id["test.jsonl:103"].reasons[1] == "tuned answers in another length: 404 characters instead of 44"
    assert by_id["test.jsonl:105"].reasons == ["the best baseline and tuned scored 1.00"]


@pytest.mark.parametrize(
    ("expected", "answer", "drift"),
    [
        ('{"a": 1}', '{"a": 2}', []),
        ('{"a": 1}', '{"a": 1', ["no longer valid JSON"]),
        ('{"a": 1}', '{"b": 1}', ["other keys in the JSON"]),
        ('{"a": 1}', "[1]", ["another kind of JSON value"]),
        ("4", "4 apples", ["no longer a number alone"]),
        ("4", "5", []),
        ("red\nblue", "red, blue", ["1 line instead of 2"]),
        ("a\nb\nc\nd\ne\nf\ng\nh\ni\nj", "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\nk", []),
        ("- red\n- blue", "red\nblue", ["no longer a list"]),
        ("yes", "```\nyes\n```", ["in a markdown fence", "3 lines instead of 1"]),
        ("yes", "  ", ["the answer is empty"]),
        ("", "", []),
    ],
)
def test_another_form_is_noticed_and_another_value_is_none(expected: str, answer: str, drift: list[str]) -> None:
    assert form_drift(expected, answer) == drift


def test_another_length_is_twice_or_half() -> None:
    assert length_drift("x" * 30, "x" * 90) == 3.0
    assert length_drift("x" * 90, "x" * 30) == 3.0
    assert length_drift("x" * 30, "x" * 55) == 0.0
    assert length_drift("no", "never") == 0.0, "a few characters more are no drift"
    assert length_drift("x" * 30, "") == 30.0


# Differences to the expected answer


def test_differences_are_marked_word_by_word() -> None:
    found = mark("The boiler passed its inspection.", "The boiler failed its inspection!")
    assert found.pieces == [
        Piece("same", "The boiler "),
        Piece("extra", "failed"),
        Piece("missing", "passed"),
        Piece("same", " its inspection"),
        Piece("extra", "!"),
        Piece("missing", "."),
    ]
    assert mark("a b", " a b\n") == mark("a b", "a b")
    assert mark("a b", "a b").told == "as expected"
    assert mark("Lima", "I do not know that one.").told == "another text"
    assert mark("Lima", " ").told == "empty"
    assert [p.kind for p in mark("100度で沸騰", "90度で沸騰").pieces] == ["extra", "missing", "same"]
    assert Piece("extra", "⏎\n") in mark("one two three four", "one two\nthree four").pieces, "spaces are visible"


def test_long_answers_are_compared_in_time() -> None:
    expected, answer = "so it goes " * 4000, "so it goes " * 3990 + "and ends"
    began = time.perf_counter()
    pieces = mark(expected, answer).pieces
    assert time.perf_counter() - began < 2
    assert "".join(piece.text for piece in pieces if piece.kind != "missing") == answer
    assert len(pieces) <= 4
    assert len(expected.split()) > MOST_WORDS


# The page


class Tags(HTMLParser):
    """The elements of a page and the text of its JSON, as a browser's parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.document = ""
        self.in_document = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        self.in_document = ("id", "run") in attrs

    def handle_data(self, data: str) -> None:
        if self.in_document:
            self.document += data

    def handle_endtag(self, tag: str) -> None:
        self.in_document = False


def test_hostile_text_stays_text_on_the_sheet() -> None:
    row = {**sample_row(1, 0, 0, 1, prompt=HOSTILE), "row_id": HOSTILE, "base": HOSTILE, "tuned": HOSTILE}
    page = review_sheet(HOSTILE, RECIPE, [{**row, "expected": HOSTILE, "few_shot": HOSTILE + " more"}]).page
    assert page is not None
    tags = Tags(page)
    assert tags.names.count("script") == 2, "the data and our own script"
    assert "img" not in tags.names
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name in ("src", "href")]
    assert json.loads(tags.document)["items"][0]["row_id"] == HOSTILE
    assert "49" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page, "text that turns the direction is shown as a number"


def test_the_sheet_needs_nothing_from_outside() -> None:
    page = review_sheet("run", RECIPE, varied_rows()).page
    assert page is not None
    assert not re.search(r"https?://|\bsrc=|\bhref=|url\(|@import|<link|<iframe|\son\w+=|fetch\(|XMLHttp", page)
    assert "default-src 'none'" in page
    assert "script-src 'sha256-" in page, "no other script may run"


@pytest.mark.parametrize(("num_rows", "length"), [(50, 200_000), (5000, 300), (1, 5_000_000)])
def test_the_sheet_stays_below_two_megabytes(num_rows: int, length: int) -> None:
    words = ("lorem <ipsum> & " * (length // 16))[:length]
    rows = [{**sample_row(index, 0, 0, 0, prompt=words), "base": words, "few_shot": words} for index in range(num_rows)]
    sheet = review_sheet("run", f"evaluation: {{review: {num_rows}}}", rows)
    assert sheet.page is not None
    assert len(sheet.page.encode()) <= MOST_BYTES < 2_000_000
    assert sheet.num_shown == sheet.page.count("<article")
    assert sheet.num_shown == min(num_rows, 50) or num_rows > 50
    assert sheet.num_shown > 100 or num_rows <= 50, "short texts are not left out for long ones"


def test_the_same_run_gives_the_same_bytes_and_another_one_another_identity(tmp_path: Path) -> None:
    run = write_run(tmp_path, sample_report(), varied_rows())
    render(run)
    first = (run / "review.html").read_bytes()
    render(run)
    assert (run / "review.html").read_bytes() == first

    def identity_of(recipe: str, rows: list[dict[str, Any]]) -> str:
        page = review_sheet("run", recipe, rows).page
        assert page is not None
        return str(json.loads(Tags(page).document)["run"])

    rows = varied_rows()
    found = {
        identity_of(RECIPE, rows),
        identity_of(RECIPE + "output: {dir: elsewhere}", rows),
        identity_of(RECIPE, [{**rows[0], "tuned": "other"}, *rows[1:]]),
    }
    assert len(found) == 3


def test_blind_orders_differ_and_are_fixed() -> None:
    page = review_sheet("run", RECIPE, varied_rows()).page
    assert page is not None
    document = json.loads(Tags(page).document)
    assert len({tuple(item["order"]) for item in document["items"]}) == 6, "every order of three answers occurs"
    assert sorted(document["blind_order"]) == list(range(50))
    assert document["blind_order"] != list(range(50)), "the order of kinds would tell what comes next"


@pytest.mark.parametrize(
    ("recipe", "rows", "reason"),
    [
        ("objective: {name: classification}", sample_rows(), "a classifier answers with labels"),
        ("evaluation: {review: 0}", sample_rows(), "evaluation.review is 0"),
        (RECIPE, [], "no answers were recorded"),
        (RECIPE, [{**row, "base": None, "few_shot": None} for row in sample_rows()], "no answers of the base"),
    ],
)
def test_where_there_is_no_sheet_the_report_says_why(tmp_path: Path, recipe: str, rows: Any, reason: str) -> None:
    run = write_run(tmp_path, sample_report(), rows)
    folder.write_text(run / "recipe.yaml", recipe)
    folder.write_text(run / "review.html", "an older one")
    render(run)
    assert obstacle(recipe, rows).startswith(reason)
    assert not (run / "review.html").exists()
    page = (run / "report.html").read_text()
    assert reason in page
    with pytest.raises(UserError, match=f"no review sheet: {reason}"):
        rebuild_report(run, run / "verdicts.json")


def test_a_sheet_without_few_shot_answers_has_two(tmp_path: Path) -> None:
    rows = [scored(index, 0.0, 1.0) for index in range(3)]
    page = review_sheet("run", None, rows).page
    assert page is not None
    assert page.count('class="answer"') == 6
    assert "few-shot</span>" not in page


def test_the_recipe_takes_a_number_of_outputs(write: Any) -> None:
    minimal = "model: ./base\nmethod: lora\ndata: {train: train.jsonl}\n"
    assert load(write(minimal)).evaluation.review == 50
    assert load(write(minimal), ["evaluation.review=0"]).evaluation.review == 0
    assert load(write(minimal), ["evaluation.review=7"]).evaluation.review == 7
    assert "evaluation.review" in the_problem(write(minimal), ["evaluation.review=-1"]).where


# Verdicts


def finished(path: Path, rows: list[dict[str, Any]] | None = None) -> tuple[Path, dict[str, Any]]:
    """A run that is complete, and an empty document of verdicts on it."""
    run = write_run(path / "run", sample_report(), varied_rows() if rows is None else rows)
    render(run)
    manifest = folder.read_json(run / "manifest.json")
    names = folder.checksums(run, exclude=("manifest.json",))
    folder.write_json(run / "manifest.json", {**manifest, "files": names})
    document = json.loads(Tags((run / "review.html").read_text()).document)
    return run, {**{key: document[key] for key in ("format", "run", "name")}, "verdicts": []}


def verdict(row_id: str, best: Any = None, tuned: Any = None, blind: bool = False) -> dict[str, Any]:
    return {"row_id": row_id, "best": best, "tuned": tuned, "blind": blind}


def test_verdicts_are_taken_into_every_report(tmp_path: Path) -> None:
    run, document = finished(tmp_path)
    document["verdicts"] = [
        verdict("test.jsonl:101", "tuned", "good", blind=True),
        verdict("test.jsonl:102", "few_shot", "bad"),
        verdict("test.jsonl:103", "none", None),
        verdict("test.jsonl:105", None, "good"),
    ]
    folder.write_json(tmp_path / "verdicts.json", document)
    done = ftune("report", run, "--review", tmp_path / "verdicts.json")
    assert (done.returncode, done.stdout) == (0, f"{run / 'report.html'}\n"), done.stderr
    found = folder.read_json(run / "report.json")["review"]
    assert {key: found[key] for key in ("n", "blind", "compared", "preferred", "good", "bad")} == {
        "n": 4,
        "blind": 1,
        "compared": 3,
        "preferred": {"zero_shot": 0, "few_shot": 1, "tuned": 1, "none": 1},
        "good": 2,
        "bad": 1,
    }
    assert found["agreement"]["tuned"] == {"n": 3, "agreed": 2, "ci95": pytest.approx([0.2077, 0.9385], abs=1e-4)}
    assert found["agreement"]["best"]["agreed"] == 2, "102: few-shot scored highest; 103: none did"
    assert found["intervals"]["preferred"]["tuned"] == pytest.approx([0.0615, 0.7923], abs=1e-4), "Wilson's, 1 of 3"
    assert folder.read_json(run / "review.json") == document
    assert "What did people prefer?" in (run / "report.html").read_text()
    assert "| tuned best | 1 of 3 | [0.06, 0.79] |" in (run / "report.md").read_text()
    files = folder.read_json(run / "manifest.json")["files"]
    assert "review.json" in files
    assert not folder.changed_files(run, files), "a verified run stays one"
    before = (run / "report.html").read_bytes()
    assert ftune("report", run).returncode == 0
    assert (run / "report.html").read_bytes() == before


def test_answers_of_the_same_text_are_preferred_together() -> None:
    row = sample_row(1, 0, 1, 1)
    found = summary([verdict(row["row_id"], "few_shot")], [row])
    assert found["preferred"] == {"zero_shot": 0, "few_shot": 1, "tuned": 1, "none": 0}
    assert found["agreement"]["best"]["agreed"] == 1
    tie = sample_row(2, 1, 1, 1)
    assert summary([verdict(tie["row_id"], "none")], [tie])["agreement"]["best"]["agreed"] == 1
    worse = sample_row(3, 1, 0, 0)
    assert summary([verdict(worse["row_id"], "tuned")], [worse])["agreement"]["best"]["agreed"] == 0


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"run": "0" * 16}, "these verdicts are about other answers"),
        ({"format": "something"}, "this is no file of verdicts"),
        ({"verdicts": {}}, "this is no file of verdicts"),
        ({"verdicts": []}, "there is no verdict in it"),
        ({"verdicts": [verdict("test.jsonl:9999", "tuned")]}, "no row 'test.jsonl:9999'"),
        (
            {"verdicts": [verdict("test.jsonl:101", "gpt")]},
            "best is 'gpt', not one of zero_shot, few_shot, tuned, none",
        ),
        ({"verdicts": [verdict("test.jsonl:101", None, "fine")]}, "tuned is 'fine', not good, bad or null"),
        ({"verdicts": [verdict("test.jsonl:101")]}, "nothing is said of row"),
        ({"verdicts": [verdict("test.jsonl:101", "tuned")] * 2}, "a second verdict on row"),
        ({"verdicts": [verdict("test.jsonl:101", ["tuned"])]}, "best is"),
    ],
)
def test_verdicts_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    run, document = finished(tmp_path)
    folder.write_json(tmp_path / "verdicts.json", document | changes)
    before = folder.checksums(run)
    with pytest.raises(UserError) as caught:
        rebuild_report(run, tmp_path / "verdicts.json")
    assert what in str(caught.value)
    assert folder.checksums(run) == before, "nothing is written"


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\udcff"])
def test_broken_files_of_verdicts_are_told_without_a_traceback(tmp_path: Path, text: str) -> None:
    run, _ = finished(tmp_path)
    (tmp_path / "verdicts.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"not valid JSON|not UTF-8|no file of verdicts"):
        rebuild_report(run, tmp_path / "verdicts.json")
    with pytest.raises(UserError, match="no such file"):
        rebuild_report(run, tmp_path / "missing.json")


def test_verdicts_on_changed_answers_are_refused(tmp_path: Path) -> None:
    run, document = finished(tmp_path)
    folder.write_json(tmp_path / "verdicts.json", {**document, "verdicts": [verdict("test.jsonl:101", "tuned")]})
    report = folder.read_json(run / "report.json")
    folder.write_json(run / "report.json", {**report, "name": "better"})
    with pytest.raises(UserError, match=r"changed since the run wrote it: report\.json"):
        rebuild_report(run, tmp_path / "verdicts.json")


def test_rendering_again_does_not_bless_what_was_tampered_with(tmp_path: Path) -> None:
    run, _ = finished(tmp_path)
    report = folder.read_json(run / "report.json")
    folder.write_json(run / "report.json", {**report, "name": "better"})
    rebuild_report(run)
    assert folder.changed_files(run, folder.read_json(run / "manifest.json")["files"]) == ["report.json"]


def test_verdicts_survive_a_new_evaluation_with_the_same_answers_only(tmp_path: Path, capsys: Any) -> None:
    run, document = finished(tmp_path)
    assert kept_verdicts(folder.RunFolder(run)) == {}
    folder.write_json(run / "review.json", {**document, "verdicts": [verdict("test.jsonl:101", "tuned")]})
    assert kept_verdicts(folder.RunFolder(run))["review"]["n"] == 1
    folder.write_json_lines(run / "samples.jsonl", sample_rows())
    assert kept_verdicts(folder.RunFolder(run)) == {}
    assert "the review is left out of the report" in capsys.readouterr().err
