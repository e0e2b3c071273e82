"""Every format gives the same rows, in bounded memory; no row or byte is lost without a word. Numbers: trust cases."""

import bz2
import csv
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_kit import TEXTS, as_lines, fields, written

from ftune.data.rows import READERS, SourceRow, read_rows
from ftune.errors import Problem, UserError


def write(path: Path, rows) -> Path:
    """Rows of text cells, in the format that the file's name asks for."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text(as_lines(rows))
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.json", "r.csv", "r.tsv", "r.parquet", "R.JSONL"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    rows = list(read_rows(path))
    assert [row.fields for row in rows] == TEXTS
    assert [row.row_id for row in rows] == [f"{name}:1", f"{name}:2"]
    assert all(row.place.startswith(str(path)) for row in rows)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize(
    ("suffix", "packed"),
    [
        (".gz", lambda raw: gzip.compress(raw[:9]) + gzip.compress(raw[9:])),
        (".bz2", lambda raw: bz2.compress(raw[:9]) + bz2.compress(raw[9:])),
        (".xz", lzma.compress),
        (".zst", lambda raw: pa.compress(raw, codec="zstd", asbytes=True)),
    ],
)
def test_a_compressed_file_gives_the_rows_of_the_plain_one_and_a_cut_one_is_told(tmp_path, kind, suffix, packed):
    raw = write(tmp_path / f"rows{kind}", TEXTS).read_bytes()
    path = written(tmp_path, f"rows{kind}{suffix}", packed(raw))
    assert fields(path) == TEXTS
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"cut off|cannot be|not valid") as caught:
        list(read_rows(path))
    assert path.name in str(caught.value)
    path.write_bytes(b"not packed at all")
    with pytest.raises(UserError, match="cannot be"):
        list(read_rows(path))


def test_a_zstandard_file_of_two_frames_is_read_to_its_end(tmp_path):
    frames = [pa.compress(as_lines([row]).encode(), codec="zstd", asbytes=True) for row in TEXTS]
    assert fields(written(tmp_path, "rows.jsonl.zst", b"".join(frames))) == TEXTS


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.txt"])
def test_byte_order_mark_and_line_endings_change_nothing(tmp_path, name):
    """Case 24."""
    rows = [{"text": "one é"}, {"text": "two\u2028three\x85"}]
    plain = "one é\ntwo\u2028three\x85\n" if name == "r.txt" else None
    raw = plain.encode() if plain else write(tmp_path / name, rows).read_bytes().replace(b"\r\n", b"\n")
    found = []
    for content in (raw, b"\xef\xbb\xbf" + raw, raw.replace(b"\n", b"\r\n"), raw.removesuffix(b"\n")):
        found.append(list(read_rows(written(tmp_path, name, content))))
    assert [row.fields for row in found[0]] == rows
    assert found == [found[0]] * 4


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_that_is_not_utf8_is_told_with_its_offset(tmp_path, mark, suffix):
    """Case 24: in lines it costs its row, elsewhere the file; never a replacement character."""
    packed = gzip.compress if suffix else bytes
    good = b'{"text": "a"}\n'
    content = mark + good + b'{"text": "caf\xe9"}\n' + good
    offset = content.index(b"\xe9")
    first, second, third = read_rows(written(tmp_path, f"r.jsonl{suffix}", packed(content)))
    assert (first.fields, third.fields, third.row_id) == ({"text": "a"}, {"text": "a"}, f"r.jsonl{suffix}:3")
    assert second.what == f"not UTF-8: byte {offset} is 0xe9"
    assert second.where.endswith("line 2")
    rows = mark + b"[" + good + b"," + b'{"text": "' + "é".encode() * 700_000 + b'\xe9"}]'
    for name, body in [("r.json", rows), ("r.csv", mark + b"text\na\ncaf\xe9\n")]:
        with pytest.raises(UserError, match=f"not UTF-8: byte {body.rindex(0xE9)} is 0xe9"):
            list(read_rows(written(tmp_path, name + suffix, packed(body))))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", list(READERS))
def test_utf16_is_told_as_such(tmp_path, name, encoding):
    mark = "\ufeff" if encoding.endswith("be") else ""
    with pytest.raises(UserError, match=r"not UTF-8|not valid Parquet"):
        list(read_rows(written(tmp_path, f"r{name}", (mark + "text\nabc\n").encode(encoding))))


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.txt"])
@pytest.mark.parametrize("content", ["", "\n\n \n", "\r\n"])
def test_a_file_without_rows_gives_none(tmp_path, name, content):
    """Case 29: whoever asked for rows says so; here it is no error."""
    if name in ("r.csv", "r.tsv"):
        content = content.replace(" ", "")
    assert list(read_rows(written(tmp_path, name, content))) == []


def test_cells_are_told_by_row_and_line(tmp_path):
    text = 'text,label\n"two\nlines",a\n\nonly one\n"a, ""b""",c,d\nx\x00,y\n,z\n'
    path = written(tmp_path, "r.csv", text)
    first, short, long, nul, empty = read_rows(path)
    assert (first.fields, first.place) == ({"text": "two\nlines", "label": "a"}, f"{path}, row 1 (line 2)")
    assert (short.what, short.where) == ("1 cells under 2 columns", f"{path}, row 2 (line 5)")
    assert (long.what, long.where) == ("3 cells under 2 columns", f"{path}, row 3 (line 6)")
    assert "NUL" in nul.what
    assert (empty.fields, empty.row_id) == ({"text": "", "label": "z"}, "r.csv:5")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('text\na\n"b\nc\n', r"row 2 \(begins in line 3\): not valid CSV: unexpected end of data"),
        ('text\n"a"b\nc\n', r"row 1 \(begins in line 2\): not valid CSV: ',' expected after '\"'"),
        ("text\na\rb\n", "not valid CSV: new-line character"),
        ("a,b,a\n1,2,3\n", "header: the column 'a' stands twice"),
        (",text\n0,a\n", "header: column 1 has no name"),
        ("a;b\n1;2\n", "one column named 'a;b', which looks separated by ';'"),
        ("a\tb\n1\t2\n", r"separated by '\\t'"),
    ],
)
def test_a_table_whose_rows_cannot_be_told_apart_is_an_error(tmp_path, content, told):
    with pytest.raises(UserError, match=told):
        list(read_rows(written(tmp_path, "r.csv", content)))


def test_a_cell_may_be_longer_than_the_csv_module_allows_by_default(tmp_path):
    long = "x" * 300_000
    assert fields(written(tmp_path, "r.csv", f"text\n{long}\n")) == [{"text": long}]


def test_each_line_of_plain_text_is_a_row(tmp_path):
    path = written(tmp_path, "r.txt", " a b \n\n  \nc\x00\nd")
    first, nul, last = read_rows(path)
    assert (first.fields, first.row_id) == ({"text": " a b "}, "r.txt:1")
    assert (nul.where, last.fields, last.place) == (f"{path}, line 4", {"text": "d"}, f"{path}, line 5")


def test_parquet_gives_back_the_objects_that_arrow_had_made_alike(tmp_path):
    """Case 25: no key that was not written, at any depth; a null cell is a missing value."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "arguments": {"x": 1}, "tools": [{"p": {"q": {"d": "e"}}}]},
        {
            "messages": [{"role": "assistant", "content": "b", "calls": [{"name": "f"}, {"id": "g"}]}],
            "arguments": {"y": "2"},
            "tools": [{"p": {"r": {"enum": ["s", None]}}}, {}],
        },
        {"messages": None, "arguments": {}, "tools": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert fields(tmp_path / "r.parquet") == rows


def test_parquet_keeps_maps_and_names_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    schema = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])}).arrow_schema
    schema = schema.append(pa.field("map", pa.map_(pa.string(), pa.int64())))
    table = pa.Table.from_pydict({"label": [1, 0, -1, None], "map": [[("k", 1)]] * 4}, schema=schema)
    pq.write_table(table, tmp_path / "r.parquet")
    found = fields(tmp_path / "r.parquet")
    assert [row["label"] for row in found] == ["yes", "no", None, None]
    assert found[0]["map"] == {"k": 1}


def test_parquet_that_is_broken_is_told(tmp_path):
    good = pa.Table.from_pylist([{"a": "x" * 1000}] * 10)
    pq.write_table(good, tmp_path / "r.parquet")
    raw = (tmp_path / "r.parquet").read_bytes()
    for content in (b"", b"PAR1", raw[:-20], raw[:30] + bytes(60) + raw[90:]):
        with pytest.raises(UserError, match=r"r.parquet: (not valid Parquet|cannot be read)"):
            list(read_rows(written(tmp_path, "r.parquet", content)))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(twice, tmp_path / "r.parquet")
    with pytest.raises(UserError, match="the column 'a' stands twice"):
        list(read_rows(tmp_path / "r.parquet"))
    latin = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xe9", b"c"]).buffers())
    pq.write_table(pa.Table.from_arrays([latin], names=["a"]), tmp_path / "r.parquet")
    first, second, third = read_rows(tmp_path / "r.parquet")
    assert (first.fields, third.fields, third.row_id) == ({"a": "a"}, {"a": "c"}, "r.parquet:3")
    assert (second.where, "0xe9" in second.what) == (f"{tmp_path}/r.parquet, row 2", True)


@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.jsonl.gz", "nothing.json.zst", "nothing.parquet"])
def test_a_file_that_is_not_there_or_is_a_folder_is_told(tmp_path, name):
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(tmp_path / name))
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"cannot be read|no such file|not valid"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["r.xlsx", "r", "r.gz", "r.parquet.gz", "r.jsonl.zip"])
def test_an_unknown_kind_of_file_is_told_with_those_there_are(tmp_path, name):
    with pytest.raises(UserError, match=r"(?s)unknown kind of file.*\.jsonl.*\.zst"):
        list(read_rows(written(tmp_path, name, "{}")))


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.txt", "r.jsonl.gz", "r.jsonl.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    """40 MB of rows inside 8 MiB of Python's memory."""
    line = "x" * 1000
    body = {"r.jsonl": f'{{"text": "{line}"}}\n', "r.csv": f"{line}\n", "r.txt": f"{line}\n"}
    unit = body.get(name.removesuffix(".gz").removesuffix(".zst"), f',{{"text": "{line}"}}\n')
    text = {"r.csv": "text\n", "r.json": '[{"text": ""}\n'}.get(name, "") + unit * 40_000 + "]" * (name == "r.json")
    if name.endswith(".gz"):
        path = written(tmp_path, name, gzip.compress(text.encode(), 1))
    elif name.endswith(".zst"):
        path = written(tmp_path, name, pa.compress(text.encode(), codec="zstd", asbytes=True))
    else:
        path = written(tmp_path, name, text)
    del text
    tracemalloc.start()
    count = sum(isinstance(row, SourceRow) for row in read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000 + (name == "r.json")
    assert peak < 8 * 2**20


TEXT = st.text(st.sampled_from('{}[]",:\\ \n\r\tabu0d8é\x00\u2028;'), max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(READERS)), st.one_of(st.binary(max_size=60), TEXT.map(str.encode)))
def test_no_bytes_end_in_a_traceback(tmp_path_factory, kind, content):
    path = tmp_path_factory.getbasetemp() / f"fuzz{kind}"
    path.write_bytes(content)
    try:
        found = list(read_rows(path))
    except UserError:
        return
    assert all(isinstance(row, SourceRow | Problem) for row in found)
    if kind in (".jsonl", ".ndjson"):
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        blank = sum(line.decode(errors="replace").isspace() or not line for line in lines)
        assert len(found) == len(lines) - blank
