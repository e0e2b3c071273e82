"""Datasets of the hub are the files they consist of; what is missing is told. Folders and a cache stand for the hub."""

import gzip
import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from ftune.data import Source
from ftune.data.hub import hub_files
from ftune.data.rows import read_rows
from ftune.errors import UserError
from ftune.recipe import DataSection
from ftune.run.datasets import sources_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"a": {"x": 1}, "b": "2"}, {"a": {"x": "2", "y": "null"}, "b": "2020-01-01"}]
"""Rows that the library would change: the text "2" into a number, "null" into nothing."""


def read_hub(*dataset):
    return [row for path in hub_files(*dataset).paths for row in read_rows(path)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Offline, with caches of this test alone."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "cache"


def write(folder: Path, name: str, rows=ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return folder / name


def test_a_split_is_the_rows_of_its_files_unchanged(tmp_path):
    one, other = write(tmp_path / "set", "train-0.jsonl"), write(tmp_path / "set", "train-1.jsonl.gz")
    write(tmp_path / "set", "test.jsonl", [])
    rows = list(read_hub(str(tmp_path / "set"), "train"))
    assert rows == [*read_rows(one), *read_rows(other)]
    assert [row.fields for row in rows] == ROWS * 2
    assert hub_files(str(tmp_path / "set"), "train").commit is None


def test_the_library_itself_would_change_these_rows(tmp_path):
    """Why its reading is not used; when this fails, it may be."""
    write(tmp_path / "set", "train.jsonl", [{"x": 1}, {"x": "2"}])
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "c"))
    assert [row["x"] for row in loaded] == [1, 2]


def test_splits_and_configurations_are_those_of_the_card(tmp_path):
    card = "---\nconfigs:\n- config_name: one\n  data_files:\n  - {split: main, path: x.jsonl}\n"
    card += "- config_name: two\n  data_files:\n  - {split: main, path: y.jsonl}\n---\n"
    write(tmp_path / "set", "x.jsonl")
    write(tmp_path / "set", "y.jsonl", [])
    (tmp_path / "set/README.md").write_text(card)
    name = str(tmp_path / "set")
    assert hub_files(name, "main", configuration="two").paths == (tmp_path / "set/y.jsonl",)
    with pytest.raises(UserError, match=r"(?s)cannot be loaded.*one.*two"):
        hub_files(name, "main")
    with pytest.raises(UserError, match=r"cannot be loaded.*three"):
        hub_files(name, "main", configuration="three")
    with pytest.raises(UserError, match=r"(?s)no split 'train'.*splits are main"):
        hub_files(name, "train", configuration="one")


def test_a_way_of_reading_that_is_not_ours_is_refused(tmp_path):
    write(tmp_path / "set", "x.csv")
    card = '---\nconfigs:\n- config_name: default\n  data_files: x.csv\n  sep: ";"\n---\n'
    (tmp_path / "set/README.md").write_text(card)
    with pytest.raises(UserError, match="sep=';'"):
        hub_files(str(tmp_path / "set"), "train")


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.json", "train.jsonl", "train.txt", "train.parquet"])
def test_the_usual_kinds_are_read_by_default(tmp_path, name):
    path = write(tmp_path / "set", name)
    assert hub_files(str(tmp_path / "set"), "train").paths == (path,)


def test_a_kind_that_cannot_be_read_is_told(tmp_path):
    write(tmp_path / "set", "train.xml")
    with pytest.raises(UserError, match=r"train.xml is of no kind that can be read|cannot be loaded"):
        hub_files(str(tmp_path / "set"), "train")


def test_without_a_network_the_cache_is_read(cache):
    home = cache / "datasets--owner--name"
    write(home / "snapshots" / COMMIT, "train.jsonl")
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    files = hub_files("owner/name", "train")
    assert (files.commit, [path.name for path in files.paths]) == (COMMIT, ["train.jsonl"])
    assert [row.fields for row in read_hub("owner/name", "train", COMMIT)] == ROWS
    section = DataSection(train={"hub": "owner/name", "weight": 2})
    assert sources_of(section) == [Source(files.paths[0], 2.0, COMMIT)]
    with pytest.raises(UserError, match="the dataset owner/name at other: neither in the cache nor to be reached"):
        list(read_hub("owner/name", "train", "other"))


@pytest.mark.parametrize("name", ["owner/nothing", "nothing", "./nothing", "../x/y", "a b", ""])
def test_a_dataset_that_cannot_be_had_is_told(name):
    with pytest.raises(UserError, match="the dataset"):
        list(read_hub(name, "train"))


def test_with_a_network_only_the_files_of_the_split_are_fetched_at_one_commit(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl")
    listed = f"hf://datasets/owner/name@{COMMIT}/sub/a.jsonl"
    listed_of = {"train": [listed], "test": ["hf://datasets/owner/name@x/t.jsonl"]}
    as_lists = {split: datasets.data_files.DataFilesList(files, []) for split, files in listed_of.items()}
    config = datasets.builder.BuilderConfig(data_files=datasets.data_files.DataFilesDict(as_lists))
    asked = []

    def download(*arguments, **options):
        asked.append((arguments, options))
        return str(path)

    def builder(name, configuration, *, revision):
        assert (name, configuration, revision) == ("owner/name", None, "v1")
        return type("Builder", (), {"config": config})

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    files = hub_files("owner/name", "train", "v1")
    assert (files.paths, files.commit) == ((path,), COMMIT)
    assert asked == [(("owner/name", "sub/a.jsonl"), {"repo_type": "dataset", "revision": COMMIT})]


def test_code_that_comes_with_a_dataset_is_never_run(tmp_path):
    """Case 110."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="the dataset"):
        list(read_hub(str(folder), "train"))
    assert not (tmp_path / "ran").exists()
