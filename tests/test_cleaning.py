"""What a run does with rows that repeat each other, or what it is measured on. Numbers: trust cases."""

import json

import pytest
from conftest import chat, make_tokenizer, save_base, write_recipe, write_rows

from ftune import folder, recipe
from ftune.errors import UserError
from ftune.run import preview
from ftune.run.inputs import require
from ftune.run.training import train_run

PLACES = [(animal, place) for animal in ("cats", "owls", "mice", "geese") for place in ("barn", "tall tower", "cellar")]
DISTINCT = [
    chat(f"How many {animal} live in the {place} number {i}?", f"There are {i} of them.")
    for i, (animal, place) in enumerate(PLACES)
]
ASKED = chat("Which of the seven rivers runs through the old town?", "The green one.")


@pytest.fixture
def place(tmp_path):
    save_base(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path


def read(place, rows, **data):
    write_rows(place / "train.jsonl", rows)
    return require(recipe.load(write_recipe(place, data={"decontaminate": True, "deduplicate": "exact", **data})))


def used(inputs):
    return [example.row_id.partition(":")[2] for example in inputs.train.examples]


def test_a_row_that_repeats_an_earlier_one_is_left_out_and_listed_with_it(place):
    """White space at the ends of lines does not count; another answer does."""
    first, second = DISTINCT[:2]
    spaced = chat(first["messages"][0]["content"] + "  ", first["messages"][1]["content"])
    other = chat(first["messages"][0]["content"], "Nobody knows.")
    inputs = read(place, [first, second, first, spaced, other])
    assert used(inputs) == ["1", "2", "5"]
    assert [(twin.row_id, twin.twin_id, twin.reason) for twin in inputs.twins] == [
        ("train.jsonl:3", "train.jsonl:1", "duplicate"), ("train.jsonl:4", "train.jsonl:1", "duplicate"),
    ]  # fmt: skip
    account = inputs.account()
    assert (account["rows_in"], account["rows_used"], account["dropped"]) == (5, 3, {"duplicate": 2})
    assert (account["duplicates"], account["contaminated"]) == (2, None)
    assert account["sources"]["train.jsonl"]["rows_used"] == 3
    assert account["supervised_tokens"] == sum(e.tokens.num_supervised for e in inputs.train.examples)
    assert used(read(place, [first, first], deduplicate="off")) == ["1", "2"]


def test_near_duplicates_go_where_they_are_asked_to(place):
    words = " ".join(f"{'aeiou'[i % 5]}{'bcdfghkl'[i % 8]}{'mnprst'[i % 6]}" for i in range(110))
    near = chat(words, "Yes."), chat(words + " now", "Yes.")
    assert used(read(place, [near[0], DISTINCT[0], near[1]])) == ["1", "2", "3"]
    inputs = read(place, [near[0], DISTINCT[0], near[1]], deduplicate="near")
    assert used(inputs) == ["1", "2"]
    assert inputs.twins[0].reason == "near_duplicate"
    assert inputs.account()["dropped"] == {"near_duplicate": 1}


LEAKS = {
    "verbatim": ASKED,
    "other case": chat(ASKED["messages"][0]["content"].upper(), "The green one."),
    "other punctuation": chat("Which, of the seven rivers: runs through the old town!", "The green one."),
    "inside a longer row": chat(
        "A quiz. Which of the seven rivers runs through the old town? Answer quickly.", "The green one."
    ),
    "another answer": chat(ASKED["messages"][0]["content"], "The blue one."),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("where", ["test", "validation", "probe"])
def test_a_row_that_holds_what_is_measured_is_left_out_and_listed(place, leak, where):
    """Case 35, and 31 for a validation file."""
    write_rows(place / "held.jsonl", [ASKED, chat("What does the miller sing on market days?", "A song.")])
    write_rows(place / "train.jsonl", [*DISTINCT, LEAKS[leak]])
    data = {"decontaminate": True, "deduplicate": "exact"}
    sections = {"data": data | ({} if where == "probe" else {where: "held.jsonl"})}
    if where == "probe":
        sections["evaluation"] = {"probe": "held.jsonl"}
    inputs = require(recipe.load(write_recipe(place, **sections)))
    assert len(inputs.train) == len(DISTINCT)
    (twin,) = inputs.twins
    assert (twin.row_id, twin.twin_id) == (f"train.jsonl:{len(DISTINCT) + 1}", "held.jsonl:1")
    assert inputs.account()["contaminated"] == 1
    assert inputs.account()["dropped"] == {"contaminated": 1}


@pytest.mark.parametrize("shape", ["prompt_completion", "text", "alpaca", "labelled"])
def test_leaks_are_found_in_every_shape(place, shape):
    question, answer = (message["content"] for message in ASKED["messages"])
    forms = {
        "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
        "text": lambda q, a: {"text": f"{q} {a}"},
        "alpaca": lambda q, a: {"instruction": q, "output": a},
        "labelled": lambda q, a: {"text": q, "label": a},
    }
    rows = [[message["content"] for message in row["messages"]] for row in DISTINCT]
    write_rows(place / "test.jsonl", [forms[shape](question, answer), forms[shape](*rows[0])])
    write_rows(
        place / "train.jsonl", [*(forms[shape](*row) for row in rows[1:]), forms[shape](question.upper(), answer)]
    )
    sections = {"objective": {"name": "classification"}} if shape == "labelled" else {}
    metric = {"text": {"metric": "loss"}, "labelled": {"metric": "accuracy"}}.get(shape, {})
    labels = {row[1] for row in rows} | {answer}
    path = write_recipe(place, data={"test": "test.jsonl", "decontaminate": True}, evaluation=metric, **sections)
    if shape == "labelled":
        # Labels of the test rows must be known from training.
        extra = [{"text": f"Tell me something of kind {label}", "label": label} for label in sorted(labels)]
        with (place / "train.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in extra)
    inputs = require(recipe.load(path))
    assert [twin.row_id for twin in inputs.twins] == [f"train.jsonl:{len(rows)}"]


def test_what_is_done_about_contaminated_rows_is_the_recipes_choice(place, capfd):
    write_rows(place / "test.jsonl", [ASKED])
    rows = [*DISTINCT, ASKED]
    with pytest.raises(UserError, match=r"row train.jsonl:13: holds what test.jsonl:1 asks"):
        read(place, rows, test="test.jsonl", decontaminate="error")
    reported = read(place, rows, test="test.jsonl", decontaminate="report")
    assert len(reported.train) == len(rows)
    assert reported.account()["contaminated"] == 1
    assert "are trained on, as data.decontaminate: report says" in capfd.readouterr().err
    assert len(read(place, rows, test="test.jsonl", decontaminate="remove").train) == len(DISTINCT)
    unseen = read(place, rows, test="test.jsonl", decontaminate=False)
    assert (len(unseen.train), unseen.account()["contaminated"]) == (len(rows), None)


def test_nothing_left_is_an_error(place):
    write_rows(place / "test.jsonl", [ASKED])
    with pytest.raises(UserError, match="0 usable examples: all 2 training rows are duplicates or contaminated"):
        read(place, [ASKED, ASKED], test="test.jsonl")


@pytest.mark.parametrize("order", [1, -1])
def test_a_share_set_aside_has_no_twin_in_training(place, order):
    """Case 31: also of rows that stay repeated because nobody removes them, and whatever the order of the rows."""
    rows = [row for i, row in enumerate(DISTINCT) for _ in range(1 + i % 3)][::order]
    inputs = read(place, rows, validation=0.3, deduplicate="off")
    train, validation = ({e.text for e in part.examples} for part in (inputs.train, inputs.validation))
    assert not train & validation
    assert train | validation == {e.text for e in read(place, rows).train.examples}
    assert 0.15 * len(rows) <= len(inputs.validation) <= 0.45 * len(rows)
    assert inputs.account()["dropped"] == {"validation": len(inputs.validation)}
    again = read(place, rows[::-1], validation=0.3, deduplicate="off")
    assert {e.text for e in again.validation.examples} == validation
    other = require(recipe.load(place / "recipe.yaml", ["training.seed=1"]))
    assert {e.text for e in other.validation.examples} != validation


def test_a_run_lists_what_it_left_out_and_its_report_counts_it(place):
    write_rows(place / "test.jsonl", [ASKED])
    write_rows(place / "train.jsonl", [*DISTINCT, DISTINCT[0], ASKED])
    data = {"test": "test.jsonl", "decontaminate": True, "deduplicate": "exact", "validation": 0.2}
    loaded = recipe.load(write_recipe(place, data=data, training={"max_steps": 2}))
    report = train_run(loaded)
    listed = folder.read_json_lines(loaded.output.dir / "twins.jsonl")
    assert [(line["row_id"], line["twin_id"], line["reason"]) for line in listed] == [
        ("train.jsonl:13", "train.jsonl:1", "duplicate"), ("train.jsonl:14", "test.jsonl:1", "equal"),
    ]  # fmt: skip
    assert (report["data"]["duplicates"], report["data"]["contaminated"]) == (1, 1)
    assert report["data"]["rows_in"] == 14 == report["data"]["rows_used"] + sum(report["data"]["dropped"].values())
    steps = folder.read_json_lines(loaded.output.dir / "metrics.jsonl")
    seen = {row_id for step in steps for row_id in step.get("row_ids", ())}
    assert not seen & {"train.jsonl:13", "train.jsonl:14"}


def test_files_are_seen_as_often_as_their_weights_say(place):
    """Case 32: 100 rows each, weights 3 and 1: an epoch of 400, of which 300 are of the first."""
    for name in "ab":
        write_rows(place / f"{name}.jsonl", [chat(f"{name} asks question {i}", f"{name}{i}") for i in range(100)])
    files = [{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 1}]
    path = write_recipe(place, data={"train": files}, training={"max_steps": 100, "batch_size": 4})
    loaded = recipe.load(path)
    train_run(loaded)
    steps = folder.read_json_lines(loaded.output.dir / "metrics.jsonl")
    seen = [row_id[0] for step in steps for row_id in step["row_ids"]]
    assert (seen.count("a"), seen.count("b")) == (300, 100)
    with pytest.raises(UserError, match=r"no such file"):
        require(recipe.load(path, ["data.train=[a.jsonl, missing.jsonl]"]))


def test_check_tells_how_rows_are_read(place):
    write_rows(place / "train.jsonl", [{**row, "source": "x"} for row in DISTINCT])
    found = preview.check(recipe.load(write_recipe(place)))
    notes = list(found["data"]["notes"])
    assert "train.jsonl: rows are messages, by the column 'messages'" in notes
    assert "train.jsonl: columns that are not read: source" in notes
    assert found["problems"] == []


def test_a_dataset_of_the_hub_is_trained_on_and_its_files_are_in_the_manifest(place):
    (place / "set").mkdir()
    path = write_rows(place / "set" / "train.jsonl", DISTINCT)
    write_rows(place / "held.jsonl", [ASKED, {"prompt": "no"}])
    data = {"train": {"hub": "set"}, "test": "held.jsonl", "on_bad_row": "skip"}
    loaded = recipe.load(write_recipe(place, data=data, training={"max_steps": 1}))
    report = train_run(loaded)
    manifest = folder.read_json(loaded.output.dir / "manifest.json")
    assert manifest["data"][str(path)] == folder.sha256_file(path)
    assert manifest["commits"] == {}
    assert report["data"]["notes"]["data.test: dropped bad_row 1"] == 1
