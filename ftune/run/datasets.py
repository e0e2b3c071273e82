"""The rows that a recipe names: read, checked, cleaned and told apart, before anything is loaded or written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ftune import chat, classifier, data, probe
from ftune.classifier import Classes
from ftune.clean import Twin
from ftune.data import Dataset, Source, findings
from ftune.data.hub import hub_files
from ftune.errors import Problem, UserError
from ftune.evaluate import TOKEN_METRICS, has_answer
from ftune.model import ModelFacts
from ftune.probe import Probe, harness
from ftune.recipe import DataFile, DataSection, HarnessProbe, Recipe
from ftune.run.cleaning import clean_rows, items_of

NO_LIMIT = 1_000_000
"""Tokens of a row, for models that do not say how many they read."""


class Collector:
    """Runs stages that raise UserError, and keeps the problems of all of them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    @contextmanager
    def stage(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.problems += [problem for problem in error.problems if problem not in self.problems]


@dataclass(frozen=True)
class Sets:
    """What was read; None where the recipe names nothing, or where it could not be read."""

    train: Dataset | None
    validation: Dataset | None
    test: Dataset | None
    probe: Probe | None
    classes: Classes | None
    """What a classifier is to tell apart; None where a language model is trained."""
    twins: list[Twin]
    """Training rows that repeat others or what is measured, with these."""
    notes: dict[str, int]
    """What a user would want to know of how rows are read, and how many rows it happened to; 0 for all."""


def is_classification(recipe: Recipe) -> bool:
    return recipe.objective.name == "classification"


def rules_of(recipe: Recipe, max_positions: int | None) -> data.Rules:
    """The recipe's rules for rows; no row, with virtual tokens in front, may be longer than the model's context."""
    section = recipe.data
    in_front = getattr(recipe.method, "virtual_tokens", 0)
    limit = min(section.max_length, (max_positions or section.max_length + in_front) - in_front)
    shape = data.LABELLED if is_classification(recipe) else section.format
    return data.Rules(shape, section.columns, limit, section.too_long, section.on_bad_row)


def sources_of(section: DataSection) -> list[Source]:
    """The files of the training rows; a hub dataset is all those of its split."""
    sources: list[Source] = []
    for entry in section.train_rows:
        if isinstance(entry, DataFile):
            sources.append(Source(entry.path, entry.weight))
        else:
            found = hub_files(str(entry.hub), entry.split, entry.revision)
            sources += [Source(path, entry.weight, found.commit) for path in found.paths]
    return sources


def read_sets(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts, collector: Collector) -> Sets:
    """All rows of a recipe, cleaned; what is wrong with them is the collector's."""
    section, is_labelled = recipe.data, is_classification(recipe)
    if is_labelled:
        with collector.stage():
            classifier.choose_pad(tokenizer)
    rules = rules_of(recipe, facts.max_positions)

    def load(path: object) -> Dataset | None:
        with collector.stage():
            return data.load(tokenizer, [Source(path)], rules, facts.vocab_size) if isinstance(path, Path) else None
        return None

    train = classes = items = None
    with collector.stage():
        train = data.load(tokenizer, sources_of(section), rules, facts.vocab_size)
    validation, test = load(section.validation), load(section.test)
    with collector.stage():
        if not is_labelled:
            items = read_probe(recipe, tokenizer, facts)
    twins: list[Twin] = []
    if train is not None:
        with collector.stage():
            measured = [example for part in (validation, test) if part for example in part.examples]
            wanted = list(items_of([*measured, *(items.held_out if items else ())]))
            cleaned = clean_rows(train, section, wanted, recipe.training.seed)
            train, validation, twins = cleaned.train, cleaned.validation or validation, cleaned.twins
    if is_labelled and train is not None:
        with collector.stage():
            classes = Classes(data.sorted_labels(train.examples), tokenizer.pad_token_id)
        if classes is not None:
            train, validation, test = number(collector, classes, train, validation, test)
    with collector.stage():
        if not is_labelled or test is None:
            check_scorable(recipe, test)
    notes: dict[str, int] = {}
    if train is not None:
        collector.problems += findings.blocking(train.audit)
        notes = {**train.notes, **template_notes(tokenizer, train, collector)}
    notes |= dict.fromkeys(items.notes if items else (), 0)
    for name, part in (("data.validation", validation), ("data.test", test)):
        if part is not None and (gone := part.audit.dropped):
            notes[f"{name}: dropped {', '.join(f'{reason} {count}' for reason, count in gone.items())}"] = gone.total()
    return Sets(train, validation, test, items, classes, twins, notes)


def read_probe(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts) -> Probe | None:
    """What forgetting is measured on. Its rows need room in the model's context alone, not in data.max_length."""
    asked = recipe.evaluation.probe
    if asked == "off":
        return None
    if isinstance(asked, HarnessProbe):
        return Probe((), tasks=harness.load(asked.harness))
    in_front = getattr(recipe.method, "virtual_tokens", 0)
    room = (facts.max_positions or NO_LIMIT) - in_front
    if isinstance(asked, Path):
        return probe.load(tokenizer, asked, room, facts.vocab_size)
    return probe.load_general(tokenizer, room, facts.vocab_size)


def template_notes(tokenizer: PreTrainedTokenizerBase, train: Dataset, collector: Collector) -> dict[str, int]:
    """What a careful reader wants to know of the chat template, where rows are rendered with one; problems are told."""
    fields = next(train.examples.fields(), {})
    if not tokenizer.chat_template or not ("messages" in fields or "prompt" in fields):
        return {}
    found = chat.check_template(tokenizer)
    collector.problems += [problem for problem in found.problems if problem not in collector.problems]
    return {f"chat template: {text}": 0 for text in found.notes}


def read_classes(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts) -> Classes:
    """What a classifier is to tell apart, from its training rows alone."""
    classifier.choose_pad(tokenizer)
    rows = data.load(tokenizer, sources_of(recipe.data), rules_of(recipe, facts.max_positions))
    return Classes(data.sorted_labels(rows.examples), tokenizer.pad_token_id)


def number(collector: Collector, classes: Classes, *sets: Dataset | None) -> list[Dataset | None]:
    """The training, validation and test rows with the class ids of their labels."""
    numbered: list[Dataset | None] = []
    for dataset, where in zip(sets, ("data.train", "data.validation", "data.test"), strict=True):
        with collector.stage():
            dataset = None if dataset is None else data.with_class_ids(dataset, classes.labels, where)
        numbered.append(dataset)
    return numbered


def check_scorable(recipe: Recipe, test: Dataset | None) -> None:
    """A gate needs what it measures, and a metric of answers needs rows that have them."""
    if test is None:
        if wanted := [name for name in ("min_score", "min_gain") if getattr(recipe.gates, name) is not None]:
            raise UserError("there is no test set to measure it on", f"gates.{wanted[0]}", "name one with data.test")
    elif recipe.evaluation.metric not in TOKEN_METRICS and not all(map(has_answer, test.examples)):
        raise UserError(
            "test rows of plain text have no answer to score", "evaluation.metric", "use metric: loss or perplexity"
        )
    if recipe.gates.max_forgetting is not None and recipe.evaluation.probe == "off":
        raise UserError("there is no probe to measure it on", "gates.max_forgetting", "name one with evaluation.probe")
