"""lm-eval is the judge of choices, and its tasks are suites of the probe."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import (
    CHATML,
    MINIMAL,
    chat,
    make_model,
    make_tokenizer,
    run,
    save_base,
    the_problem,
    write_recipe,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftune import probe, recipe
from ftune.errors import UserError
from ftune.probe import harness
from ftune.probe.choices import weigh
from ftune.recipe import TrainingSection
from ftune.run.inputs import require
from ftune.train import TrainingPlan

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROWS = [
    {"prompt": f"Which letter comes after {chr(97 + i)}?", "choices": [chr(98 + i), "none at all", "z z"], "answer": 0}
    for i in range(20)
]
PLAN = TrainingPlan(TrainingSection(learning_rate=1.0), 1, True, "auto", 0)


def write_task(folder: Path, rows: list[dict[str, Any]], name: str = "letters", **changes: Any) -> Path:
    """A local task of lm-eval over rows as a probe file has them."""
    write_rows(folder / f"{name}.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 3.0},
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def judged(model: Any, tokenizer: Any, task: Path) -> tuple[list[list[float]], dict[str, Any]]:
    """lm-eval's own log-likelihood of every choice, and its own scores, asked in its own way."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[str(task)],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=bool(tokenizer.chat_template),
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][task.stem], key=lambda sample: sample["doc_id"])
    return [[answer[0] for answer in s["filtered_resps"]] for s in samples], results["results"][task.stem]


def agreement(model: Any, tokenizer: Any, rows: list[dict[str, Any]], folder: Path) -> float:
    """The largest difference of a choice's log-likelihood from lm-eval's; asserts that the accuracies are the same."""
    limits = (100_000, model.config.vocab_size)
    items = probe.load(tokenizer, write_rows(folder / "probe.jsonl", rows), *limits).items
    ours = weigh(model, items, PLAN)
    theirs, scores = judged(model, tokenizer, write_task(folder, rows))
    marked = [probe.chosen(item, one) for item, one in zip(items, ours, strict=True)]
    for kind in ("acc", "acc_norm"):
        assert probe.mean_of(marked, kind) == pytest.approx(scores[f"{kind},none"], abs=1e-12)
    return max(
        abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one.sums, other, strict=True)
    )


TOKENIZERS = {
    "plain": make_tokenizer(None),
    "plain with bos": make_tokenizer(None, add_bos=True),
    "chatml": make_tokenizer(CHATML),
    "chatml with a tokenizer's bos": make_tokenizer(CHATML, add_bos=True),
    "a template's bos": make_tokenizer("<bos>" + CHATML, add_bos=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_likelihoods_are_those_of_lm_eval(tmp_path: Path, name: str, kind: str) -> None:
    """Case 102: the same prompt, beginning of sequence and white space, with and without a template."""
    assert agreement(make_model(kind, scale=3.0), TOKENIZERS[name], ROWS, tmp_path) <= 1e-4


@pytest.fixture(scope="module")
def stories(real_data: Path) -> tuple[Any, Any]:
    folder = real_data / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def real_rows(real_data: Path, name: str) -> list[dict[str, Any]]:
    file = next((real_data / "data" / name).glob("*.jsonl"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:60]]
    if name == "arc_easy":
        return [{"prompt": r["query"] + "\nAnswer:", "choices": r["choices"], "answer": r["gold"]} for r in rows]
    return [{"prompt": r["ctx"], "choices": r["endings"], "answer": r["label"]} for r in rows]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{m.content}}\n{% endfor %}> "])
@pytest.mark.parametrize("name", ["arc_easy", "hellaswag"])
def test_real_tasks_agree_with_lm_eval(
    stories: tuple[Any, Any], real_data: Path, tmp_path: Path, name: str, template: str | None
) -> None:
    model, tokenizer = stories
    tokenizer.chat_template = template
    try:
        assert agreement(model, tokenizer, real_rows(real_data, name), tmp_path) <= 1e-4
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize("template", [None, CHATML])
def test_our_way_through_lm_eval_is_lm_evals(tmp_path: Path, template: str | None) -> None:
    """Case 102, the other way round: the same scores and the same hash of what was asked as lm-eval alone."""
    from lm_eval.utils import hash_string

    model, tokenizer, task = make_model(scale=3.0), make_tokenizer(template), write_task(tmp_path, ROWS)
    answers = harness.load([task]).ask(model, tokenizer, "x")
    theirs, scores = judged(model, tokenizer, task)
    assert [one.log_likelihoods for one in answers.marked] == [pytest.approx(sums, abs=1e-4) for sums in theirs]
    for kind in ("acc", "acc_norm"):
        assert probe.mean_of(answers.marked, kind) == scores[f"{kind},none"]
    assert {one.item.metric for one in answers.marked} == {"acc_norm"}
    facts = answers.tasks["letters"]
    assert (facts["few_shot"], facts["version"]) == (0, 3.0)
    assert len(facts["hash"]) == len(hash_string(""))


def test_what_is_asked_shapes_the_hash(tmp_path: Path) -> None:
    model, tasks = make_model(), [write_task(tmp_path, ROWS), write_task(tmp_path, ROWS[1:], "fewer")]
    plain, templated = (harness.load(tasks).ask(model, make_tokenizer(t), "x").tasks for t in (None, CHATML))
    assert len({plain["letters"]["hash"], plain["fewer"]["hash"], templated["letters"]["hash"]}) == 3


def test_shots_are_those_of_the_task(tmp_path: Path) -> None:
    task = write_task(tmp_path, ROWS, num_fewshot=2, fewshot_split="test")
    loaded = harness.load([task])
    first, second = (loaded.ask(make_model(), make_tokenizer(), "x") for _ in range(2))
    assert first == second, "the same shots each time"
    assert first.tasks["letters"]["few_shot"] == 2
    assert first.marked[0].item.prompt.count("Which letter") == 3


def test_asking_leaves_model_and_tokenizer_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model("llama tied"), make_tokenizer(None)
    tokenizer.pad_token = None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = []
    monkeypatch.setattr(type(model), "tie_weights", lambda *_, **__: tied.append(1))
    harness.load([write_task(tmp_path, ROWS[:2])]).ask(model, tokenizer, "x")
    assert tokenizer.pad_token is None
    assert not tied, "weights of an adapter on the embeddings would be tied to the base's"
    assert "tie_weights" not in vars(model)
    assert all(bool((tensor == weights[name]).all()) for name, tensor in model.state_dict().items())


def test_answers_that_are_generated_are_scored_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {c}", "completion": c} for c in "abc"]
    task = write_task(
        tmp_path,
        rows,
        output_type="generate_until",
        doc_to_target="{{completion}}",
        doc_to_choice=None,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    answers = harness.load([task]).ask(make_model(), make_tokenizer(), "x")
    assert [(one.item.kind, one.item.metric, one.item.expected) for one in answers.marked] == [
        ("answer", "exact_match", c) for c in "abc"
    ]
    assert all(one.text for one in answers.marked)


def test_a_run_is_measured_on_a_local_task(tmp_path: Path) -> None:
    """End to end, and case 106: an adapter of zero steps would move nothing, one of some steps does."""
    save_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", [chat(f"say {c}", c * 4) for c in "abcdefgh"])
    write_task(tmp_path, ROWS)
    report, path = run(
        tmp_path,
        evaluation={"probe": {"harness": ["letters.yaml"]}},
        gates={"max_forgetting": 1.0},
        training={"max_steps": 8, "learning_rate": 0.05},
    )
    (suite,) = report["forgetting"]["suites"]
    assert (suite["name"], suite["n"], suite["metric"]) == ("letters", 20, "acc_norm")
    assert set(suite["accuracies"]) == {"acc", "acc_norm"}
    assert report["forgetting"]["kl_to_base"] is None
    settings = report["forgetting"]["settings"]
    assert settings["tasks"]["letters"]["few_shot"] == 0
    assert settings["versions"]["lm_eval"]
    lines = [json.loads(line) for line in (path / "probe.jsonl").read_text().splitlines()]
    assert [line["row_id"] for line in lines] == [f"letters:{i}" for i in range(20)]
    assert any(line["log_likelihoods"]["before"] != line["log_likelihoods"]["after"] for line in lines)


def test_training_rows_that_hold_a_task_are_found(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    write_task(tmp_path, ROWS)
    write_rows(tmp_path / "train.jsonl", [chat("say x", "x"), chat(ROWS[3]["prompt"], ROWS[3]["choices"][0])])
    sections = {"data": {"decontaminate": True}, "evaluation": {"probe": {"harness": ["letters.yaml"]}}}
    inputs = require(recipe.load(write_recipe(tmp_path, **sections)))
    assert inputs.account()["contaminated"] == 1


# What cannot be asked


def told_by(names: list[Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        harness.load(names)
    return [problem.what for problem in caught.value.problems]


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'ftune\[harness\]'"):
        harness.load([tmp_path / "letters.yaml"])


def test_every_task_that_cannot_be_asked_is_told(tmp_path: Path) -> None:
    good = write_task(tmp_path, ROWS[:2])
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: none.jsonl}\n"
    )
    rolling = write_task(
        tmp_path,
        [{"text": "a"}],
        "rolling",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        doc_to_choice=None,
        metric_list=[{"metric": "word_perplexity"}],
    )
    pooled = write_task(tmp_path, ROWS[:2], "pooled", metric_list=[{"metric": "mcc"}])
    told = told_by([good, tmp_path / "gone.yaml", tmp_path / "broken.yaml", rolling, pooled, good])
    assert told[0] == "no such task file"
    assert told[1].startswith("lm-eval cannot load ")
    assert "broken.yaml" in told[1]
    assert told[2] == "the task 'letters' stands twice"
    assert told[3:] == [
        "rolling has no items that can be right or wrong",
        "pooled has no score of single items, only mcc",
    ]


def test_a_name_that_lm_eval_does_not_know_is_an_error_of_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its whole index takes seconds to read; here it holds one local task."""
    from lm_eval import tasks

    write_task(tmp_path, ROWS[:2])
    real = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: real(include_path=tmp_path, include_defaults=False))
    save_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", [chat("say x", "x")])
    settings = write_recipe(tmp_path, evaluation={"probe": {"harness": ["leters"]}})
    with pytest.raises(UserError) as caught:
        require(recipe.load(settings))
    (problem,) = caught.value.problems
    assert problem.what == "lm-eval knows no task 'leters'; did you mean 'letters'?"
    inputs = require(recipe.load(write_recipe(tmp_path, evaluation={"probe": {"harness": ["letters"]}})))
    assert inputs.probe is not None
    assert len(inputs.probe.held_out) == 2


def test_a_file_of_a_task_is_relative_to_the_recipe(tmp_path: Path, write: Any) -> None:
    text = MINIMAL + "evaluation: {probe: {harness: [sub/t.yaml, arc_easy]}}\n"
    loaded = recipe.load(write(text))
    assert loaded.evaluation.probe.harness == (tmp_path / "sub" / "t.yaml", "arc_easy")
    dumped = recipe.load(write(recipe.dump(loaded), "again.yaml"))
    assert dumped.evaluation == loaded.evaluation
    assert "harness: []" in the_problem(write(text.replace("sub/t.yaml, arc_easy", ""))).what
