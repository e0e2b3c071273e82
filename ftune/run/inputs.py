"""Everything a recipe names, read and checked before anything is loaded or written; every problem at once."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import activations, classifier, comparing, data, folder, model, plan, quantized, schedule, trackers, trust
from ftune.artifacts import files, proof
from ftune.classifier import Classes
from ftune.clean import Twin
from ftune.data import Dataset, Mixture, findings
from ftune.engine import whole
from ftune.errors import Problem, UserError
from ftune.evaluate import FunctionMetric, Previous
from ftune.methods import METHODS
from ftune.methods.head import method_of
from ftune.optimizers import resolve_optimizer
from ftune.plan import Prediction
from ftune.predict import LABEL_METRICS
from ftune.probe import Probe
from ftune.recipe import Recipe
from ftune.run.datasets import Collector, is_classification, read_sets
from ftune.run.scorer import check_answers, function_of, previous_of
from ftune.run.start import start_from
from ftune.settings import METHOD_NAMES
from ftune.train import TrainingPlan


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
    twins: tuple[Twin, ...] = ()
    """Training rows that repeat others or what is measured, with these."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What a user would want to know of how rows are read, and how many rows it happened to; 0 for all."""
    function: FunctionMetric | None = None
    """The metric, where it is the user's own."""
    previous: Previous | None = None
    """The run to compare with."""

    def account(self) -> dict[str, Any]:
        """The `data` part of report.json."""
        return findings.document(self.train.audit, self.classes is None) | {"notes": dict(self.notes)}


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what depends on the model; a model that cannot be read is told later, with all other problems."""
    if recipe.training.learning_rate is not None:
        return recipe
    try:
        rate = recipe.method.rate(model.facts(recipe.model).width, is_classification(recipe))
    except UserError:
        return recipe
    training = recipe.training.model_copy(update={"learning_rate": rate})
    return recipe.model_copy(update={"training": training})


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
    if recipe.training.select == "best" and recipe.data.validation is None:
        hint = "name a file with data.validation, or a share of the rows such as 0.05"
        problems.append(Problem("the best step is chosen on validation rows", "training.select: best", hint))
    if problems:
        raise UserError.collect(problems)


def training_plan(recipe: Recipe, mixture: Mixture | None) -> TrainingPlan:
    """The plan of a run over these rows; of one step an epoch where there are none to count."""
    training = recipe.training
    total = schedule.total_steps(
        len(mixture) if mixture else 1, training.batch_size, training.epochs, training.max_steps
    )
    return TrainingPlan(training, total, recipe.data.packing, recipe.model.attention, training.seed, mixture)


def read(recipe: Recipe, collector: Collector) -> Inputs | None:
    """All inputs of a recipe, or None when the collector found problems."""
    tokenizer = facts = prediction = None
    check_possible(recipe, collector)
    with collector.stage():
        check_objective(recipe)
    function = previous = None
    with collector.stage():
        function = function_of(recipe)
    with collector.stage():
        facts = model.facts(recipe.model)
    with collector.stage():
        tokenizer = model.load_tokenizer(recipe.model)
    if tokenizer is None or facts is None:
        return None
    sets = read_sets(recipe, tokenizer, facts, collector)
    with collector.stage():
        function = check_answers(recipe, sets.test, function)
    with collector.stage():
        previous = previous_of(recipe, sets.test, function)
    run_plan = training_plan(recipe, sets.train.mixture if sets.train else None)
    with collector.stage():
        supervised = sets.train.audit.supervised_tokens if sets.train else None
        prediction = plan.make_plan(recipe, recipe.method, run_plan, supervised, sets.classes)
    if collector.problems or sets.train is None or prediction is None:
        return None
    return Inputs(
        tokenizer,
        sets.train,
        sets.validation,
        sets.test,
        sets.probe,
        replace(run_plan, offloads=prediction.checkpointing == "offload"),
        prediction,
        sets.classes,
        tuple(sets.twins),
        sets.notes,
        function,
        previous,
    )


def check_possible(recipe: Recipe, collector: Collector) -> None:
    """What this machine, this method and this base cannot do together."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with collector.stage():
        resolve_optimizer(recipe.training.optimizer, device)
    with collector.stage():
        activations.check(recipe.training.gradient_checkpointing, device)
    with collector.stage():
        trackers.check(recipe.output.trackers)
    with collector.stage():
        check_abilities(recipe)
    with collector.stage():
        quantized.check_stored(recipe.model, model.load_config(recipe.model))
        trust.check_weights(recipe.model)
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
    if recipe.training.parallel == "fsdp":
        problems += unshardable(recipe)
    if recipe.training.gradient_checkpointing not in ("auto", False) and not (
        abilities.checkpointing or recipe.data.packing
    ):
        what = f"{name} without packing loses its prefix when activations are computed again"
        problems.append(Problem(what, "training.gradient_checkpointing", "set data.packing: true, or this to false"))
    if problems:
        raise UserError.collect(problems)


def unshardable(recipe: Recipe) -> Iterator[Problem]:
    """Why processes cannot each hold a part of this run's model."""
    where, hint = "training.parallel: fsdp", "use ddp, where every process holds the whole model"
    name = recipe.method.name
    if obstacle := METHOD_NAMES[name].abilities.obstacle_to_sharding:
        yield Problem(f"{name} cannot be shared out: {obstacle}", where, hint)
    if recipe.model.quantization != "none":
        yield Problem("the packed weights of a quantized base cannot be cut into parts", where, hint)
    if recipe.training.optimizer not in ("auto", "adamw", "sgd"):
        what = f"the state of {recipe.training.optimizer} cannot be cut into parts"
        yield Problem(what, where, "use optimizer: adamw, whose state is then shared out")


def digests(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """sha256 of all that shapes a run besides its recipe: a resumed run must find the same."""
    sources, template = inputs.train.sources, inputs.tokenizer.chat_template
    named = (recipe.data.validation, recipe.data.test, recipe.evaluation.probe)
    return {
        "base": model.fingerprint(recipe.model),
        "data": {str(source.path): source.digest for source in sources}
        | {str(path): folder.sha256_file(path) for path in named if isinstance(path, Path)},
        "commits": {str(source.path): source.commit for source in sources if source.commit},
        "template": hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
        "start_from": files.adapter_digest(recipe.method.start_from) if recipe.method.start_from else None,
    }


def load_base(recipe: Recipe, inputs: Inputs, device: torch.device) -> PreTrainedModel:
    """The base as training holds it; under a new head, where a classifier is trained."""
    dtype = model.base_dtype(recipe.model, device, METHODS[recipe.method.name].trains_base)
    return classifier.load(recipe.model, dtype, device, inputs.classes, recipe.training.seed)


def attach_method(recipe: Recipe, inputs: Inputs, base: PreTrainedModel) -> dict[str, int]:
    """Put the method on the base, ready to train; gives the hash of each of its tensors before training."""
    method = method_of(recipe.method.name, base)
    method.attach(base, recipe.method, recipe.training.seed)
    if recipe.method.start_from is not None:
        start_from(base, recipe)
    if inputs.plan.packing:
        comparing.prove_packing(base, recipe.model.attention)
    activations.set_up(base, inputs.prediction.checkpointing)
    return hashes(base)


@torch.no_grad()
def hashes(module: torch.nn.Module) -> dict[str, int]:
    """A 64-bit hash of every weight's bits, computed where it lies: equal before and after means unchanged.

    Where processes hold parts, all of them must ask."""
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    for path, layer in quantized.layers(module):
        tensors |= {f"{path}.weight.{name}": constant for name, constant in quantized.constants(layer).items()}
    return {
        name: int(torch.hash_tensor(whole(tensor.data)).view(torch.int64)) if tensor.numel() else 0
        for name, tensor in tensors.items()
    }
