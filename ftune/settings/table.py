"""The names a recipe may use for methods and objectives, and what goes together with each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, Union

from pydantic import Field

from ftune.settings.fields import Settings
from ftune.settings.methods import (
    AdaloraSettings,
    BitfitSettings,
    BottleneckSettings,
    DoraSettings,
    FullSettings,
    Ia3Settings,
    LinearProbeSettings,
    LoraSettings,
    MethodSettings,
    PrefixTuningSettings,
    PromptTuningSettings,
    QloraSettings,
    VeraSettings,
)
from ftune.settings.objectives import ClassificationSettings, ObjectiveSettings, SftSettings

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Abilities:
    """What goes together with a method; whatever does not is refused before anything is loaded."""

    obstacle_to_merging: str = ""
    """Why it does not fold into the base's weights; empty when it does."""
    quantized: bool = True
    """The base may be quantized."""
    checkpointing: bool = True
    """Activations may be computed again, with packing or without."""
    packing: bool = True
    peft: bool = True
    """It is saved in PEFT's layout."""
    obstacle_to_sharding: str = ""
    """Why its model cannot be held in parts (FSDP); empty when it can."""
    vllm: bool = False
    """vLLM serves what is saved as it is, by the method's defaults (the others once they are merged)."""

    @property
    def merging(self) -> bool:
        return not self.obstacle_to_merging

    @property
    def sharding(self) -> bool:
        return not self.obstacle_to_sharding


ABILITIES = ("merging", "quantized", "checkpointing", "packing", "sharding", "peft", "vllm")
"""The columns of the table that `ftune methods` prints."""


@dataclass(frozen=True)
class Entry(Generic[S]):
    """One line of a table of names: what it is, its papers on arXiv, its settings where it is available."""

    description: str
    papers: tuple[str, ...] = ()
    settings: type[S] | None = None
    abilities: Abilities = Abilities()


METHOD_NAMES: Mapping[str, Entry[MethodSettings]] = {
    "full": Entry(
        "trains every weight; the most to learn, to store and to forget",
        (),
        FullSettings,
        Abilities(quantized=False, peft=False, vllm=True),
    ),
    "linear_probe": Entry(
        "trains a new head on frozen features, which are computed once; the fastest",
        (),
        LinearProbeSettings,
        Abilities(peft=False, obstacle_to_sharding="its head is small, and its features are computed once"),
    ),
    "lora": Entry(
        "trains low-rank matrices beside the linear layers; the usual choice",
        ("2106.09685", "2312.03732"),
        LoraSettings,
        Abilities(vllm=True),
    ),
    "qlora": Entry(
        "is lora over a base in 4 bits; for a model that hardly fits",
        ("2305.14314",),
        QloraSettings,
        Abilities(vllm=True, obstacle_to_sharding="its base is packed into 4 bits, which cannot be cut into parts"),
    ),
    "dora": Entry("is lora for the direction of each weight, plus its magnitude", ("2402.09353",), DoraSettings),
    "adalora": Entry(
        "spends a shrinking rank budget where it matters most",
        ("2303.10512",),
        AdaloraSettings,
        Abilities(obstacle_to_sharding="its budget is allocated over all ranks of all layers at once"),
    ),
    "vera": Entry("trains two vectors over shared random matrices; very small adapters", ("2310.11454",), VeraSettings),
    "ia3": Entry("trains scales of keys, values and MLP activations", ("2205.05638",), Ia3Settings),
    "bitfit": Entry("trains the biases alone", ("2106.10199",), BitfitSettings, Abilities(peft=False)),
    "bottleneck": Entry(
        "trains small layers down, up and around, after or beside each block",
        ("1902.00751", "2110.04366"),
        BottleneckSettings,
        Abilities(obstacle_to_merging="it computes on activations, which no weight of the base can hold", peft=False),
    ),
    "prefix_tuning": Entry(
        "trains keys and values in front of every layer",
        ("2101.00190",),
        PrefixTuningSettings,
        # Without packing the prefix travels in a cache, which transformers drops when it computes activations again.
        Abilities(
            obstacle_to_merging="it is keys and values, which no weight of the base can hold", checkpointing=False
        ),
    ),
    "prompt_tuning": Entry(
        "trains input embeddings in front of the text",
        ("2104.08691", "2110.07602"),
        PromptTuningSettings,
        Abilities(obstacle_to_merging="it is input, which no weight of the base can hold"),
    ),
}
OBJECTIVE_NAMES: Mapping[str, Entry[ObjectiveSettings]] = {
    "sft": Entry("supervised fine-tuning on answers", (), SftSettings),
    "classification": Entry("a label for a text", (), ClassificationSettings),
    "dpo": Entry("preferences between two answers", ("2305.18290",)),
    "grpo": Entry("rewards for sampled answers", ("2402.03300",)),
}


def available(table: Mapping[str, Entry[S]]) -> dict[str, type[S]]:
    """The names of a table that this version can do, with their settings classes."""
    return {name: entry.settings for name, entry in table.items() if entry.settings}


def _one_of(table: Mapping[str, Entry[Any]]) -> Any:
    return Annotated[Union[tuple(available(table).values())], Field(discriminator="name")]  # noqa: UP007


if TYPE_CHECKING:
    AnyMethod = MethodSettings
    AnyObjective = ObjectiveSettings
else:
    AnyMethod = _one_of(METHOD_NAMES)
    AnyObjective = _one_of(OBJECTIVE_NAMES)
