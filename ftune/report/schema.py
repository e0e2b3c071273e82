"""report.json as other programs may rely on it: its JSON Schema and docs/report.md are made from these models.

Every part may have more keys than are told here; what is told keeps its name and its type within a schema number. A
field with a default may be absent, one that allows None may be null.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class Intervals(Part):
    zero_shot: Interval | None = Field(description="of the base's score")
    few_shot: Interval | None = Field(description="of the base's score with examples")
    tuned: Interval | None = Field(description="of the tuned model's score")


class Confusion(Part):
    labels: list[str] = Field(description="all labels, in the order of the counts")
    counts: list[list[int]] = Field(description="items by expected label, then by predicted label")


class Task(Part):
    metric: str = Field(description="evaluation.metric: how an answer is scored")
    n: int = Field(ge=1, description="test items")
    zero_shot: float | None = Field(description="the base's score; of a classifier, the most frequent label's")
    few_shot: float | None = Field(description="the base's score with examples in its prompt")
    tuned: float | None = Field(description="the tuned model's score")
    gain: float | None = Field(description="over the better of zero-shot and few-shot; more is better, of a loss too")
    ci95: Interval | None = Field(description="95 % interval of the gain, paired over the items")
    intervals: Intervals = Field(description="95 % intervals of the scores")
    reason: str = Field("", description="why something was not measured")
    accuracy: float | None = Field(None, description="of a classifier")
    macro_f1: float | None = Field(None, description="of a classifier: the mean of the labels' F1")
    confusion: Confusion | None = Field(None, description="of a classifier")


class Pooled(Part):
    n: int = Field(ge=1, description="items")
    metric: str | None = Field(None, description="how they are scored")
    before: float = Field(description="the base's score")
    after: float = Field(description="the tuned model's score on the same items")
    drop: float = Field(description="before - after")
    ci95: Interval | None = Field(description="95 % interval of the drop, paired over the items")
    p_value: float | None = Field(None, description="of McNemar's exact test, where items are right or wrong")
    num_lost: int | None = Field(None, description="items that became worse")
    num_gained: int | None = Field(None, description="items that became better")
    minimum_detectable: float | None = Field(description="the true drop that so many items find with 80 % power")
    verdict: Literal["forgot", "kept", "cannot tell"] = Field(description="what the interval says of the drop")


class Suite(Pooled):
    name: str = Field(description="the skill")


class GeneralLoss(Part):
    before: float | None = Field(description="the base's, in nats per token")
    after: float | None = Field(description="the tuned model's, in nats per token")


class Forgetting(Part):
    suites: list[Suite] = Field(description="a skill each; empty when nothing was asked")
    overall: Pooled | None = Field(None, description="the items of all suites pooled")
    worst_drop: float | None = Field(description="the largest drop of a suite; gates.max_forgetting looks at it")
    general_loss: GeneralLoss = Field(description="loss on the probe's texts")
    kl_to_base: float | None = Field(description="mean KL(tuned || base) over the probe, in nats per token")
    kl_to_base_on_task: float | None = Field(None, description="the same over the test items")
    reason: str = Field("", description="why something was not measured")


class Artefact(Part):
    adapter_live: bool = Field(description="the files change the base's outputs")
    keys_loaded: str = Field(pattern=r"^\d+/\d+$", description="saved tensors that found their place, of all")
    reload_max_diff: float | None = Field(description="largest logit difference between model in training and reload")
    merged_max_diff: float | None = Field(description="largest logit difference between adapter and merged weights")
    tolerance: float = Field(description="what rounding alone may change; the limit of the two above")
    reason: str = Field("", description="why something was not measured")
    distance_to_trained: dict[str, float] | None = Field(
        None, description="over a quantized base: logit difference of either merge from what was trained"
    )
    kl_to_trained: dict[str, float] | None = Field(None, description="the same as KL, in nats per token")


class Gate(Part):
    name: str = Field(description="a key of `gates`, or a check of the files")
    limit: bool | float = Field(description="what it is held against")
    value: bool | float | None = Field(description="what was measured; null does not pass")
    passed: bool = Field(description="whether it held; one that did not makes exit code 1")


class Cost(Part):
    seconds: float = Field(description="of the whole run, evaluation and proofs included")
    training_seconds: float = Field(description="of the training steps alone")
    tokens: int = Field(description="that training read")
    tokens_per_second: float = Field(description="of training alone")
    peak_memory_bytes: int | None = Field(description="of the process on a CPU, of the device's allocations on a GPU")
    trainable_parameters: int = Field(description="weights that were trained")


class NoCost(BaseModel):
    """What was only evaluated did not cost anything to train."""

    model_config = ConfigDict(extra="forbid")


class Remark(Part):
    what: str = Field(description="what is remarkable")
    where: str = Field(description="the key or file")
    hint: str = Field(description="what to try")


class Data(Part):
    rows_in: int = Field(description="rows that were read")
    rows_used: int = Field(description="rows that were trained on")
    dropped: dict[str, int] = Field(description="rows by the reason they were dropped for; with rows_used, all rows")
    duplicates: int | None = Field(description="rows that repeat an earlier one; null where nobody looked")
    contaminated: int | None = Field(description="rows that ask what is measured; null where nobody looked")
    supervised_tokens: int = Field(description="tokens that are learned")
    tokens_in: int | None = Field(None, description="tokens of all rows")
    tokens: int | None = Field(None, description="tokens that training sees")
    warnings: list[Remark] = Field([], description="what a user should look at")


class PathPoint(Part):
    step: int = Field(ge=0, description="optimizer steps done; 0 is the base")
    validation_loss: float | None = Field(None, description="nats per token")
    score: float | None = Field(None, description="on the task")
    worst_drop: float | None = Field(None, description="of the probe's suites")
    general_loss: float | None = Field(None, description="nats per token")


class Selection(Part):
    select: str = Field(description="training.select")
    step: int | None = Field(description="the step whose weights were kept")
    reason: str | None = Field(None, description="why this one")


class Strength(Part):
    strength: float = Field(description="how much of the adapter: 0 is the base, 1 all of it")
    score: float | None = Field(description="on the task")
    ci95: Interval | None = Field(None, description="95 % interval of the score")
    worst_drop: float | None = Field(None, description="of the probe's suites")
    general_loss: float | None = Field(None, description="nats per token")
    kl_to_base: float | None = Field(None, description="nats per token")


class Report(Part):
    schema_: Literal[1] = Field(alias="schema", description="this document's version")
    name: str = Field(description="the run's: the last part of its folder")
    verdict: str = Field(description="all of it in a sentence")
    task: Task | None = Field(description="what was learned; null without a test set")
    forgetting: Forgetting | None = Field(description="what was forgotten; null without a probe")
    artefact: Artefact = Field(description="the proof that the files are what was trained")
    gates: list[Gate] = Field(description="the recipe's gates that were set, then the checks of the files")
    cost: Cost | NoCost = Field(description="what the run cost; empty where nothing was trained")
    data: Data = Field(description="where every row went")
    path: list[PathPoint] | None = Field(None, description="learning and forgetting while training")
    selection: Selection | None = Field(None, description="which checkpoint was kept")
    strengths: list[Strength] | None = Field(None, description="of `ftune eval --strengths`")
    already_complete: bool = Field(False, description="`--resume` found the run finished")


INTRODUCTION = """\
# report.json

What a run found out, for programs. This page is made from `ftune/report/schema.py`; `ftune schema --report` prints
the same as JSON Schema. A part may have more keys than stand here, and later versions may add some; those that
stand here keep name and type as long as `schema` is 1. *May be absent* is a key that some runs do not have; null is
what was not measured.
"""
SECTIONS: Mapping[str, type[BaseModel]] = {
    "the document": Report,
    "task": Task,
    "forgetting": Forgetting,
    "forgetting.suites, each; forgetting.overall has no name": Suite,
    "artefact": Artefact,
    "gates, each": Gate,
    "cost": Cost,
    "data": Data,
    "path, each": PathPoint,
    "selection": Selection,
    "strengths, each": Strength,
}


def report_schema() -> dict[str, Any]:
    """JSON Schema of report.json."""
    schema = Report.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ftune report"}


def documentation() -> str:
    """Markdown with a table of every key."""
    lines = [INTRODUCTION]
    for heading, model in SECTIONS.items():
        schema = model.model_json_schema(by_alias=True)
        required = schema.get("required", [])
        lines += [f"## {heading}\n", "| key | type | |", "|---|---|---|"]
        for key, facts in schema["properties"].items():
            absent = "" if key in required else " *May be absent.*"
            told = facts["description"].replace("|", "\\|")
            lines.append(f"| `{key}` | {' or '.join(dict.fromkeys(_types(facts)))} | {told}.{absent} |")
        lines.append("")
    return "\n".join(lines)


def _types(facts: Mapping[str, Any]) -> Iterator[str]:
    """What a value may be, out of its JSON Schema."""
    if "anyOf" in facts:
        for member in facts["anyOf"]:
            yield from _types(member)
    elif "$ref" in facts:
        yield "object"
    elif "enum" in facts or "const" in facts:
        yield from (f"`{value}`" for value in facts.get("enum") or [facts["const"]])
    elif facts["type"] == "array":
        if facts.get("minItems") == 2:
            yield "[low, high]"
        else:
            yield f"list of {' or '.join(_types(facts['items']))}s"
    elif facts["type"] == "object":
        yield f"object of {' or '.join(_types(facts['additionalProperties']))}s"
    else:
        yield {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(
            facts["type"], facts["type"]
        )
