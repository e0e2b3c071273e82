"""Tasks of lm-eval as suites of the probe: read before training, asked of both models by lm-eval's own code."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import chat
from ftune.console.streams import note
from ftune.data import Example
from ftune.errors import Problem, RunError, UserError
from ftune.probe.items import Answers, Item, Marked

WHERE = "evaluation.probe"
METRICS = ("acc_norm", "acc", "exact_match")
"""What an item's score is taken from; the first of these that a task has, else the first number that should grow."""
OF_ONE_ITEM = {*METRICS, "acc_bytes", "acc_mutual_info"}
"""Metrics of choices that say for each item whether it is right; others are of all of them together."""
FEW_SHOT_SEED = 1234
"""lm-eval's own."""
BATCH_SIZE = 4
"""lm-eval holds the logits of all its tokens at once: of 4 texts of 1,000 tokens and 150,000 words they are 2.4 GB."""


@dataclass(frozen=True)
class Harness:
    """Tasks by the name that the recipe gives; a group's are asked as one suite."""

    suites: Mapping[str, Sequence[Any]]
    version: str

    @cached_property
    def documents(self) -> list[Example]:
        """What the tasks ask and what is right, where both are texts: training rows must not hold it."""
        return [
            Example(f"{task.task_name}:{number}", "", chat.Tokens([], []), {"prompt": asked, "completion": told})
            for tasks in self.suites.values()
            for task in tasks
            for number, doc in enumerate(task.eval_docs)
            for asked, told in [_texts(task, doc)]
            if asked and told
        ]

    def ask(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, who: str) -> Answers:
        """Every document of every task, through the chat template where there is one."""
        from lm_eval import evaluate

        tasks = {task.task_name: task for tasks in self.suites.values() for task in tasks}
        for task in tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        note(f"asking {', '.join(self.suites)} through lm-eval, {who}")
        with _quiet():
            results = evaluate(
                lm=_wrapped(model, tokenizer),
                task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=bool(tokenizer.chat_template),
                fewshot_as_multiturn=bool(tokenizer.chat_template),
            )
        marked = [
            one
            for suite, members in self.suites.items()
            for task in members
            for one in _marked(suite, task, results["samples"][task.task_name])
        ]
        return Answers(marked, None, {name: _facts(task, results) for name, task in tasks.items()})


def load(names: Sequence[str | Path]) -> Harness:
    """The tasks with these names, or in these YAML files, with their data. Raises UserError with every problem."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        hint = "install it with: pip install 'ftune[harness]'"
        raise UserError("tasks of lm-eval need lm-eval, which is not installed", WHERE, hint) from error
    is_named = any(isinstance(name, str) for name in names)
    if is_named:
        note("reading lm-eval's index of tasks")
    problems: list[Problem] = []
    suites: dict[str, list[Any]] = {}
    with _quiet():
        manager = TaskManager(include_defaults=is_named)
        for name in names:
            suite = name if isinstance(name, str) else name.stem
            if told := _unknown(name, manager):
                problems.append(told)
            elif suite in suites:
                problems.append(Problem(f"the task {suite!r} stands twice", WHERE))
            else:
                try:
                    suites[suite] = list(manager.load([str(name)])["tasks"].values())
                except Exception as error:  # of lm-eval, of its tasks' code, or of where their data comes from
                    what = f"lm-eval cannot load {str(name)!r}: {type(error).__name__}: {error}"
                    problems.append(Problem(what, WHERE, "check the task and the data it names"))
    every = [task for tasks in suites.values() for task in tasks]
    problems += [told for task in every if (told := _impossible(task))]
    names_of_tasks = [task.task_name for task in every]
    twice = {name for name in names_of_tasks if names_of_tasks.count(name) > 1}
    problems += [Problem(f"the task {name!r} is asked for twice", WHERE) for name in sorted(twice)]
    if problems:
        raise UserError.collect(problems)
    return Harness(suites, lm_eval.__version__)


def _unknown(name: str | Path, manager: Any) -> Problem | None:
    if isinstance(name, Path):
        return None if name.is_file() else Problem("no such task file", str(name), "check the path")
    if name in manager.task_index:
        return None
    near = get_close_matches(name, manager.all_tasks, 1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    hint = "lm-eval ls tasks lists them; a file of your own ends in .yaml"
    return Problem(f"lm-eval knows no task {name!r}{guess}", WHERE, hint)


def _impossible(task: Any) -> Problem | None:
    """Why a task cannot be a suite of the probe."""
    if getattr(task, "UNSAFE_CODE", False):
        return Problem(f"{task.task_name} runs programs that the model writes", WHERE, "take it out")
    if getattr(task, "MULTIMODAL", False):
        return Problem(f"{task.task_name} asks about pictures or sounds", WHERE, "take it out")
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        hint = "take it out; rows of text in a probe file measure the loss"
        return Problem(f"{task.task_name} has no items that can be right or wrong", WHERE, hint)
    names = set(getattr(task, "_metric_fn_list", ()))
    if task.OUTPUT_TYPE == "multiple_choice" and not task.config.process_results and not names & OF_ONE_ITEM:
        what = f"{task.task_name} has no score of single items, only {', '.join(sorted(names))}"
        return Problem(what, WHERE, "take it out")
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, lm-eval's advice to people who call it is not printed; its progress bars are."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _wrapped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model as lm-eval sees it. Probabilities are computed in float32, whatever the model is held in.

    lm-eval ties weights anew and gives the tokenizer a padding token; what is measured stays as it is.
    """
    from lm_eval.models.huggingface import HFLM

    vars(model)["tie_weights"] = lambda *args, **kwargs: None
    try:
        return HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH_SIZE, softmax_dtype=torch.float32
        )
    finally:
        del vars(model)["tie_weights"]


def _marked(suite: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> list[Marked]:
    """The scores of one task's documents, by the first of its filters."""
    first = samples[0]["filter"]
    kept = sorted((sample for sample in samples if sample["filter"] == first), key=lambda sample: sample["doc_id"])
    metric = _metric(task, kept[0])
    return [_mark(suite, task, sample, metric) for sample in kept]


def _metric(task: Any, sample: Mapping[str, Any]) -> str:
    grows = task.higher_is_better()
    usable = [name for name in sample["metrics"] if isinstance(sample[name], int | float) and grows.get(name, True)]
    for name in (*METRICS, *usable):
        if name in usable:
            return str(name)
    names = ", ".join(sample["metrics"])
    raise RunError(f"{task.task_name} has no score of single items, only {names}", WHERE, "take it out")


def _mark(suite: str, task: Any, sample: Mapping[str, Any], metric: str) -> Marked:
    row_id = f"{task.task_name}:{sample['doc_id']}"
    prompt, score = str(sample["arguments"][0][0]), float(sample[metric])
    if task.OUTPUT_TYPE != "multiple_choice":
        item = Item(suite, row_id, "answer", metric, prompt, str(sample["target"]))
        answer = sample["filtered_resps"][0]
        return Marked(item, score, answer if isinstance(answer, str) else f"log-likelihood {answer[0]:.4f}")
    choices = tuple(str(choice) for choice in task.doc_to_choice(sample["doc"]))
    sums = tuple(float(answer[0]) for answer in sample["filtered_resps"][: len(choices)])
    lengths = [max(len(choice), 1) if metric == "acc_norm" else 1 for choice in choices]
    target = sample["target"]
    expected = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else str(target)
    item = Item(suite, row_id, "choice", metric, prompt, expected, choices)
    accuracies = {kind: float(sample[kind]) for kind in ("acc", "acc_norm") if kind in sample["metrics"]}
    return Marked(item, score, choices[int(np.argmax(np.array(sums) / lengths))], accuracies, sums)


def _facts(task: Any, results: Mapping[str, Any]) -> dict[str, Any]:
    """How lm-eval asked a task. The hash is the one of its own result files, of documents, prompts and targets."""
    from lm_eval.utils import hash_string

    name = task.task_name
    parts = [s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in results["samples"][name]]
    return {
        "hash": str(hash_string("".join(parts))),
        "version": results["versions"].get(name),
        "few_shot": results["n-shot"].get(name),
    }


def _texts(task: Any, doc: Mapping[str, Any]) -> tuple[str, str]:
    """A document's question and its right answer; empty where lm-eval puts them together in another way."""
    asked, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(doc)
        target = choices[target] if 0 <= target < len(choices) else ""
    if isinstance(target, list):
        target = target[0] if target else ""
    return (asked, target) if isinstance(asked, str) and isinstance(target, str) else ("", "")
