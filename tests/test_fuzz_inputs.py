"""Recipes and rows, whatever they look like: they are read, or an error tells a person what is wrong with them."""

import copy
import gzip
import json
from pathlib import Path

import pytest
import yaml
from chat_kit import fresh
from conftest import MINIMAL, chat, make_tokenizer
from fuzz_kit import NAMES, as_json, damaged, handled, inputs, mutated, odd
from hostile_kit import unchanged
from hypothesis import example, given
from hypothesis import strategies as st
from shape_kit import ANSWERED, ASKED, CALL, TOOL, said, turn

from ftune import batches, data, probe
from ftune.data import Rules, Source
from ftune.recipe import dump, load

WHOLE = {
    "model": {"base": "base", "dtype": "auto", "attention": "auto", "trust_remote_code": False},
    "method": {"name": "lora", "rank": 4, "target_modules": ["q_proj", ".*mlp.*"], "layers": [0, 1]},
    "objective": "sft",
    "data": {
        "train": ["a.jsonl", {"path": "b.csv", "weight": 0.5}, {"hub": "owner/name", "split": "train"}],
        "validation": 0.05,
        "columns": {"prompt": "question"},
        "max_length": 128,
    },
    "training": {"learning_rate": "1e-4", "epochs": 2, "batch_size": 4, "seed": 1, "select": "best"},
    "evaluation": {"metric": "score.py:f", "probe": {"harness": ["hellaswag", "own.yaml"]}},
    "gates": {"min_score": 0.5, "max_forgetting": 0.1},
    "output": {"dir": "runs/{recipe}", "trackers": []},
}
METHODS = ["full", "lora", "qlora", "dora", "adalora", "vera", "ia3", "bitfit", "bottleneck", "prefix_tuning"]
KEYS = [f"{section}.{key}" for section, part in WHOLE.items() if isinstance(part, dict) for key in part]
KEYS += ["model", "method", "a", "data.columns.x", "method.rank.x", "", ".", "model..base", "\x00", "method.alpha"]
PIECES = [
    "model:",
    "data: ",
    "- ",
    "&a ",
    "*a",
    "<<: ",
    "!!str ",
    "!!int ",
    "? ",
    "|\n",
    ">\n",
    "{",
    "}",
    "[",
    "]",
    "'",
]
PIECES += [
    "\n",
    "\n  ",
    "1e999",
    "0x1F",
    "012",
    ".nan",
    "~",
    "%YAML 1.1\n",
    "---\n",
    "...\n",
    "\t",
    "#",
    '"\\ud800"',
    "\x85",
]
WORDS = st.sampled_from(PIECES)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder for the files, beside one in which nothing may change."""
    path = tmp_path_factory.mktemp("fuzz") / "inside"
    path.mkdir()
    return path


def read_recipe(place: Path, content: bytes, overrides=()) -> None:
    path = place / "recipe.yaml"
    path.write_bytes(content)

    def call() -> None:
        dump(load(path, overrides))

    with unchanged(place.parent, without=[path]):
        handled("recipes", call)


@inputs(60)
@given(content=st.one_of(st.binary(max_size=60), damaged(MINIMAL.encode()), damaged(yaml.safe_dump(WHOLE).encode())))
@example(content=b"a: 0b\n")
@example(content=b"\xef\xbb\xbfmodel: x")
def test_bytes_of_a_recipe(place, content):
    read_recipe(place, content)


@inputs(40)
@given(parts=st.lists(st.one_of(WORDS, st.text(max_size=5), st.sampled_from(KEYS)), max_size=14))
def test_pieces_of_yaml(place, parts):
    read_recipe(place, "".join(parts).encode("utf-8", "surrogatepass"))


@inputs(80)
@given(recipe=mutated(WHOLE), method=st.sampled_from(METHODS))
def test_values_of_a_recipe(place, recipe, method):
    if isinstance(recipe, dict) and isinstance(recipe.get("method"), dict):
        recipe["method"].setdefault("name", method)
    read_recipe(place, as_json(recipe))


@inputs(60)
@given(key=st.one_of(st.sampled_from(KEYS), st.text(max_size=9)), value=st.one_of(odd, WORDS), is_bare=st.booleans())
def test_overrides_of_a_recipe(place, key, value, is_bare):
    text = value if is_bare and isinstance(value, str) else json.dumps(value)
    read_recipe(place, MINIMAL.encode(), [f"{key}={text}"])


SHAPES = {
    "messages": {
        "messages": [turn("system", "s"), turn("user", "hi"), turn("assistant", "ho", weight=1)],
        "tools": [TOOL],
    },
    "tools": {"messages": [ASKED, turn("assistant", "", tool_calls=[CALL]), turn("tool", "3"), ANSWERED]},
    "sharegpt": {"conversations": [said("human", "hi"), said("gpt", "ho")], "system": "s"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "turns": {"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]},
    "alpaca": {"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"]]},
    "text": {"text": "once upon a time"},
    "labelled": {"text": "good", "label": "yes", "labels": [1, 2]},
    "choices": {"prompt": "p", "choices": ["a", "b"], "answer": 1, "suite": "s", "id": "1", "metric": None},
}
FORMATS = ["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "labelled"]
TOKENIZERS = {}


def read_rows(place: Path, content: bytes, suffix: str, shape: str, may_skip: bool) -> None:
    """As training would: read, shaped, rendered, tokenized, put into a batch; and as a probe."""
    tokenizer = TOKENIZERS.setdefault(shape == "text", make_tokenizer(None) if shape == "text" else fresh("qwen3"))
    path = place / f"rows{suffix}"
    path.write_bytes(gzip.compress(content, 1) if suffix.endswith(".gz") else content)
    rules = Rules(format=shape, max_length=400, too_long="drop", on_bad_row="skip" if may_skip else "error")

    def train() -> None:
        found = data.load(tokenizer, [Source(path)], rules, 500)
        batches.collate(found.examples[:2])
        assert found.audit.rows_in == len(found.outcomes)

    with unchanged(place.parent, without=[path]):
        handled("rows", train)
        handled("rows", lambda: probe.load(tokenizer, path, 400, 500))
    path.unlink()


SUFFIXES = st.sampled_from(
    [".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz", ".json.gz", ".parquet", ".jsonl.zst"]
)
ROWS = b"".join(as_json(row) + b"\n" for row in SHAPES.values())
TABLE = b'prompt,completion\n"a ""b""",c\nd,"e\nf"\n\n'


@inputs(50)
@given(
    content=st.one_of(st.binary(max_size=60), damaged(ROWS), damaged(TABLE), damaged(b"[" + ROWS[:80] + b"]")),
    suffix=SUFFIXES,
    may_skip=st.booleans(),
)
@example(content=b"\x1f\x8b", suffix=".txt", may_skip=False)
@example(content=b'{"text": ' + b"9" * 5000 + b"}", suffix=".jsonl", may_skip=False)
@example(content=b'{"text": ' + b"[" * 100_000 + b"}", suffix=".json", may_skip=True)
@example(content=b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", suffix=".jsonl", may_skip=False)
@example(content=b"text\n" + b"a" * 200_000, suffix=".csv", may_skip=False)
def test_bytes_of_rows(place, content, suffix, may_skip):
    read_rows(place, content, suffix, "auto", may_skip)


@inputs(120)
@given(
    rows=st.sampled_from(list(SHAPES)).flatmap(lambda name: st.lists(mutated(SHAPES[name]), min_size=1, max_size=3)),
    suffix=st.sampled_from([".jsonl", ".json"]),
    shape=st.sampled_from(FORMATS),
    may_skip=st.booleans(),
)
def test_values_of_rows(place, rows, suffix, shape, may_skip):
    content = as_json(rows) if suffix == ".json" else b"".join(as_json(row) + b"\n" for row in rows)
    read_rows(place, content, suffix, shape, may_skip)


CELL = st.one_of(st.sampled_from(NAMES), st.text(max_size=6))


@inputs(30)
@given(
    cells=st.lists(
        st.lists(st.one_of(st.sampled_from(NAMES), st.text(max_size=6)), min_size=1, max_size=3), max_size=3
    ),
    header=st.sampled_from([["text"], ["prompt", "completion"], ["instruction", "input", "output"], ["text", "label"]]),
    suffix=st.sampled_from([".csv", ".tsv"]),
)
def test_cells_of_tables(place, cells, header, suffix):
    lines = [("," if suffix == ".csv" else "\t").join(row) for row in [header, *cells]]
    read_rows(place, "\n".join(lines).encode("utf-8", "surrogatepass"), suffix, "auto", True)


def test_the_good_ones_are_good(place):
    """What is mutated above is accepted as it is, so that a mutation reaches what lies behind."""
    recipe = copy.deepcopy(WHOLE)
    recipe["data"]["train"] = recipe["data"]["train"][:2]
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    load(place / "recipe.yaml")
    for name, row in SHAPES.items():
        (place / "good.jsonl").write_bytes(as_json(row))
        if name == "choices":
            assert len(probe.load(fresh("qwen3"), place / "good.jsonl", 64, 500).items) == 1
        else:
            assert len(data.load(fresh("qwen3"), [Source(place / "good.jsonl")], Rules(max_length=400), 500)) == 1
    assert chat("a", "b")
