"""Everything a recipe names, read and checked before anything is loaded or written; every problem at once."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ftune import classifier, comparing, data, folder, model, plan, probe, quantized, schedule
from ftune.artifacts import files, proof
from ftune.classifier import Classes
from ftune.data import Dataset
from ftune.errors import Problem, UserError
from ftune.evaluate import has_answer
from ftune.methods import METHODS
from ftune.methods.head import method_of
from ftune.plan import Prediction
from ftune.predict import LABEL_METRICS
from ftune.probe import Probe
from ftune.recipe import Recipe
from ftune.run.start import start_from
from ftune.settings import METHOD_NAMES, learning_rate_for
from ftune.train import TrainingPlan, resolve_optimizer


@dataclass(frozen=True)
class Inputs:
    """The tokenizer, the checked data, and the plans they give."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    probe: Probe | None
    plan: TrainingPlan
    prediction: Prediction
    classes: Classes | None = None
    """What a classifier is to tell apart; None where a language model is trained."""

    def account(self) -> dict[str, Any]:
        """The `data` part of report.json."""
        return self.train.account.as_dict()


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what depends on the model; a model that cannot be read is told later, with all other problems."""
    if recipe.training.learning_rate is not None:
        return recipe
    try:
        rate = learning_rate_for(recipe.method, model.facts(recipe.model).width)
    except UserError:
        return recipe
    training = recipe.training.model_copy(update={"learning_rate": rate})
    return recipe.model_copy(update={"training": training})


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


def rules_of(recipe: Recipe, max_positions: int | None) -> data.Rules:
    """The recipe's rules for rows; no row, with virtual tokens in front, may be longer than the model's context."""
    section = recipe.data
    in_front = getattr(recipe.method, "virtual_tokens", 0)
    limit = min(section.max_length, (max_positions or section.max_length + in_front) - in_front)
    shape = data.LABELLED if is_classification(recipe) else section.format
    return data.Rules(shape, section.columns, limit, section.too_long, section.on_bad_row)


def is_classification(recipe: Recipe) -> bool:
    return recipe.objective.name == "classification"


def check_objective(recipe: Recipe) -> None:
    """Keys of other sections that an objective cannot follow."""
    problems = []
    shape, metric = recipe.data.format, recipe.evaluation.metric
    if is_classification(recipe):
        if shape not in ("auto", data.LABELLED):
            what = f"{shape} rows have no label to classify"
            problems.append(Problem(what, "data.format", "give rows of text and label, format: labelled"))
        if metric not in LABEL_METRICS:
            problems.append(Problem(f"{metric} does not score labels", "evaluation.metric", "use accuracy or f1"))
        if recipe.evaluation.probe != "off":
            what = "a classifier has no language head, so nothing can be asked of it"
            problems.append(Problem(what, "evaluation.probe", "leave it off"))
        if recipe.gates.max_forgetting is not None:
            problems.append(Problem("forgetting is not measured of a classifier", "gates.max_forgetting", "drop it"))
    else:
        if shape == data.LABELLED:
            hint = "set objective: classification, or format: text"
            problems.append(Problem("labelled rows are for classification", "data.format", hint))
        if metric in LABEL_METRICS:
            hint = "use exact_match, or set objective: classification"
            problems.append(Problem(f"{metric} scores labels, not answers", "evaluation.metric", hint))
    if problems:
        raise UserError.collect(problems)


def training_plan(recipe: Recipe, num_examples: int | None) -> TrainingPlan:
    training = recipe.training
    count = training.batch_size if num_examples is None else num_examples
    total = schedule.total_steps(count, training.batch_size, training.epochs, training.max_steps)
    return TrainingPlan(training, total, recipe.data.packing, recipe.model.attention, training.seed)


def read(recipe: Recipe, collector: Collector) -> Inputs | None:
    """All inputs of a recipe, or None when the collector found problems."""
    tokenizer = facts = train = prediction = classes = None
    check_possible(recipe, collector)
    with collector.stage():
        check_objective(recipe)
    with collector.stage():
        facts = model.facts(recipe.model)
    with collector.stage():
        tokenizer = model.load_tokenizer(recipe.model)
    if tokenizer is None or facts is None:
        return None
    if is_classification(recipe):
        with collector.stage():
            classifier.choose_pad(tokenizer)
    rules = rules_of(recipe, facts.max_positions)

    def read_set(paths: Sequence[Path]) -> Dataset | None:
        with collector.stage():
            return data.load(tokenizer, paths, rules, facts.vocab_size)
        return None

    train = read_set(recipe.data.train_paths)
    validation = read_set([recipe.data.validation]) if recipe.data.validation else None
    test = read_set([recipe.data.test]) if recipe.data.test else None
    if is_classification(recipe) and train is not None:
        with collector.stage():
            classes = Classes(data.sorted_labels(train.examples), tokenizer.pad_token_id)
        if classes is not None:
            train, validation, test = number(collector, classes, train, validation, test)
    items = None
    with collector.stage():
        if not is_classification(recipe) and isinstance(recipe.evaluation.probe, Path):
            items = probe.load(tokenizer, recipe.evaluation.probe, rules.max_length, facts.vocab_size)
    with collector.stage():
        if not is_classification(recipe) or test is None:
            check_scorable(recipe, test)
        check_overlap(items, train)
    run_plan = training_plan(recipe, len(train) if train else None)
    with collector.stage():
        supervised = train.account.supervised_tokens if train else None
        counts = (supervised, len(train) if train else None)
        prediction = plan.make_plan(recipe, recipe.method, run_plan, *counts, classes)
    if collector.problems or train is None or prediction is None:
        return None
    return Inputs(tokenizer, train, validation, test, items, run_plan, prediction, classes)


def number(collector: Collector, classes: Classes, *sets: Dataset | None) -> list[Dataset | None]:
    """The training, validation and test rows with the class ids of their labels."""
    numbered: list[Dataset | None] = []
    for dataset, where in zip(sets, ("data.train", "data.validation", "data.test"), strict=True):
        with collector.stage():
            dataset = None if dataset is None else data.with_class_ids(dataset, classes.labels, where)
        numbered.append(dataset)
    return numbered


def check_possible(recipe: Recipe, collector: Collector) -> None:
    """What this machine, this method and this base cannot do together."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with collector.stage():
        resolve_optimizer(recipe.training.optimizer, device)
    with collector.stage():
        check_abilities(recipe)
    with collector.stage():
        quantized.check_stored(recipe.model, model.load_config(recipe.model))
        if recipe.output.save != "adapter" and recipe.model.quantization != "none":
            proof.check_mergeable(recipe.model)


def require(recipe: Recipe) -> Inputs:
    """All inputs of a recipe; raises UserError with everything that is wrong."""
    collector = Collector()
    inputs = read(recipe, collector)
    if inputs is None:
        raise UserError.collect(collector.problems)
    return inputs


def check_abilities(recipe: Recipe) -> None:
    """What the method cannot be put together with, told by name before anything is loaded."""
    name, abilities = recipe.method.name, METHOD_NAMES[recipe.method.name].abilities
    problems = []
    if recipe.output.save != "adapter" and not abilities.merging:
        what = f"an adapter of {name} cannot be merged: {abilities.obstacle_to_merging}"
        problems.append(Problem(what, f"output.save: {recipe.output.save}", "set output.save: adapter"))
    if recipe.model.quantization != "none" and not abilities.quantized:
        what = f"{name} trains the base's own weights, which a quantized base cannot hold"
        hint = "use quantization: none, or a method that leaves the base as it is, such as qlora"
        problems.append(Problem(what, f"model.quantization: {recipe.model.quantization}", hint))
    if recipe.training.gradient_checkpointing is True and not (abilities.checkpointing or recipe.data.packing):
        what = f"{name} without packing loses its prefix when activations are computed again"
        problems.append(Problem(what, "training.gradient_checkpointing", "set data.packing: true, or this to false"))
    if problems:
        raise UserError.collect(problems)


def check_scorable(recipe: Recipe, test: Dataset | None) -> None:
    """A gate needs what it measures, and a metric of answers needs rows that have them."""
    if test is None:
        if wanted := [name for name in ("min_score", "min_gain") if getattr(recipe.gates, name) is not None]:
            raise UserError("there is no test set to measure it on", f"gates.{wanted[0]}", "name one with data.test")
    elif recipe.evaluation.metric != "loss" and not all(map(has_answer, test.examples)):
        raise UserError("test rows of plain text have no answer to score", "evaluation.metric", "use metric: loss")
    if recipe.gates.max_forgetting is not None and not isinstance(recipe.evaluation.probe, Path):
        raise UserError("there is no probe to measure it on", "gates.max_forgetting", "name one with evaluation.probe")


def check_overlap(items: Probe | None, train: Dataset | None) -> None:
    """What is trained on cannot tell what was forgotten."""
    if items is None or train is None:
        return
    if pairs := probe.overlap(items, train.examples):
        asked, trained = pairs[0]
        raise UserError(
            f"probe_overlap: {len(pairs)}; probe row {asked} asks what training row {trained} teaches",
            "evaluation.probe",
            "take these rows out of the training data or the probe",
        )


def digests(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """sha256 of all that shapes a run besides its recipe: a resumed run must find the same."""
    paths = [*recipe.data.train_paths, recipe.data.validation, recipe.data.test, recipe.evaluation.probe]
    template = tokenizer.chat_template
    return {
        "base": model.fingerprint(recipe.model),
        "data": {str(path): folder.sha256_file(path) for path in paths if isinstance(path, Path)},
        "template": hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
        "start_from": files.adapter_digest(recipe.method.start_from) if recipe.method.start_from else None,
    }


def build_model(recipe: Recipe, inputs: Inputs, device: torch.device) -> tuple[Any, dict[str, int]]:
    """The base with the method attached, ready to train, and the hash of each of its tensors before training."""
    run_plan = inputs.plan
    dtype = model.base_dtype(recipe.model, device, METHODS[recipe.method.name].trains_base)
    base = classifier.load(recipe.model, dtype, device, inputs.classes, recipe.training.seed)
    method = method_of(recipe.method.name, base)
    method.attach(base, recipe.method, recipe.training.seed)
    if recipe.method.start_from is not None:
        start_from(base, recipe)
    if run_plan.packing:
        comparing.prove_packing(base, recipe.model.attention)
    if plan.is_checkpointed(recipe, base):
        base.activation_checkpointing_enable({"use_reentrant": False})
    return base, hashes(base)


@torch.no_grad()
def hashes(module: torch.nn.Module) -> dict[str, int]:
    """A 64-bit hash of every weight's bits, computed where it lies: equal before and after means unchanged."""
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    for path, layer in quantized.layers(module):
        tensors |= {f"{path}.weight.{name}": constant for name, constant in quantized.constants(layer).items()}
    return {
        name: int(torch.hash_tensor(tensor.data).view(torch.int64)) if tensor.numel() else 0
        for name, tensor in tensors.items()
    }
