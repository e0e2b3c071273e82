"""Case 110: names out of data, recipes and folders lead nowhere, YAML is plain data, and no link is followed."""

import json
import os
import shutil

import pytest
import torch
import yaml
from conftest import save_base, write_rows
from hostile_kit import change, command, refused, tree, unchanged
from huggingface_hub import constants

from ftune import folder, lock, model, stored
from ftune.errors import UserError
from ftune.recipe import ModelSection
from ftune.report.recorded import is_classifier
from ftune.run.variants import parse_methods

USES_RUN_RECIPE = ("eval", "merge", "verify", "generate")
CLIMBING = ["../../x", "/etc/x", "a/../../b", "..", "a\x00b", "a/b", "~/x", "$HOME", "\x1b[2J"]


# YAML


def bomb(mark) -> str:
    return f"!!python/object/apply:os.mkdir ['{mark}']"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_a_yaml_tag_leaves_its_mark_where_it_is_read_without_care(tmp_path):
    yaml.unsafe_load(bomb(tmp_path / "MARK"))
    assert (tmp_path / "MARK").exists()


PLACES = ["model: {}", "model: base\ndata:\n  train:\n  - {}", "{}: 1", "? {}\n: 1", "gates: {}"]


@pytest.mark.parametrize("place", PLACES)
def test_a_yaml_tag_in_a_recipe_is_refused(lab, place):
    lab.recipe.write_text(place.format(bomb(lab.mark)) + "\n")
    told = "a key must be plain text" if ": 1" in place else "YAML tag !!python/object/apply:os.mkdir is refused"
    refused(lab, ["check", "inspect", "plan", "train", "overwrite", "compare"], told)


def test_a_yaml_tag_in_an_override_or_among_methods_is_refused(lab):
    with unchanged(lab.root.parent):
        said = command("train", lab.recipe, f"data.train={bomb(lab.mark)}")
        assert said.code == 2
        assert "YAML tag !!python/object/apply:os.mkdir is refused" in said.text
        with pytest.raises(UserError, match="YAML tag"):
            parse_methods(bomb(lab.mark), "lora")


def test_a_yaml_tag_in_the_recipe_of_a_run_is_refused(lab):
    for run in (lab.run, lab.half):
        (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + f"extra: {bomb(lab.mark)}\n")
    refused(lab, [*USES_RUN_RECIPE, "resume"], "YAML tag !!python/object/apply:os.mkdir is refused")
    assert command("report", lab.run).code == 0
    assert not lab.mark.exists()


def test_a_recipe_of_aliases_or_of_depth_is_refused_at_once(lab):
    for text, told in (
        (LAUGHS, "anchors, aliases"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: " + "{a: " * 50_000, "nested too deeply"),
        ("x: 1\n" * 100_000, "a recipe of 500,000 bytes"),
        ("".join(f"x{i}: 1\n" for i in range(3000)), "and 400 more"),
    ):
        lab.recipe.write_text(text)
        refused(lab, ["check"], told)
        assert is_classifier(text) is False


# Names


def test_labels_and_names_of_suites_and_rows_lead_nowhere(lab):
    rows = [{"text": f"row {i} {'ab'[i % 2] * 9}", "label": CLIMBING[i % len(CLIMBING)]} for i in range(18)]
    write_rows(lab.root / "labels.jsonl", rows)
    over = [
        "data.train=labels.jsonl",
        "data.test=labels.jsonl",
        "objective=classification",
        "evaluation.metric=accuracy",
    ]
    probe = [{"id": name, "suite": name, "prompt": f"p{i}", "completion": "x"} for i, name in enumerate(CLIMBING)]
    write_rows(lab.root / "probe.jsonl", probe)
    with unchanged(lab.root.parent, without=[lab.new, lab.newer]):
        said = [command("train", lab.recipe, "output.dir=new", *over)]
        said += [command("train", lab.recipe, "output.dir=newer", "evaluation.probe=probe.jsonl")]
        said += [command(verb, path) for verb in ("verify", "eval", "report") for path in (lab.new, lab.newer)]
    for one in said:
        assert one.code in (0, 1), one.text
        assert "\x1b" not in one.text
        assert "\x00" not in one.text
    assert set(folder.read_json(lab.new / "report.json")["task"]["confusion"]["labels"]) == set(CLIMBING)


def test_the_runs_of_a_comparison_stay_in_its_folder():
    text = ", ".join(f"{{name: lora, target_modules: [{json.dumps(name)}]}}" for name in CLIMBING if "\x00" not in name)
    for variant in parse_methods(text, "ia3"):
        assert stored.is_inside(variant.slug)
        assert "/" not in variant.slug


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\x00b", "", 7, None, ["x"], "x" * 5000, "a/../../y"])
def test_an_adapter_that_names_its_base_oddly_is_refused(lab, name):
    (lab.root / "alone").mkdir()
    adapter = lab.root / "alone" / "adapter"
    shutil.copytree(lab.run / "adapter", adapter)
    change(adapter / "adapter_config.json", base_model_name_or_path=name)
    change(adapter / "ftune.json", base_name=name)
    with unchanged(lab.root.parent):
        for arguments in (["generate", adapter, "x"], ["verify", adapter], ["merge", adapter, "--output", lab.out]):
            said = command(*arguments)
            assert said.code == (1 if name == 7 and arguments[0] == "verify" else 2), said.text


@pytest.mark.parametrize(
    "name", ["../elsewhere/model.safetensors", "/ROOT/elsewhere/model.safetensors", "model.bin", 3]
)
def test_shards_outside_the_folder_are_refused(lab, name):
    (lab.root / "elsewhere").mkdir()
    (lab.base / "model.safetensors").rename(lab.root / "elsewhere" / "model.safetensors")
    if isinstance(name, str):
        name = name.replace("/ROOT", str(lab.root))
    names = ["lm_head.weight"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
    (lab.base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lab, ["check", "train", "resume", "verify a model", "generate of a model"], "as a file of weights")


def test_checksums_of_files_elsewhere_count_as_changed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "x").write_text("x")
    digest = folder.sha256_file(tmp_path / "x")
    for name in ("../x", str(tmp_path / "x"), "", "a\x00b", "."):
        assert folder.changed_files(tmp_path / "run", {name: digest}) == [name]


def test_code_that_came_with_a_run_is_not_run(lab):
    (lab.run / "evil.py").write_text(f"import os\nos.mkdir({str(lab.mark)!r})\ndef score(a, b): return 1.0\n")
    text = (lab.run / "recipe.yaml").read_text()
    for metric in ("evil.py:score", str(lab.run / "evil.py:score"), "../run/evil.py:score"):
        (lab.run / "recipe.yaml").write_text(text.replace("metric: exact_match", f"metric: {metric}"))
        refused(lab, USES_RUN_RECIPE, "wants code run that came with this folder: evaluation.metric")
    written = text.replace("trust_remote_code: false", "trust_remote_code: true")
    (lab.run / "recipe.yaml").write_text(written.replace(f"base: {lab.base}", "base: ../base"))
    refused(lab, USES_RUN_RECIPE, "wants code run that came with this folder: model.base")


def test_a_metric_of_the_users_own_runs(lab):
    """The same file, named by the user's own recipe: the refusal above refuses something."""
    (lab.root / "evil.py").write_text(f"import os\nos.mkdir({str(lab.mark)!r})\ndef score(a, b): return 1.0\n")
    command("check", lab.recipe, "evaluation.metric=evil.py:score")
    assert lab.mark.exists()


# The hub


def test_the_commit_of_a_hub_base_is_recorded_and_every_file_is_of_it(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home, old, new = tmp_path / "models--owner--name", "a" * 40, "b" * 40
    shutil.copytree(lab.base, home / "snapshots" / old)
    save_base(home / "snapshots" / new, seed=1)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(old)
    settings = ModelSection(base="owner/name")
    assert model.fingerprint(settings) == {"commit": old}
    (home / "refs" / "main").write_text(new)
    loaded = model.load_base(settings, torch.float32, torch.device("cpu"))
    wanted = model.load_base(ModelSection(base=lab.base), torch.float32, torch.device("cpu"))
    assert torch.equal(loaded.lm_head.weight, wanted.lm_head.weight), "main moved while the run went on"
    (home / "refs" / "main").write_text(old)
    said = command("train", lab.recipe, "output.dir=new", "model.base=owner/name")
    assert said.code in (0, 1), said.text
    assert folder.read_json(lab.new / "manifest.json")["base"] == {"commit": old}
    change(home / "snapshots" / old / "config.json", auto_map={"AutoConfig": "evil.Evil"})
    with unchanged(lab.root):
        assert command("check", lab.recipe, "model.base=owner/name").code == 2


# Links


def linked(path, elsewhere):
    """What lies at a path moves elsewhere, and a link stands in its place."""
    if path.exists():
        shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "checkpoints",
        "checkpoints/step-000001",
        "metrics.jsonl",
        "lock.json",
        "plan.json",
        "recipe.yaml",
        "nothing",
    ],
)
def test_no_run_goes_on_through_a_link(lab, name):
    linked(lab.half / name if name else lab.half, lab.root / "elsewhere")
    refused(lab, ["resume"], "symbolic links" if name == "lock.json" else "a link, which leads to")


@pytest.mark.parametrize("name", ["", "adapter", "report.json", "report.html", "metrics.jsonl", "junit.xml", "new"])
def test_no_finished_run_is_written_through_a_link(lab, name):
    linked(lab.run / name if name else lab.run, lab.root / "elsewhere")
    refused(lab, ["eval", "report"], "a link, which leads to")


def test_what_is_overwritten_is_removed_and_what_links_lead_to_stays(lab):
    elsewhere = lab.root.parent / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    for name in ("checkpoints", "adapter", "metrics.jsonl", "report.json", ".tmp-report.json"):
        elsewhere.mkdir(exist_ok=True)
        linked(lab.run / name, elsewhere / name)
    (elsewhere / "kept").mkdir()
    (lab.run / "adapter-link").symlink_to(elsewhere / "kept")
    with unchanged(elsewhere):
        said = command(*lab.commands["overwrite"])
    assert said.code in (0, 1), said.text
    assert not [name for name, what in tree(lab.run).items() if what.startswith("link")]
    shutil.rmtree(elsewhere)


def test_a_run_folder_that_is_a_link_is_not_overwritten(lab):
    linked(lab.run / "lock.json", lab.root / "elsewhere")
    refused(lab, ["overwrite"], "symbolic links")
    (lab.run / "lock.json").unlink()
    linked(lab.run, lab.root / "elsewhere")
    refused(lab, ["overwrite"], "a link, which leads to")


def test_a_merge_is_not_written_or_removed_through_a_link(lab):
    assert command("merge", lab.run, "--output", lab.root / "elsewhere").code == 0
    (lab.root / "out").symlink_to(lab.root / "elsewhere")
    for more in ([], ["--overwrite"]):
        with unchanged(lab.root):
            said = command(*lab.commands["merge"], *more)
        assert said.code == 2, said.text


def test_a_comparison_is_not_written_through_a_link(lab):
    (lab.root / "elsewhere").mkdir()
    (lab.root / "run-compare").symlink_to(lab.root / "elsewhere")
    refused(lab, ["compare"], "a link, which leads to")


def test_a_file_is_written_in_place_of_a_link_and_of_one_planted_beside_it(tmp_path):
    (tmp_path / "victim").write_text("kept")
    for name in ("x.json", ".tmp-x.json"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    folder.write_json(tmp_path / "x.json", {})
    assert (tmp_path / "victim").read_text() == "kept"
    assert not (tmp_path / "x.json").is_symlink()
    assert not os.path.lexists(tmp_path / ".tmp-x.json")


LOCKS = [json.dumps({"pid": pid}) for pid in (-1, 0, 2**40, 10**30, "1", None, [1])]


@pytest.mark.parametrize("text", [*LOCKS, "[" * 4000])
def test_a_lock_that_names_no_process_is_taken_over(tmp_path, text):
    """The number goes to kill(), which takes 0 and -1 for every process there is."""
    (tmp_path / lock.NAME).write_text(text)
    with lock.hold(tmp_path):
        assert folder.read_json(tmp_path / lock.NAME)["pid"] == os.getpid()


def test_a_folder_of_the_users_rows_may_hold_links(lab):
    """The hub's cache is full of them: what is only read is read."""
    linked(lab.base / "model.safetensors", lab.root / "blob")
    linked(lab.root / "train.jsonl", lab.root / "rows.jsonl")
    assert command("check", lab.recipe).code == 0
    assert command("generate", lab.base, "x", "--max-new-tokens", 1).code == 0
