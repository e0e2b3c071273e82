"""Cases 107 and 109: templates and rows are data. They do not run, do not reach the terminal and do not fill memory."""

import bz2
import gzip
import json
import lzma
import pickle
import re
import sys
import tracemalloc

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import chat, write_rows
from hostile_kit import Bomb, change, command, refused, unchanged

from ftune.console import streams
from ftune.console.visible import in_lines
from ftune.data import read_rows
from ftune.data.json_rows import Parser
from ftune.data.rows import SourceRow
from ftune.errors import Problem, UserError
from ftune.methods import targets

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\x08\r\u202e\u2028[red]x[/nope]{{ 1 }}<script>alert(1)</script>"


def attack(mark) -> str:
    return "{{ cycler.__init__.__globals__.os.mkdir('" + str(mark) + "') }}"


def test_a_template_leaves_its_mark_where_it_is_rendered_without_a_sandbox(tmp_path):
    jinja2.Environment().from_string(attack(tmp_path / "MARK")).render()
    assert (tmp_path / "MARK").exists()


def test_no_template_that_comes_with_a_model_escapes(lab):
    for source, told in (
        (attack(lab.mark), "template"),
        ("{% for i in range(10**9) %}x{% endfor %}", "raises to a power"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "template"),
    ):
        (lab.base / "chat_template.jinja").write_text(source)
        refused(lab, ["check", "inspect", "train", "overwrite", "compare", "generate of a model"], told)


def test_no_template_that_a_recipe_names_or_an_adapter_brings_escapes(lab):
    (lab.root / "own.jinja").write_text(attack(lab.mark))
    (lab.run / "adapter" / "chat_template.jinja").write_text(attack(lab.mark))
    with unchanged(lab.root):
        assert command("check", lab.recipe, "model.chat_template=own.jinja").code == 2
        assert command("train", lab.recipe, "output.dir=new", "model.chat_template=own.jinja").code == 2
    refused(lab, ["generate", "eval an adapter"], "template")


# The terminal


def test_rows_cannot_reach_the_terminal(lab):
    """Not by their texts, roles, labels, suites, ids or columns, in what is told of them, right or wrong."""
    write_rows(lab.root / "train.jsonl", [chat(f"{ESCAPES} {i}", f"a{i}") for i in range(8)])
    write_rows(lab.root / "labels.jsonl", [{"text": f"{i}", "label": f"{ESCAPES} {i % 2}"} for i in range(8)])
    write_rows(lab.root / "roles.jsonl", [{"messages": [{"role": ESCAPES, "content": "x"}]}, {ESCAPES: ESCAPES}])
    write_rows(lab.root / "probe.jsonl", [{"id": ESCAPES, "suite": ESCAPES, "prompt": "p", "completion": ESCAPES}])
    labels = ["data.train=labels.jsonl", "data.test=labels.jsonl", "objective=classification"]
    said = [
        command("check", lab.recipe),
        command("inspect", lab.recipe),
        command("inspect", lab.recipe, "--html", lab.root / "page.html"),
        command("inspect", lab.recipe, "--json"),
        command("check", lab.recipe, "data.train=roles.jsonl"),
        command("check", lab.recipe, "data.train=roles.jsonl", "data.format=messages", "data.on_bad_row=skip"),
        command("check", lab.recipe, *labels, "evaluation.metric=accuracy"),
        command("check", lab.recipe, f"method.target_modules=[{json.dumps(ESCAPES.replace('[', ''))}]"),
        command("check", lab.recipe, f"{ESCAPES}=1"),
        command("train", lab.recipe, "output.dir=new", *labels, "evaluation.metric=accuracy"),
        command("train", lab.recipe, "output.dir=newer", "evaluation.probe=probe.jsonl"),
        command("report", lab.new, lab.newer),
        command("report", lab.new),
        command("eval", lab.newer),
    ]
    for one in said:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", one.text), one.text
    for page in (lab.root / "page.html", lab.new / "report.html", lab.newer / "report.html", lab.newer / "report.md"):
        assert "<script>alert" not in page.read_text()


def test_the_gate_before_the_terminal_shows_what_it_does_not_let_through(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    streams.messages.cache_clear()
    streams.note(f"a{ESCAPES}b\nc")
    streams.messages.cache_clear()
    told = capsys.readouterr().err
    assert "\x1b[1;36m" in told, "rich's own codes go through"
    assert "\x1b[2J" not in told
    assert "␛[2J" in told
    assert "[red]x[/nope]" in told
    assert in_lines("plain é 日本\nnext\n") == "plain é 日本\nnext\n"


def test_an_answer_is_harmless_on_a_terminal_and_itself_in_a_pipe(capsys, monkeypatch):
    streams.print_text("\x1b[2Jx")
    assert capsys.readouterr().out == "\x1b[2Jx\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    streams.print_text("\x1b[2Jx")
    assert capsys.readouterr().out == "␛[2Jx\n"


def test_an_expression_of_an_adapter_that_comes_to_no_end_is_refused(lab, monkeypatch):
    monkeypatch.setattr(targets, "PATIENCE", 0.2)
    change(lab.run / "adapter" / "adapter_config.json", target_modules=r"(.|.)+(?<=7)")
    refused(lab, ["eval an adapter"], "comes to no end over")


# Files of rows


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_a_small_file_that_unpacks_to_a_large_one_fills_no_memory(tmp_path, monkeypatch, suffix, pack, kind):
    for module in ("streams", "json_rows"):
        monkeypatch.setattr(f"ftune.data.{module}.LONGEST_ROW", 2**18)
    path = tmp_path / f"bomb{kind}{suffix}"
    start = {".jsonl": b'{"text": "', ".json": b'[{"text": "', ".csv": b'text\n"', ".txt": b""}[kind]
    path.write_bytes(pack(start + b"a" * (32 * 2**20)))
    assert path.stat().st_size < 2**16
    tracemalloc.start()
    try:
        problems = [row for row in read_rows(path) if isinstance(row, Problem)]
        assert problems, "an endless row is told"
    except UserError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize("deep", [200, 1000, 20_000])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_great_depth_are_told_as_bad(tmp_path, suffix, deep):
    path = tmp_path / f"rows{suffix}"
    text = '{"text": ' + "[" * deep + "]" * deep + "}"
    path.write_text(f"[{text}]" if suffix == ".json" else f"{text}\n")
    if suffix == ".json" and deep > 200:  # where a list goes on behind such a row, nobody can tell
        with pytest.raises(UserError, match="nested too deeply"):
            list(read_rows(path))
        return
    (problem,) = read_rows(path)
    assert isinstance(problem, Problem)
    assert "nested too deeply" in problem.what


def test_brackets_inside_texts_are_no_depth():
    parser = Parser()
    for deep, told in ((99, ""), (100, "nested too deeply, in more than 100 levels")):
        text = json.dumps({"text": "[{" * 5000, "list": [[1]] * 300, "x": "DEEP"})
        parser.value(text.replace('"DEEP"', "[" * deep + "]" * deep))
        assert parser.trouble == told


def test_a_parquet_file_cannot_bring_a_type_that_unpickles(tmp_path):
    """Arrow once unpickled what stood in the metadata of an extension type (CVE-2023-47248)."""
    mark = tmp_path / "MARK"
    payload = pickle.dumps(Bomb(mark))
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload,
    }
    field = pa.field("text", pa.string(), metadata=metadata)
    pq.write_table(pa.table([pa.array(["a"])], schema=pa.schema([field])), tmp_path / "rows.parquet")
    try:
        found = list(read_rows(tmp_path / "rows.parquet"))
    except UserError:
        found = []
    assert not mark.exists()
    assert all(isinstance(row, SourceRow | Problem) for row in found)
    pickle.loads(payload)
    assert mark.exists()


def test_a_dataset_folder_cannot_bring_code_or_files_from_elsewhere(lab):
    dataset = lab.root / "set"
    dataset.mkdir()
    (dataset / "set.py").write_text(f"import os\nos.mkdir({str(lab.mark)!r})\n")
    (lab.root / "secret.jsonl").write_text('{"text": "x"}\n')
    with unchanged(lab.root.parent):
        assert command("check", lab.recipe, f"data.train={{hub: {dataset}}}").code == 2
    (dataset / "set.py").unlink()
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../secret.jsonl\n---\n"
    (dataset / "README.md").write_text(card)
    said = command("check", lab.recipe, f"data.train={{hub: {dataset}}}")
    assert said.code == 2, said.text
    (dataset / "README.md").write_text(f"---\nx: !!python/object/apply:os.mkdir ['{lab.mark}']\n---\n")
    assert command("check", lab.recipe, f"data.train={{hub: {dataset}}}").code == 2
    assert not lab.mark.exists()
