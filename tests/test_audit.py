"""The audit's figures are those of a plain count, whatever the rows; what it finds blocking names the fix."""

import json
import pickle
from collections import Counter
from io import StringIO
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from audit_kit import ROWS, UNHURRIED, RowFigures, audit_of, columns_of, good
from conftest import chat, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ftune import chat as chats
from ftune.console.audit import bar, print_audit
from ftune.data import findings
from ftune.data.audit import LOG_RATIO, NO_LABELS, NUM_LONGEST, ROLES, Audit, Columns, histogram
from ftune.data.audit import quantiles as quantiles_of


def plain_count(rows: list[RowFigures]) -> dict[str, Any]:
    used = [row for row in rows if row.dropped is None]
    return {
        "rows_in": len(rows),
        "rows_used": len(used),
        "dropped": dict(Counter(row.dropped for row in rows if row.dropped)),
        "tokens_in": sum(sum(row.tokens.values()) for row in rows),
        "tokens": sum(sum(row.tokens.values()) - sum(row.truncated.values()) for row in used),
        "tokens_truncated": sum(sum(row.truncated.values()) for row in used),
        "supervised_tokens": sum(sum(row.supervised.values()) for row in used),
        "rows_without_supervision": sum(not sum(row.supervised.values()) for row in used)
        + sum(row.dropped == NO_LABELS for row in rows),
        "end_of_turn": {
            "tokens": sum(row.end_of_turn for row in used),
            "supervised": sum(row.end_of_turn_supervised for row in used),
        },
    }


@UNHURRIED
@given(ROWS)
def test_the_audit_is_a_plain_count(rows: list[RowFigures]) -> None:
    found = audit_of(rows).as_dict()
    expected = plain_count(rows)
    assert {key: found[key] for key in expected} == expected
    for name, figures in found["sources"].items():
        alone = plain_count([row for row in rows if row.source == name])
        assert (figures["rows_in"], figures["rows_used"]) == (alone["rows_in"], alone["rows_used"])
        assert (figures["dropped"], figures["tokens_in"]) == (alone["dropped"], alone["tokens_in"])
    for role, figures in found["roles"].items():
        assert figures["rows"] == sum(role in row.tokens for row in rows)
        assert figures["tokens_in"] == sum(row.tokens.get(role, 0) for row in rows)
    json.dumps(found)


@UNHURRIED
@given(ROWS)
def test_sources_and_roles_add_up_to_the_totals(rows: list[RowFigures]) -> None:
    found = audit_of(rows).as_dict()
    names = {"tokens_in": "tokens_in", "tokens": "tokens", "supervised": "supervised_tokens"}
    for part in (found["sources"], found["roles"]):
        for name, total in (names | {"truncated": "tokens_truncated"}).items():
            assert sum(figures[name] for figures in part.values()) == found[total]
    assert found["rows_in"] == found["rows_used"] + sum(found["dropped"].values())
    assert found["tokens_in"] == found["tokens"] + found["tokens_truncated"] + sum(found["tokens_dropped"].values())
    assert set(found["tokens_dropped"]) <= set(found["dropped"])


@UNHURRIED
@given(ROWS, st.lists(st.integers(0, 30), max_size=3))
def test_rows_added_in_parts_are_counted_as_those_added_at_once(rows: list[RowFigures], cuts: list[int]) -> None:
    ends = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    audit = Audit()
    for start, end in pairwise(ends):
        audit.add(columns_of(rows[start:end]))
    assert audit.as_dict() == audit_of(rows).as_dict()


@UNHURRIED
@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=60))
def test_lengths_are_those_of_numpy(lengths: list[int]) -> None:
    counted = Counter(lengths)
    shares = {"min": 0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
    assert quantiles_of(counted) == {
        name: int(np.quantile(lengths, share, method="inverted_cdf")) for name, share in shares.items()
    }
    found = histogram(counted)
    assert found is not None
    edges, counts = found["edges"], found["counts"]
    assert counts == [sum(low <= one < high for one in lengths) for low, high in pairwise(edges)]
    assert sum(counts) == len(lengths)
    assert counts[0] > 0 < counts[-1], "no empty bins at the ends"
    assert len(counts) <= 20
    widths = set(np.diff(edges).tolist())
    is_log = max(lengths) > LOG_RATIO * min(lengths)
    assert all(high == 2 * low for low, high in pairwise(edges)) if is_log else len(widths) == 1


@UNHURRIED
@given(ROWS)
def test_the_longest_rows_are_told_in_order(rows: list[RowFigures]) -> None:
    lengths = sorted((sum(row.tokens.values()) for row in rows if row.tokens), reverse=True)
    assert [row["tokens"] for row in audit_of(rows).as_dict()["longest"]] == lengths[:NUM_LONGEST]


def test_memory_does_not_grow_with_rows() -> None:
    sizes = []
    for count in (2_000, 200_000):
        tokens = np.zeros((count, len(ROLES)), dtype=np.int64)
        tokens[:, 1] = np.arange(count) % 997 + 1
        ids = [f"train.jsonl:{number}" for number in range(count)]
        ends = np.ones((count, 2), dtype=np.int64)
        audit = Audit()
        audit.add(Columns(["train.jsonl"] * count, ids, ["used"] * count, tokens, tokens, tokens * 0, ends))
        assert audit.rows_in == count
        sizes.append(len(pickle.dumps(audit)))
    assert sizes[1] < 1.3 * sizes[0]


def test_a_row_whose_tokens_do_not_add_up_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match="add up"):
        audit_of([RowFigures("a", "a:1", {"user": 3}, {"user": 2}, {"user": 2})])
    with pytest.raises(AssertionError, match="role"):
        audit_of([RowFigures("a", "a:1", {"narrator": 3})])


def test_the_audit_of_real_tokens_is_what_can_be_counted_by_hand() -> None:
    """One character is one token here: an answer of n characters gives n + 1 supervised tokens, its end included."""
    tokenizer, rows = make_tokenizer(), []
    answers = ["a", "bb", "ccc"]
    for number, answer in enumerate(answers):
        tokens = chats.tokenize(tokenizer, chats.render_messages(tokenizer, chat("hi", answer)["messages"]))
        supervised = sum(label != -100 for label in tokens.labels)
        user = len("<user\nhi>\n")
        whole = {"user": user, "assistant": len(tokens) - user}
        rows.append(RowFigures("train", f"train:{number}", whole, {"assistant": supervised}, {}, 1, 1))
    found = audit_of(rows).as_dict()
    assert found["supervised_tokens"] == sum(len(answer) + 1 for answer in answers)
    assert found["roles"]["assistant"] == {
        "rows": 3,
        "tokens_in": sum(len("<assistant\n") + len(answer) + 2 for answer in answers),
        "tokens": sum(len("<assistant\n") + len(answer) + 2 for answer in answers),
        "supervised": 9,
        "truncated": 0,
    }


def lost(source: str, reason: str) -> RowFigures:
    return RowFigures(source, f"{source}:9", {"user": 60}, dropped=reason)


BLOCKING: dict[str, tuple[list[RowFigures], str, str, str]] = {
    "no rows": ([], "0 usable examples (0 rows in)", "", "give a file with rows"),
    "all dropped": (
        [lost("a", "too_long")] * 2,
        "0 usable examples (2 rows in; dropped too long 2)",
        "a",
        "max_length",
    ),
    "nothing supervised": ([good(supervised=0)], "no supervised tokens in 1 row", "data.train", "assistant turns"),
    "answers cut off": (
        [good(supervised=0, truncated={"assistant": 50})] * 2,
        "no supervised tokens in 2 rows: the answers were cut off",
        "data.max_length",
        "raise data.max_length",
    ),
    "end never supervised": (
        [good(end_of_turn_supervised=0)] * 3,
        "none of the 3 end-of-turn tokens is supervised",
        "model.chat_template",
        "behind the assistant's text",
    ),
    "ends cut off": (
        [good(end_of_turn_supervised=0, truncated={"assistant": 5})],
        "none of the 1 end-of-turn token is supervised",
        "data.max_length",
        "too_long: drop",
    ),
    "a source unused": (
        [good(), lost("b.jsonl", "bad_row"), lost("b.jsonl", "too_long"), lost("b.jsonl", "bad_row")],
        "nothing of this source is used (3 rows in; dropped bad row 2, too long 1)",
        "b.jsonl",
        "data.on_bad_row: error",
    ),
}


@pytest.mark.parametrize("case", BLOCKING)
def test_a_blocking_problem_says_what_where_and_the_fix(case: str) -> None:
    rows, what, where, hint = BLOCKING[case]
    (problem,) = findings.blocking(audit_of(rows))
    assert problem.what.startswith(what)
    assert problem.where == where
    assert hint in problem.hint


def test_a_source_without_any_rows_is_seen() -> None:
    audit = audit_of([good()])
    audit.expect("empty.jsonl")
    (problem,) = findings.blocking(audit)
    assert (problem.where, problem.hint) == ("empty.jsonl", "give a file with rows")


def test_good_rows_give_neither_problems_nor_warnings() -> None:
    audit = audit_of([good(), good("b.jsonl")])
    assert findings.blocking(audit) == findings.warnings(audit) == []
    text_only = RowFigures("t.txt", "t.txt:1", {"text": 80}, {"text": 79})
    assert findings.blocking(audit_of([text_only])) == []


WARNINGS: dict[str, tuple[list[RowFigures], str | None]] = {
    "cut": ([good(truncated={"user": 2})], "1.8 % of the tokens were cut off (2)"),
    "hardly cut": ([good(truncated={"user": 1})], None),
    "little supervised": ([good(tokens={"user": 5000, "assistant": 50})], "only 0.79 % of the tokens are supervised"),
    "enough supervised": ([good(tokens={"user": 3900, "assistant": 50})], None),
    "dropped": ([good(), lost("a.jsonl", "too_long")], "1 of 2 rows dropped (too long 1)"),
    "bare": ([good(), good(supervised=0)], "1 used row without supervised tokens"),
    "bare and dropped": ([good(), lost("a.jsonl", NO_LABELS)], "1 of 2 rows dropped (no labels 1)"),
    "some ends": ([good(), good(end_of_turn_supervised=0)], "1 of 2 end-of-turn tokens not supervised"),
    "no ends": ([good(end_of_turn=0, end_of_turn_supervised=0)], "the chat template writes no end-of-turn token"),
    "one source": ([good(number=n) for n in range(39)] + [good("b", supervised=1)], "99.9 % of the supervised tokens"),
    "two sources": ([good(number=n) for n in range(18)] + [good("b")], None),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_warnings_come_beyond_their_limits_only(case: str) -> None:
    rows, what = WARNINGS[case]
    found = findings.warnings(audit_of(rows))
    assert findings.blocking(audit_of(rows)) == []
    assert [problem.what.startswith(what or "") for problem in found] == ([True] if what else [])


def test_a_classifier_may_learn_one_label_of_long_rows() -> None:
    audit = audit_of([RowFigures("a", "a:1", {"text": 900}, {"text": 1})])
    assert findings.warnings(audit)
    assert findings.document(audit, is_language=False)["warnings"] == []


def printed(data: dict[str, Any], width: int = 80) -> str:
    stream = StringIO()
    print_audit(data, Console(file=stream, width=width, highlight=False, emoji=False))
    return stream.getvalue()


def test_the_screen_tells_every_figure_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [good("chat.jsonl", n, tokens={"user": 60 + n * n, "assistant": 50}) for n in range(90)]
    rows += [good("s.jsonl", 7, truncated={"user": 3, "assistant": 4}), lost("s.jsonl", "too_long")]
    audit = audit_of(rows)
    text = printed(findings.document(audit))
    assert max(map(len, text.splitlines())) <= 80
    assert capsys.readouterr() == ("", ""), "only on the console that was asked for"
    assert "92 in = 91 used + 1 dropped (too long 1)" in text
    cells = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    tokens = f"{90 * 110 + sum(n * n for n in range(90)):,}"
    assert cells["chat.jsonl"] == ["90", "90", tokens, "3,600", "0", "0"]
    assert cells["s.jsonl"] == ["2", "1", "170", "40", "7", "60"]
    assert cells["assistant"] == ["91", "4,550", "3,640", "4", "0"]
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["longest"]]
    assert "chat.jsonl:89 (8,031)" in line
    bins = [line.split() for line in text.splitlines() if "–" in line]
    counts = histogram(audit.lengths)
    assert counts is not None
    assert [int(words[-1]) for words in bins] == counts["counts"]
    assert "1 of 92 rows dropped" in text


def test_a_bar_shows_whatever_is_more_than_nothing() -> None:
    assert [bar(share, 4) for share in (0, 0.001, 0.5, 1)] == ["", "▏", "██", "████"]
    assert bar(0.53125, 4) == "██▏"


def test_names_from_data_cannot_steer_the_terminal() -> None:
    audit = audit_of([good("\x1b[2J[red]x\r.jsonl"), good("b\u202etxt")])
    text = printed(findings.document(audit), width=100)
    assert not {"\x1b", "\r", "\u202e"} & set(text)
    assert "␛[2J[red]x␍.jsonl" in text
    assert "b⟨202e⟩txt" in text


def test_the_account_of_an_older_report_is_still_told() -> None:
    text = printed(
        {"rows_in": 3, "rows_used": 2, "dropped": {"bad_row": 1}, "duplicates": None, "supervised_tokens": 9}
    )
    assert "3 in = 2 used + 1 dropped (bad row 1)" in text
    assert "not measured" in text
    assert ["supervised", "tokens", "9"] in [line.split() for line in text.splitlines()]
