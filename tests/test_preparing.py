"""Many rows go the same way as few: over processes, into a cache that is never stale. Numbers: trust cases."""

import json
import os

import numpy as np
import pytest
from conftest import chat, make_tokenizer, write_rows

from ftune import data, folder
from ftune.data import preparing
from ftune.errors import UserError

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(1300)]


@pytest.fixture(autouse=True)
def small_chunks(tmp_path, monkeypatch):
    """Chunks so small that the rows of a test are many; a cache of its own."""
    monkeypatch.setattr(preparing, "CHUNK_ROWS", 100)
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))


def load(*paths, tokenizer=None, **rules):
    sources = [data.Source(path) for path in paths]
    return data.load(tokenizer or make_tokenizer(), sources, data.Rules(**rules), vocab_size=200)


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "data").glob("*"))


def everything(dataset):
    return [(e.row_id, e.text, e.tokens, e.fields) for e in dataset.examples]


def test_many_rows_are_prepared_as_few_are(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    many = load(path)
    assert len(cached(tmp_path)) == 1
    monkeypatch.setattr(preparing, "CHUNK_ROWS", len(ROWS))
    few = load(path)
    assert len(cached(tmp_path)) == 1
    assert everything(many) == everything(few)
    assert many.audit == few.audit
    assert many.examples.lengths.tolist() == [len(e.tokens) for e in few.examples]


def test_the_second_time_nothing_is_prepared(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    first = load(path)
    monkeypatch.setattr(preparing, "prepare_chunk", None)
    second = load(path)
    assert everything(first) == everything(second)
    assert first.audit == second.audit


@pytest.mark.parametrize("changed", ["data", "template", "vocabulary", "max_length", "format", "damage"])
def test_a_cache_is_never_stale(tmp_path, changed):
    """Case 18: whatever shapes tokens makes them anew, also a file changed in place under its old date."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    before = everything(load(path))
    tokenizer, rules = make_tokenizer(), {}
    if changed == "data":
        times = path.stat()
        path.write_text(path.read_text().replace('"answer 7"', '"answer 8"', 1))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif changed == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant: ")
        tokenizer.chat_template = tokenizer.chat_template.replace("{{m.role}}\n", "{{m.role}}: ")
    elif changed == "vocabulary":
        tokenizer.add_tokens(["question"])
    elif changed == "max_length":
        rules = {"max_length": 40, "too_long": "truncate"}
    elif changed == "format":
        rules = {"format": "messages"}
    elif changed == "damage":
        (file,) = (tmp_path / "cache" / "data").glob("*/rows.arrow")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    after = everything(load(path, tokenizer=tokenizer, **rules))
    assert (after == before) == (changed in ("format", "damage"))
    for known in (tmp_path / "cache" / "data").glob("*/facts.json"):
        assert folder.read_json(known)["sha256"] == folder.sha256_file(known.with_name("rows.arrow"))


def test_problems_of_many_rows_are_told_as_those_of_few_and_leave_no_cache(tmp_path):
    bad = [*ROWS, chat("q", ""), {"messages": []}]
    with pytest.raises(UserError) as caught:
        load(write_rows(tmp_path / "rows.jsonl", bad))
    assert [problem.where.split(" (")[0] for problem in caught.value.problems] == [
        f"{tmp_path}/rows.jsonl, line {number}" for number in (1301, 1302)
    ]
    assert cached(tmp_path) == []
    audit = load(tmp_path / "rows.jsonl", on_bad_row="skip").audit
    assert (audit.rows_in, audit.rows_used, dict(audit.dropped)) == (1302, 1300, {"bad_row": 2})


def test_all_bad_rows_are_counted_though_few_are_told(tmp_path):
    with pytest.raises(UserError, match="and 981 more problems"):
        load(write_rows(tmp_path / "rows.jsonl", [*[{"messages": []}] * 1000, chat("q", "a")]))


def test_examples_keep_their_files_apart(tmp_path):
    paths = [write_rows(tmp_path / name, ROWS[:600]) for name in ("a.jsonl", "b.jsonl")]
    dataset = load(*paths)
    assert dataset.mixture.counts == (600, 600)
    assert [dataset.examples[i].row_id for i in (0, 599, 600, 1199)] == [
        "a.jsonl:1", "a.jsonl:600", "b.jsonl:1", "b.jsonl:600",
    ]  # fmt: skip
    chosen = dataset.only(np.array([3, 700, 1100]))
    assert [e.row_id for e in chosen.examples] == ["a.jsonl:4", "b.jsonl:101", "b.jsonl:501"]
    assert chosen.mixture.counts == (1, 2)
    fewer = dataset.without({"duplicate": np.array([0, 599, 600])})
    assert fewer.mixture.counts == (598, 599)
    assert fewer.audit.dropped == {"duplicate": 3}
    assert fewer.audit.rows_in == 1200


def test_nothing_is_lost_between_rows_that_differ_in_their_keys(tmp_path):
    """Case 25: Arrow would give every row the keys of all others, as null."""
    rows = [{**chat("a", "b"), "extra": {"x": 1}}, {**chat("c", "d"), "extra": {"y": "2"}}]
    dataset = load(write_rows(tmp_path / "rows.jsonl", rows))
    assert "null" not in json.dumps([e.fields for e in dataset.examples])
    assert "None" not in "".join(e.text for e in dataset.examples)
