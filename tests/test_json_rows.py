"""JSON, by lines and by lists: what a line says is what its row holds, or a problem. Numbers: trust cases."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_kit import TEXTS, as_lines, fields, written

from ftune.data import json_rows, streams
from ftune.data.rows import read_rows
from ftune.errors import Problem, UserError


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{bad", "not valid JSON: Expecting property name.* at column 2"),
        ('{"a": 1} {"b": 2}', "Extra data at column 9"),
        ('{"a": "x', "Unterminated string"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ('{"m": [{"role": 1, "role": 2}]}', "the key 'role' stands twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": [-Infinity]}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": "\\ud800"}', r"\\ud800 is half of a character"),
        ('{"a\\uDFFF": 1}', r"\\udfff is half of a character"),
        ('{"a": "\x00"}', "Invalid control character"),
        ("\x00\x00\x00", "Expecting value"),
        ('{"a": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"a": 1}]', "must be an object, this is a list"),
        ("null", "must be an object, this is a NoneType"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_a_line_that_says_less_than_it_seems_is_a_problem_and_the_others_are_rows(tmp_path, line, told):
    """Case 23."""
    found = list(read_rows(written(tmp_path, "r.jsonl", f'{{"a": 0}}\n\n{line}\n{{"a": "\\ud83d\\ude00"}}\n')))
    assert [row.fields for row in (found[0], found[2])] == [{"a": 0}, {"a": "😀"}]
    assert found[1].where == f"{tmp_path}/r.jsonl, line 3"
    assert re.search(told, found[1].what)


def test_a_line_without_end_is_a_problem_and_costs_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "LONGEST_ROW", 1000)
    path = written(tmp_path, "r.jsonl", '{"a": 0}\n{"a": "' + "x" * 100_000 + '"}\n{"a": 1}\n\xff')
    first, second, third, fourth = read_rows(path)
    assert (first.fields, third.fields, third.place) == ({"a": 0}, {"a": 1}, f"{path}, line 3")
    assert "a line of 100,010 bytes, more than 1,000" in second.what
    assert isinstance(fourth, Problem)
    with path.open("ab") as file:
        file.write(b"\n\xff")
    *_, last = read_rows(path)
    assert last.what == f"not UTF-8: byte {path.stat().st_size - 1} is 0xff"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**20])
@pytest.mark.parametrize("wrap", ["{}", '{{"data": {}}}', '\n {{ "rows" : {} }} \n'])
def test_a_json_list_is_read_piece_by_piece_wherever_the_pieces_end(tmp_path, monkeypatch, chunk, wrap):
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    rows = [{"a": 'é😀 \\ "x" ]},', "n": 12345.5, "b": [{}, None, True]}, {}, {"a": "\n"}]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), json.dumps([])):
        path = written(tmp_path, "r.json", wrap.format(text))
        assert fields(path) == json.loads(text)
    number, row = read_rows(written(tmp_path, "r.json", wrap.format('[123456, {"a": 1}]')))
    assert ("this is a int" in number.what, row.fields) == (True, {"a": 1})


def test_a_row_of_a_json_list_is_told_with_its_line(tmp_path):
    path = written(tmp_path, "r.json", '[\n {"a": 1},\n {"a": 1,\n  "a": 2},\n\n [1], {"a": 3}\n]\n')
    first, second, third, fourth = read_rows(path)
    assert (first.place, fourth.place) == (f"{path}, row 1 (line 2)", f"{path}, row 4 (line 6)")
    assert (second.where, third.where) == (f"{path}, row 2 (line 3)", f"{path}, row 3 (line 6)")
    assert "stands twice" in second.what
    assert "must be an object" in third.what


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', "line 3: not valid JSON: Expecting value"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "line 3: not valid JSON: Expecting ','"),
        ('[{"a": 1},\n]', "line 2: not valid JSON"),
        ('[{"a": 1}', "Expecting ','"),
        ('[{"a": "x', "Unterminated string"),
        ('[{"a": 1}]\n[]', "line 2: not valid JSON: Extra data after the list"),
        ('{\n"a": 1\n}', "not a list of rows: one object that begins with the key 'a'"),
        ('{"data": [{"a": 1}],\n"version": 2}', "more keys than 'data'"),
        ('{"data":\n{"a": 1}}', "not a list of rows"),
        ('"text"', "neither a list nor an object"),
        ("{", "not valid JSON"),
        ("nul", "neither a list nor an object"),
    ],
)
def test_a_json_file_that_is_no_list_is_an_error_with_its_line(tmp_path, content, told):
    with pytest.raises(UserError, match=told):
        list(read_rows(written(tmp_path, "r.json", content)))


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = written(tmp_path, "r.json", "\n" + as_lines(TEXTS) + "{bad\n")
    *rows, problem = read_rows(path)
    assert [row.fields for row in rows] == TEXTS
    assert problem.where == f"{path}, line 4"
    assert fields(written(tmp_path, "r.json", '{"messages": [{"role": "user"}]}')) == [{"messages": [{"role": "user"}]}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=4), st.booleans(), st.integers(1, 40))
def test_rows_of_json_are_what_pythons_parser_reads(tmp_path_factory, rows, is_ascii, chunk):
    base, default = tmp_path_factory.getbasetemp(), json_rows.CHUNK
    lines, whole = base / "same.jsonl", base / "same.json"
    lines.write_bytes("".join(json.dumps(row, ensure_ascii=is_ascii) + "\n" for row in rows).encode())
    whole.write_bytes(json.dumps(rows, ensure_ascii=is_ascii, indent=1).encode())
    json_rows.CHUNK = chunk
    try:
        assert fields(lines) == fields(whole) == rows
    finally:
        json_rows.CHUNK = default
