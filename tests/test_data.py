"""Rows in = rows used + rows dropped, and every bad row is told. Numbers in docstrings are those of the trust cases."""

import json

import pytest
from conftest import chat, make_tokenizer, write_rows

from ftune import data
from ftune.errors import UserError


def load(path, tokenizer=None, **rules):
    return data.load(tokenizer or make_tokenizer(), [data.Source(path)], data.Rules(**rules), vocab_size=200)


GOOD = [chat("a", "b"), chat("c", "d")]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "asistant", "content": "a"}]}, "asistant.*assistant"),
        (chat("q", ""), "empty"),
        (chat("q", "  "), "empty"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}]}, "two user turns"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"messages": []}, "not empty"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"mesages": []}, "missing.*messages"),
        ([1, 2], "must be an object"),
    ],
)
def test_bad_row_is_an_error_with_its_line_or_is_counted(tmp_path, row, told):
    """Cases 26, 27, 28."""
    path = write_rows(tmp_path / "rows.jsonl", [GOOD[0], row, GOOD[1]])
    with pytest.raises(UserError, match=told) as caught:
        load(path)
    assert "rows.jsonl, line 2" in str(caught.value)
    audit = load(path, on_bad_row="skip").audit
    assert (audit.rows_in, audit.rows_used, audit.dropped.total()) == (3, 2, 1)


def test_broken_line_is_an_error_with_its_line_or_is_counted(tmp_path):
    """Case 23."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD[0])}\n{{bad\n{json.dumps(GOOD[1])}\n")
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: not valid JSON"):
        load(path)
    audit = load(path, on_bad_row="skip").audit
    assert audit.as_dict()["dropped"] == {"unreadable": 1}
    assert (audit.rows_in, audit.rows_used) == (3, 2)


def test_byte_order_mark_and_line_endings_change_nothing(tmp_path):
    """Case 24."""
    text = "".join(json.dumps(chat("é", "b\u2028c")) + "\n" for _ in range(2))
    plain, marked = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    plain.write_bytes(text.encode())
    marked.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    ids = [[e.tokens.input_ids for e in load(path).examples] for path in (plain, marked)]
    assert ids[0] == ids[1]
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match="not UTF-8: byte 13 is 0xe9"):
        load(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_file_without_rows_is_an_error(tmp_path, content):
    """Case 29."""
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="0 usable examples"):
        load(path)


def test_rows_that_lose_their_answer_to_truncation_are_dropped_and_counted(tmp_path):
    """Case 9: never a step over rows without a label."""
    long, short = chat("x" * 60, "abc"), chat("x", "abc")
    with pytest.raises(UserError, match="more than the 40 that"):
        load(write_rows(tmp_path / "one.jsonl", [long, short]), max_length=40)
    path = write_rows(tmp_path / "all.jsonl", [long, long])
    with pytest.raises(UserError, match=r"0 usable examples \(2 rows in; dropped no_labels: 2\)"):
        load(path, max_length=40, too_long="truncate")
    path = write_rows(tmp_path / "mixed.jsonl", [short, long, short, short])
    audit = load(path, max_length=40, too_long="truncate").audit
    assert audit.dropped == {"no_labels": 1}
    assert audit.rows_used == 3
    assert load(path, max_length=40, too_long="drop").audit.dropped == {"too_long": 1}


def test_truncation_keeps_the_first_tokens_and_counts_the_rest(tmp_path):
    """Cases 12, 22: what survives of an answer stays supervised."""
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "c" * 50}])
    dataset = load(path, make_tokenizer(None), max_length=20, too_long="truncate")
    tokens = dataset.examples[0].tokens
    told = dataset.audit.as_dict()["roles"]
    assert [(role, told[role]["tokens_in"], told[role]["supervised"]) for role in ("user", "assistant", "text")] == [
        ("user", 2, 0), ("assistant", 50, 18), ("text", 1, 0),
    ]  # fmt: skip
    assert (len(tokens), tokens.num_supervised, dataset.audit.fates["truncated"]) == (20, 18, 33)


def test_columns_are_renamed_and_a_missing_one_is_told(tmp_path):
    """Case 27."""
    path = tmp_path / "rows.csv"
    path.write_text('question,reply\n"one, two",three\nfour,"fi\nve"\nsi\u2028x,seven\n', encoding="utf-8")
    dataset = load(path, make_tokenizer(None), columns={"prompt": "question", "completion": "reply"})
    assert [e.text for e in dataset.examples] == ["one, twothree", "fourfi\nve", "si\u2028xseven"]
    with pytest.raises(UserError, match="no column 'antwort'; columns are 'question', 'reply'"):
        load(path, columns={"prompt": "question", "completion": "antwort"})
    with pytest.raises(UserError, match=r"no known shape.*'question', 'reply'"):
        load(path)


def test_rows_with_other_columns_are_refused(tmp_path):
    """Case 26: never trained on the text "None"."""
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"question": "c", "completion": "d"}]
    )
    with pytest.raises(UserError, match=r'line 2.*missing "prompt"'):
        load(path, make_tokenizer(None))


def test_every_problem_is_told_at_once_up_to_a_limit(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": []}] * 30)
    with pytest.raises(UserError) as caught:
        load(path)
    assert len(caught.value.problems) == data.MAX_SHOWN
    assert "more problems" in str(caught.value)


def test_token_outside_the_embeddings_is_refused(tmp_path):
    """Case 59."""
    path = write_rows(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(UserError, match="outside the model's 50 embeddings"):
        data.load(make_tokenizer(), [data.Source(path)], data.Rules(), vocab_size=50)


def test_row_ids_are_unique_over_files_of_one_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", GOOD)
    paths = [tmp_path / name / "rows.jsonl" for name in ("a", "b")]
    examples = data.load(make_tokenizer(), [data.Source(path) for path in paths], data.Rules()).examples
    assert [e.row_id for e in examples] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:1#2", "rows.jsonl:2#2"]


def test_pairs_whose_answers_are_the_same_are_told(tmp_path):
    """Case 34: nothing can be learned of a preference from them."""
    rows = [{"prompt": "p", "chosen": "a", "rejected": answer} for answer in ("a", "b", "a")]
    notes = load(write_rows(tmp_path / "rows.jsonl", rows), make_tokenizer(None)).notes
    assert notes["chosen and rejected answers are the same"] == 2


@pytest.mark.parametrize("shape", ["text", "prompt_completion", "labelled", "messages"])
def test_the_audit_counts_what_gives_a_loss(tmp_path, shape):
    """A row's first token has nothing before it to be predicted from, unless its class is told there."""
    rows = {
        "text": [{"text": "abc"}, {"text": "d"}],
        "prompt_completion": [{"prompt": "", "completion": "ab"}, {"prompt": "a", "completion": "b"}],
        "labelled": [{"text": "abc", "label": "x"}, {"text": "d", "label": "y"}],
        "messages": GOOD,
    }[shape]
    template = {} if shape == "messages" else {"template": None}
    dataset = load(write_rows(tmp_path / "rows.jsonl", rows), make_tokenizer(**template), format=shape)
    if shape == "labelled":
        dataset = data.with_class_ids(dataset, data.sorted_labels(dataset.examples), "data.train")
    assert dataset.audit.supervised_tokens == sum(example.tokens.num_supervised for example in dataset.examples)


def test_the_tokens_of_dropped_rows_are_in_the_audit(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [chat("a", "b"), chat("c" * 80, "d"), chat("e", "f")])
    whole = load(path).audit.as_dict()
    for too_long, reason in (("drop", "too_long"), ("truncate", "no_labels")):
        told = load(path, max_length=60, too_long=too_long).audit.as_dict()
        assert told["dropped"] == {reason: 1}
        assert told["tokens_in"] == whole["tokens_in"] == told["tokens"] + told["tokens_dropped"][reason]


def test_rows_whose_tokens_straddle_an_answers_border_are_told(tmp_path):
    """Case 15: such a token is the prompt's, as at inference."""
    tokenizer = make_tokenizer(None)
    tokenizer.add_tokens([":h"])
    rows = [{"prompt": "a:", "completion": "hi"}, {"prompt": "a", "completion": "hi"}]
    notes = load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer).notes
    assert notes["a token reaches over the border of an answer; it is read, not learned"] == 1
