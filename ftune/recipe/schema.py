"""The recipe: every key, its bounds and its description; documentation and starters are made from it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ftune.recipe.document import SHORT_FORMS
from ftune.settings import (
    METHOD_NAMES,
    AnyMethod,
    AnyObjective,
    FilePath,
    FunctionPath,
    MethodSettings,
    Number,
    Positive,
    Settings,
    SftSettings,
    absolute,
    number_from_text,
)

Count = Annotated[int, Field(ge=1)]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def _folder_or_hub_id(value: object, info: ValidationInfo) -> object:
    """An existing folder, or what is written like a path, is a path; `name` or `owner/name` is a hub id."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise PydanticCustomError("path_type", "a folder or a hub id")
    path = absolute(value, info)
    return path if path.is_dir() or not HUB_ID.fullmatch(value) else value


HubName = Annotated[Path | str, BeforeValidator(_folder_or_hub_id)]


class ModelSection(Settings):
    base: HubName = Field(description="model folder or hub id")
    revision: str | None = Field(None, description="hub revision; its commit hash is recorded")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="how the base is held in memory: as it is stored where the machine is fast at that, float32 on "
        "other CPUs and for weights that are trained; float16 on a GPU, with its loss scaled",
    )
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="a smaller base that stays frozen; nf4 unless told otherwise with qlora"
    )
    double_quantization: bool = Field(True, description="quantize the quantization constants too")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto",
        description="attention implementation; auto: flash attention for packed rows in 16 bits on a GPU that has "
        "it, else sdpa; flex_attention, on a GPU, for soft caps",
    )
    chat_template: FilePath | None = Field(None, description="a Jinja file; null = the tokenizer's own")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @field_validator("revision")
    @classmethod
    def _is_of_the_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and isinstance(info.data.get("base"), Path):
            raise PydanticCustomError("ftune", "model.revision is for bases on the hub, and this base is a folder")
        return value

    @field_validator("double_quantization")
    @classmethod
    def _has_constants(cls, value: bool, info: ValidationInfo) -> bool:
        form = info.data.get("quantization")
        if not value and form in ("none", "int8"):
            raise PydanticCustomError(
                "ftune",
                "model.double_quantization is for nf4 and fp4, and model.quantization is {form}: leave it out",
                {"form": form},
            )
        return value


Weight = Annotated[
    Positive, Field(description="how often an epoch sees each of its rows: 2 is twice, 0.5 is every other row")
]


class DataFile(Settings):
    path: FilePath = Field(description="a file of rows")
    weight: Weight = 1.0


class HubDataset(Settings):
    hub: HubName = Field(description="hub id of a dataset, or a folder that holds one")
    split: str = Field("train", min_length=1, description="its split")
    revision: str | None = Field(None, description="hub revision")
    weight: Weight = 1.0


Rows = FilePath | DataFile | HubDataset
Fraction = Annotated[float, Field(gt=0, lt=1), BeforeValidator(number_from_text)]


class DataSection(Settings):
    train: Rows | Annotated[tuple[Rows, ...], Field(strict=False, min_length=1)] = Field(
        description="file, {hub, split}, or a list of these and {path, weight}"
    )
    validation: Fraction | FilePath | None = Field(
        None, description="file whose loss is measured during training, or the share of the rows to keep back for it"
    )
    test: FilePath | None = Field(None, description="held-out file that the task metric is measured on")
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "labelled", "preference"] = (
        Field("auto", description="the shape of a row; auto goes by the columns")
    )
    columns: dict[str, str] = Field({}, description="rename columns, e.g. {prompt: question, completion: answer}")
    max_length: Annotated[int, Field(ge=2)] = Field(1024, description="tokens per example")
    too_long: Literal["error", "drop", "truncate"] = Field("error", description="what happens to longer examples")
    packing: bool = Field(True, description="several examples in one sequence, isolated from each other")
    deduplicate: Literal["off", "exact", "near"] = Field(
        "exact", description="remove training rows that repeat an earlier one, or nearly do"
    )
    decontaminate: bool | Literal["report", "remove", "error"] = Field(
        True, description="training rows that validation, test or probe ask for: true removes them, false does not look"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at unusable rows, or skip and count them")

    @property
    def train_rows(self) -> tuple[DataFile | HubDataset, ...]:
        """Where the training rows come from, in the recipe's order."""
        entries = self.train if isinstance(self.train, tuple) else (self.train,)
        return tuple(DataFile(path=entry) if isinstance(entry, Path) else entry for entry in entries)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of rows that the section names."""
        named = [entry.path for entry in self.train_rows if isinstance(entry, DataFile)]
        return (*named, *(path for path in (self.validation, self.test) if isinstance(path, Path)))


class TrainingSection(Settings):
    learning_rate: Positive | None = Field(
        None, description="the highest learning rate; null = what suits the method and the model's width"
    )
    epochs: Positive | None = Field(None, description="passes over the data; 3 unless max_steps is given")
    max_steps: Count | None = Field(None, validate_default=True, description="optimizer steps, instead of epochs")
    batch_size: Count = Field(16, description="examples per optimizer step, over all devices")
    micro_batch_tokens: Literal["auto"] | Count = Field(
        "auto",
        description="what fits at once; auto: 4096 (1408 on a CPU), halved when memory runs out; the result stays",
    )
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd"] = Field(
        "adamw",
        description="the optimizer; auto (qlora's default) is paged_adamw_32bit on a GPU and adamw on a CPU",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="the learning rate after warm-up")
    warmup: Number = Field(0.03, ge=0, lt=1, description="share of the steps in which it rises")
    weight_decay: Number = Field(0.0, ge=0, description="decoupled weight decay of matrices")
    max_grad_norm: Positive = Field(1.0, description="longer gradients are scaled down to this norm")
    gradient_checkpointing: Literal["auto", "half", "offload"] | bool = Field(
        "auto",
        description="save memory by making activations again: of all layers, of every other one (half), or of all with "
        "their inputs in main memory (offload, on a GPU); auto: as little as there is room for",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field("auto", description="how several processes share the work")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="order of rows, dropout, start of the adapter")
    evaluate_every: Count | None = Field(None, description="steps; null = at the end of each epoch")
    checkpoint_every: Count | None = Field(None, description="steps; null = at the end of each epoch")
    keep_checkpoints: Count = Field(2, description="older checkpoints are deleted")
    select: Literal["last", "best"] = Field("last", description="last step, or best score within gates.max_forgetting")

    @model_validator(mode="before")
    @classmethod
    def _three_epochs_unless_told(cls, values: Any) -> Any:
        if isinstance(values, dict) and "epochs" not in values and values.get("max_steps") is None:
            return {"epochs": 3.0, **values}
        return values

    @field_validator("max_steps")
    @classmethod
    def _instead_of_epochs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and (value is None) == (info.data["epochs"] is None):
            raise PydanticCustomError("ftune", "give either training.epochs or training.max_steps")
        return value


def _task(value: object, info: ValidationInfo) -> object:
    """What ends like a YAML file is a path; anything else is a name that lm-eval knows."""
    if isinstance(value, str) and value and value.endswith((".yaml", ".yml")):
        return absolute(value, info)
    return value


TaskName = Annotated[Path | Annotated[str, Field(min_length=1)], BeforeValidator(_task)]


class HarnessProbe(Settings):
    harness: Annotated[tuple[TaskName, ...], Field(strict=False, min_length=1)] = Field(
        description="tasks of lm-eval: names it knows, or YAML files"
    )


class EvaluationSection(Settings):
    metric: (
        Literal["exact_match", "contains", "json_match", "rouge_l", "bleu", "accuracy", "f1", "loss", "perplexity"]
        | FunctionPath
    ) = Field(
        "exact_match",
        description="how an answer is scored, or file.py:function; of labels accuracy or f1 (macro)",
    )
    previous: FilePath | None = Field(None, description="a finished run to compare with, item by item")
    few_shot: Annotated[int, Field(ge=0)] = Field(4, description="examples in the base model's prompt; 0 = off")
    max_new_tokens: Count = Field(128, description="the longest answer that is generated")
    review: Annotated[int, Field(ge=0)] = Field(50, description="outputs on the review sheet; 0 = off")
    probe: Literal["off", "general"] | HarnessProbe | FilePath = Field(
        "off",
        union_mode="left_to_right",
        description="what forgetting is measured on: the suites that come with ftune (general), a file of your own, "
        "or lm-eval's tasks, {harness: [names or YAML files]}",
    )


class GatesSection(Settings):
    """All optional; any that fails makes exit code 1."""

    min_score: Number | None = Field(
        None, description="the tuned model's score on the test set; of loss and perplexity at most"
    )
    min_gain: Number | None = Field(None, description="its gain over the better of zero-shot and few-shot")
    max_forgetting: Number | None = Field(None, ge=0, description="the worst drop on the probe")


def _run_folder(value: Any, info: ValidationInfo) -> Any:
    """`{recipe}` becomes the recipe file's name; nothing else is replaced."""
    if not isinstance(value, str):
        return value
    filled = value.replace("{recipe}", (info.context or {}).get("name", "recipe"))
    if "{" in filled or "}" in filled:
        raise PydanticCustomError(
            "ftune", "output.dir: of all words in braces only {name} is replaced", {"name": "{recipe}"}
        )
    return filled


class OutputSection(Settings):
    dir: Annotated[FilePath, BeforeValidator(_run_folder)] = Field(
        "runs/{recipe}",
        validate_default=True,
        description="the run folder; {recipe} is the recipe file's name",
    )
    save: Literal["adapter", "merged", "both"] = Field("adapter", description="what is kept of the tuned model")
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Field(strict=False)] = Field(
        (), description="where metrics are sent besides metrics.jsonl; needs the extra trackers"
    )


class Recipe(Settings):
    """What a run is made from. Sections that a file leaves out are there, with their defaults."""

    model: ModelSection = Field(description="the base model")
    method: AnyMethod = Field(description="how it is tuned")
    objective: AnyObjective = Field(SftSettings(), description="what it learns from")
    data: DataSection = Field(description="rows, and what is done to them")
    training: TrainingSection = Field(description="the optimizer's steps")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="what is measured")
    gates: GatesSection = Field(GatesSection(), description="all optional; any that fails makes exit code 1")
    output: OutputSection = Field(description="what is written, and where")

    @property
    def name(self) -> str:
        """The run's name: the last part of its folder; unless told otherwise the recipe file's stem."""
        return self.output.dir.name

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Short forms, sections that were left out, and the defaults that suit the method."""
        if not isinstance(values, dict):
            return values
        values = {"training": {}, "output": {}, **values}
        for section, key in SHORT_FORMS.items():
            if isinstance(values.get(section), str):
                values[section] = {key: values[section]}
        for section, defaults in _method_defaults(values.get("method")).items():
            if isinstance(values.get(section), dict):
                values[section] = {**defaults, **values[section]}
        if _name_of(values.get("objective")) == "classification":
            evaluation = values.get("evaluation", {})
            if isinstance(evaluation, dict):
                values["evaluation"] = {"metric": "accuracy", **evaluation}
        return values

    @field_validator("method")
    @classmethod
    def _has_its_base(cls, value: MethodSettings, info: ValidationInfo) -> MethodSettings:
        model = info.data.get("model")
        if "quantization" in value.recipe_defaults.get("model", {}) and model and model.quantization == "none":
            raise PydanticCustomError(
                "ftune",
                "method {name} needs a quantized base: leave model.quantization out, or take method lora",
                {"name": value.name},
            )
        return value


def _name_of(section: Any) -> str:
    return str(section.get("name")) if isinstance(section, dict) else ""


def _method_defaults(method: Any) -> Mapping[str, Mapping[str, Any]]:
    """The defaults of other sections that hold with a method, by section."""
    entry = METHOD_NAMES.get(_name_of(method))
    return entry.settings.recipe_defaults if entry and entry.settings else {}
