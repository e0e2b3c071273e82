"""The probe: what is read, how choices are weighed, and that nothing but training moves it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, chat, make_model, make_tokenizer, run, save_base, write_recipe, write_rows

from ftune import folder, probe, recipe
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.probe import loading
from ftune.probe.choices import Weighed, encode_pair, weigh
from ftune.recipe import TrainingSection
from ftune.run.inputs import require
from ftune.settings import LoraSettings
from ftune.train import TrainingPlan

CHOICES = [
    {
        "suite": "letters" if i % 2 else "words",
        "prompt": f"What comes after {chr(97 + i)}?",
        "choices": [chr(98 + i), f"nothing {i}", "z"],
        "answer": i % 3,
    }
    for i in range(12)
]
ROWS: list[dict[str, Any]] = [
    *CHOICES,
    *({"suite": "asked", "prompt": f"say {c}", "completion": c * 3, "metric": "contains"} for c in "abcde"),
    {"text": "some words that nobody asked for"},
]
PLAN = TrainingPlan(TrainingSection(learning_rate=1.0), 1, True, "auto", 0)


def read(tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any = None) -> probe.Probe:
    tokenizer = tokenizer or make_tokenizer()
    return probe.load(tokenizer, write_rows(tmp_path / "probe.jsonl", rows), 512, len(tokenizer))


def with_tokens(tokens: int) -> TrainingPlan:
    return replace(PLAN, training=TrainingSection(learning_rate=1.0, micro_batch_tokens=tokens))


def test_rows_become_items_of_their_suites(tmp_path: Path) -> None:
    items = read(tmp_path, ROWS).items
    assert [item.item.suite for item in items[:3]] == ["words", "letters", "words"]
    choice, question = items[0], items[-1]
    assert (choice.item.kind, choice.item.metric, choice.item.expected) == ("choice", "acc_norm", "b")
    assert (question.item.kind, question.item.metric, question.item.expected) == ("answer", "contains", "eee")
    assert question.item.row_id == "probe.jsonl:17"


def test_turns_may_ask_and_an_id_names_an_item(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "well?"}]
    for key in ("messages", "prompt"):
        (item,) = read(tmp_path, [{"id": "mine", key: turns, "choices": ["yes", "no"], "answer": 1}]).items
        assert (item.item.suite, item.item.row_id, item.item.prompt) == (
            "probe",
            "mine",
            "system: be brief\nuser: well?",
        )
        assert isinstance(item, probe.Choice)
        assert item.candidates[1].text.endswith("<|im_start|>assistant\nno")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "p", "choices": ["a"], "answer": 0}, '"choices" must be two texts or more'),
    ({"prompt": "p", "choices": ["a", " "], "answer": 0}, "none of them empty"),
    ({"prompt": "p", "choices": ["a", "a"], "answer": 0}, "the right choice stands twice"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": 2}, "the number of the right choice, 0 to 1"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": True}, "the number of the right choice, 0 to 1"),
    ({"prompt": "p", "choices": ["a", "b"]}, 'missing "answer"'),
    ({"prompt": " ", "choices": ["a", "b"], "answer": 0}, "the prompt is empty"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": 0, "metric": "contains"}, "choices are scored by acc_norm"),
    ({**chat("p", "q"), "choices": ["a", "b"], "answer": 0}, "the turns end with an answer"),
    ({"prompt": "p", "completion": "c", "metric": "rouge"}, "unknown metric 'rouge'"),
    ({"prompt": "p", "choices": ["a" * 600, "b"], "answer": 0}, "and the model has room for 512"),
    ({"prompt": "p", "completion": "a" * 600}, "and the model has room for 512"),
    ({"question": "p"}, "no known shape"),
]


@pytest.mark.parametrize(("row", "told"), WRONG, ids=[told for _, told in WRONG])
def test_a_row_that_measures_nothing_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, [CHOICES[0], row, {"prompt": "p", "choices": ["a"], "answer": 0}])
    first, second = caught.value.problems
    assert told in first.what
    assert "line 2" in first.where
    assert "line 3" in second.where, "every problem at once"


def test_two_items_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the id 'x' stands twice"):
        read(tmp_path, [{**row, "id": "x", "suite": "s"} for row in CHOICES[:2]])


def test_turns_need_a_template(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "well?"}], "choices": ["yes", "no"], "answer": 0}
    with pytest.raises(UserError, match="no chat template"):
        read(tmp_path, [row], make_tokenizer(None))


# How choices are weighed


def test_white_space_at_the_border_belongs_to_the_choice() -> None:
    tokenizer = make_tokenizer(None, add_bos=True)
    tokens = encode_pair(tokenizer, "a b \n", " c")
    text = tokenizer.convert_ids_to_tokens(tokens.input_ids)
    assert text == ["<bos>", "a", " ", "b", " ", "\n", " ", "c"]
    assert tokens.supervised == [False] * 4 + [True] * 4


def test_a_beginning_is_added_once() -> None:
    tokenizer = make_tokenizer(None, add_bos=True)
    assert encode_pair(tokenizer, "<bos>a", "b").input_ids == encode_pair(tokenizer, "a", "b").input_ids


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_choice_is_as_likely_as_the_product_of_its_tokens(tmp_path: Path, template: str | None) -> None:
    """Against the whole logits of one row at a time; the last prompt is a single token."""
    tokenizer, model = make_tokenizer(template), make_model(scale=3.0)
    items = read(tmp_path, [*CHOICES, {"prompt": "?", "choices": ["yes", "no"], "answer": 0}], tokenizer).items
    for item, weighed in zip(items, weigh(model, items, PLAN), strict=True):
        for choice, found in zip(item.item.choices, weighed.sums, strict=True):
            prompt = item.item.prompt + " "
            if template:
                prompt = f"<|im_start|>user\n{item.item.prompt}<|im_end|>\n<|im_start|>assistant"
                choice = "\n" + choice
            ids = tokenizer(prompt + choice)["input_ids"]
            first = len(tokenizer(prompt.rstrip(" "))["input_ids"])
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            by_hand = sum(float(log_p[t - 1, ids[t]]) for t in range(first, len(ids)))
            assert found == pytest.approx(by_hand, abs=1e-4)


def test_sum_prefers_the_short_choice_and_per_character_the_long_one(tmp_path: Path) -> None:
    """Case 103: the sums are -4 and -6 for 2 and 12 characters; -2 and -0.5 a character."""
    row = {"prompt": "p", "choices": ["no", "certainly so"], "answer": 0}
    (short,) = read(tmp_path, [row]).items
    (long,) = read(tmp_path, [{**row, "answer": 1}]).items
    weighed = Weighed((-4.0, -6.0), (2, 12))
    assert isinstance(short, probe.Choice)
    assert isinstance(long, probe.Choice)
    assert probe.chosen(short, weighed).accuracies == {"acc": 1.0, "acc_norm": 0.0}
    assert probe.chosen(long, weighed).accuracies == {"acc": 0.0, "acc_norm": 1.0}
    assert probe.chosen(long, weighed).score == 1.0, "the verdict is on acc_norm"
    assert probe.chosen(short, weighed).text == "certainly so"


def test_lengths_count_characters_not_tokens_or_bytes(tmp_path: Path) -> None:
    (item,) = read(tmp_path, [{"prompt": "p", "choices": ["ab", "abc def"], "answer": 0}]).items
    (weighed,) = weigh(make_model(), [item], PLAN)
    assert weighed.lengths == (2, 7)


# Nothing but training moves it


def test_a_probe_of_an_untouched_adapter_tells_exactly_nothing(tmp_path: Path) -> None:
    """Case 106."""
    items, tokenizer = read(tmp_path, ROWS), make_tokenizer()
    base, tuned = make_model(scale=3.0), make_model(scale=3.0)
    METHODS["lora"].attach(tuned, LoraSettings(rank=4, dropout=0.5), 0)
    tuned.train()
    before, again, after = (probe.ask(model, tokenizer, items, PLAN, "x") for model in (base, base, tuned))
    assert before == again == after, "to the last bit, log-likelihoods included"
    assert tuned.training
    found = probe.compare(before, after, probe.kl_to_base(base, tuned, items.everything, PLAN))
    assert [suite["drop"] for suite in found["suites"]] == [0.0, 0.0, 0.0]
    assert (found["worst_drop"], found["kl_to_base"], found["overall"]["drop"]) == (0.0, 0.0, 0.0)
    assert found["general_loss"]["before"] == found["general_loss"]["after"]


def test_dropout_and_sampling_do_not_move_it(tmp_path: Path) -> None:
    """Case 106: a model that is in the middle of training, with an adapter that does something."""
    items, model = read(tmp_path, ROWS), make_model(scale=3.0)
    METHODS["lora"].attach(model, LoraSettings(rank=4, dropout=0.5), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.generation_config.do_sample = True
    still = probe.ask(model.eval(), make_tokenizer(), items, PLAN, "x")
    assert probe.ask(model.train(), make_tokenizer(), items, PLAN, "x") == still
    assert model.training, "it goes on training afterwards"
    assert still.marked[0].log_likelihoods != weigh(make_model(scale=3.0), items.items[:1], PLAN)[0].sums


def test_a_changed_model_moves_it(tmp_path: Path) -> None:
    items, tokenizer = read(tmp_path, ROWS), make_tokenizer()
    base, other = make_model(scale=3.0), make_model(scale=3.0, seed=1)
    before, after = (probe.ask(model, tokenizer, items, PLAN, "x") for model in (base, other))
    assert before != after
    kl = probe.kl_to_base(base, other, items.everything, PLAN)
    assert kl is not None
    assert kl > 0.01


def test_the_size_of_batches_changes_nothing(tmp_path: Path) -> None:
    """Case 106: one row at a time, packed by eights and all at once."""
    items, model = read(tmp_path, ROWS), make_model(scale=3.0)
    alone, eights, packed = (
        probe.ask(model, make_tokenizer(), items, with_tokens(tokens), "x") for tokens in (1, 500, 100_000)
    )
    for other in (eights, packed):
        for one, two in zip(alone.marked, other.marked, strict=True):
            assert (one.score, one.text) == (two.score, two.text)
            for a, b in zip(one.log_likelihoods or (), two.log_likelihoods or (), strict=True):
                assert math.isclose(a, b, rel_tol=1e-6), "float32 has no more digits"
        assert alone.general_loss == pytest.approx(other.general_loss, abs=1e-6)


def test_the_divergence_is_the_mean_over_answer_tokens(tmp_path: Path) -> None:
    """By the definition, from the whole logits of one row at a time."""
    items, base, tuned = read(tmp_path, ROWS), make_model(scale=3.0), make_model(scale=3.0, seed=1)
    found = []
    for example in items.everything:
        ids = torch.tensor([example.tokens.input_ids])
        with torch.no_grad():
            ours, theirs = (model(ids).logits[0].double().log_softmax(-1) for model in (tuned, base))
        each = (ours.exp() * (ours - theirs)).sum(-1)[:-1]
        found += [float(k) for k, label in zip(each, example.tokens.labels[1:], strict=True) if label != -100]
    assert probe.kl_to_base(base, tuned, items.everything, PLAN) == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert probe.kl_to_base(base, tuned, [], PLAN) is None


def test_rows_that_are_not_packed_weigh_the_same(tmp_path: Path) -> None:
    items, model = read(tmp_path, CHOICES).items, make_model(scale=3.0)
    packed, single = weigh(model, items, PLAN), weigh(model, items, replace(PLAN, packing=False))
    for one, other in zip(packed, single, strict=True):
        assert one.sums == pytest.approx(other.sums, abs=1e-4)


# What a run leaves


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run with a probe of every kind, a test set and a gate too fine for it: its report and its folder."""
    workspace = tmp_path_factory.mktemp("probed")
    save_base(workspace / "base")
    write_rows(workspace / "train.jsonl", [chat(f"say {c}", c * 4) for c in "abcdefgh"])
    write_rows(workspace / "test.jsonl", [chat("say x", "xxxx")])
    write_rows(workspace / "probe.jsonl", [{**row, "id": f"row {i}"} for i, row in enumerate(ROWS)])
    return run(
        workspace,
        data={"test": "test.jsonl"},
        evaluation={"probe": "probe.jsonl"},
        gates={"max_forgetting": 0.05},
        training={"max_steps": 12, "learning_rate": 0.05},
    )


def test_the_report_holds_suites_and_how_they_were_asked(probed: tuple[dict[str, Any], Path]) -> None:
    forgetting = probed[0]["forgetting"]
    by_name = {suite["name"]: suite for suite in forgetting["suites"]}
    assert {name: (s["n"], s["metric"]) for name, s in by_name.items()} == {
        "words": (6, "acc_norm"),
        "letters": (6, "acc_norm"),
        "asked": (5, "contains"),
    }
    assert set(by_name["words"]["accuracies"]) == {"acc", "acc_norm"}
    assert by_name["words"]["accuracies"]["acc_norm"]["before"] == by_name["words"]["before"]
    assert by_name["asked"]["accuracies"] is None
    overall = forgetting["overall"]
    assert (overall["n"], overall["metric"]) == (17, "acc_norm and contains")
    assert overall["drop"] == pytest.approx(sum(s["drop"] * s["n"] for s in by_name.values()) / 17)
    assert forgetting["kl_to_base"] > 0
    assert forgetting["kl_to_base_on_task"] > 0
    settings = forgetting["settings"]
    assert (settings["bos"], settings["few_shot"], settings["delimiter"]) == ("none", 0, "")
    assert len(settings["items_sha256"]) == len(settings["chat_template_sha256"]) == 64
    assert "transformers" in settings["versions"]


def test_every_item_has_its_line(probed: tuple[dict[str, Any], Path]) -> None:
    report, path = probed
    lines = folder.read_json_lines(path / "probe.jsonl")
    assert [line["row_id"] for line in lines] == [f"row {i}" for i in range(17)]
    assert lines[0]["kind"] == "choice"
    assert lines[0]["choices"] == CHOICES[0]["choices"]
    assert lines[0]["before"] in lines[0]["choices"]
    assert len(lines[0]["log_likelihoods"]["after"]) == 3
    assert lines[0]["log_likelihoods"]["before"] != lines[0]["log_likelihoods"]["after"]
    for suite in report["forgetting"]["suites"]:
        own = [line["scores"] for line in lines if line["suite"] == suite["name"]]
        assert sum(s["before"] - s["after"] for s in own) / len(own) == pytest.approx(suite["drop"])
    assert "probe.jsonl" in json.loads((path / "manifest.json").read_text())["files"]


def test_a_gate_that_is_finer_than_the_probe_is_told(probed: tuple[dict[str, Any], Path]) -> None:
    (told,) = probed[0]["forgetting"]["notes"]
    assert told.startswith("gates.max_forgetting is 0.05, and these suites find a drop")
    assert "words (1.000 with 6 items)" in told
    suites = [{"name": "s", "n": 900, "minimum_detectable": 0.02}]
    assert probe.undetectable(suites, 0.02) == probe.undetectable(suites, None) == []


def test_evaluating_again_writes_the_lines_again(probed: tuple[dict[str, Any], Path]) -> None:
    from ftune.run.afterwards import evaluate_target
    from ftune.run.targets import resolve

    lines = (probed[1] / "probe.jsonl").read_bytes()
    (probed[1] / "probe.jsonl").unlink()
    again = evaluate_target(resolve(probed[1]))
    assert again["forgetting"] == probed[0]["forgetting"]
    assert (probed[1] / "probe.jsonl").read_bytes() == lines


def test_without_a_probe_there_are_no_lines(workspace: Path) -> None:
    assert not (run(workspace)[1] / "probe.jsonl").exists()


# The general probe


@pytest.fixture
def general(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few rows in the place of the suites that come with ftune."""
    (tmp_path / "package" / loading.GENERAL).mkdir(parents=True)
    monkeypatch.setattr(loading.resources, "files", lambda name: tmp_path / "package")
    return tmp_path / "package" / loading.GENERAL


def test_the_general_probe_is_read_from_the_package(workspace: Path, general: Path) -> None:
    write_rows(general / "b.jsonl", CHOICES[:4])
    write_rows(general / "a.jsonl", [{"suite": "first", "prompt": "p", "completion": "c"}, {"text": "words"}])
    inputs = require(recipe.load(write_recipe(workspace, evaluation={"probe": "general"})))
    assert inputs.probe is not None
    assert [item.item.suite for item in inputs.probe.items] == ["first", "words", "letters", "words", "letters"]
    assert len(inputs.probe.texts) == 1


def test_items_of_the_general_probe_that_do_not_fit_are_left_out_and_told(workspace: Path, general: Path) -> None:
    write_rows(general / "a.jsonl", [*CHOICES[:4], {"suite": "words", "prompt": "p" * 600, "completion": "c"}])
    inputs = require(recipe.load(write_recipe(workspace, evaluation={"probe": "general"})))
    assert inputs.probe is not None
    assert len(inputs.probe.items) == 4
    told = "the general probe: 1 items are longer than the model's context and are left out"
    assert told in inputs.account()["notes"]


def test_an_installation_without_the_general_probe_says_so(workspace: Path, general: Path) -> None:
    with pytest.raises(UserError, match="the general probe is not part of this installation"):
        require(recipe.load(write_recipe(workspace, evaluation={"probe": "general"})))


@pytest.mark.parametrize("choices", [False, True])
def test_training_rows_that_hold_the_probe_are_found(workspace: Path, choices: bool) -> None:
    asked = {"prompt": "say ddd", "choices": ["d", "e"], "answer": 0} if choices else chat("say ddd", "d")
    write_rows(workspace / "probe.jsonl", [asked])
    sections = {"data": {"decontaminate": True}, "evaluation": {"probe": "probe.jsonl"}}
    inputs = require(recipe.load(write_recipe(workspace, **sections)))
    assert inputs.account()["contaminated"] > 0
