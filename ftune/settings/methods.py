"""One settings class per method: plain data that the recipe validates and the method reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ftune.settings.fields import (
    DROPOUT,
    Dropout,
    Expression,
    FilePath,
    LayerIndices,
    ModuleNames,
    Number,
    Positive,
    Rank,
    Settings,
    Share,
)


@dataclass(frozen=True)
class Rate:
    """A learning rate for a model of width N: at_2000 * (2000 / N) ** exponent, to two digits.

    The exponent is the one that Schulman et al. (2025, "LoRA Without Regret") fitted for LoRA on Llama.
    """

    at_2000: float
    exponent: float = 0.78
    for_classes: float = 0.2
    """What part of it suits a classifier: a step sees one label a row, so its gradient is noisier than of answers."""

    def __call__(self, width: int, is_classifier: bool = False) -> float:
        share = self.for_classes if is_classifier else 1.0
        return float(f"{share * self.at_2000 * (2000 / width) ** self.exponent:.1e}")


class MethodSettings(Settings):
    """What every method has."""

    recipe_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Defaults of other sections that hold with this method, by section and key."""
    default_rate: ClassVar[Rate]

    name: str
    layers: Literal["all", "last-half"] | LayerIndices = Field(
        "all", description="the transformer layers that are trained, or their indices from 0"
    )
    start_from: FilePath | None = Field(None, description="an adapter folder to continue from")

    @property
    def rate(self) -> Rate:
        """The learning rate when the recipe gives none; docs/methods.md has the measurements."""
        return self.default_rate


V = TypeVar("V")


def _not_beside_start_from(key: str, value: V, default: V, info: ValidationInfo) -> V:
    """What an adapter starts as has no effect where it continues another one."""
    if value != default and info.data.get("start_from") is not None:
        raise PydanticCustomError("ftune", "method.start_from says how it starts: leave method.{key} out", {"key": key})
    return value


class FullSettings(MethodSettings):
    # Small models want much more than large ones: measured at width 160, published at 2000 and above.
    default_rate = Rate(5e-5, exponent=1.5)

    name: Literal["full"] = Field("full", description="every weight is trained")
    start_from: None = Field(None, description="nothing: a fully tuned model is a base like any other")


class LinearProbeSettings(MethodSettings):
    default_rate = Rate(3e-3, for_classes=1.0)

    name: Literal["linear_probe"] = Field("linear_probe", description="a new head on frozen features")
    layers: Literal["all"] = Field("all", description="the head stands above all of them")


class TargetedSettings(MethodSettings):
    """Methods that adapt single linear layers."""

    target_modules: Literal["all-linear", "attention", "mlp"] | ModuleNames = Field(
        "all-linear", description="which linear layers, or a list of names or regular expressions"
    )


class LowRankSettings(TargetedSettings):
    """LoRA and what is built on it."""

    rank: Rank = Field(16, description="the inner size r of B·A")
    alpha: Positive = Field(32.0, description="the update is scaled by alpha/rank")
    dropout: Dropout = Field(0.05, description=DROPOUT)
    rank_pattern: dict[Expression, Rank] = Field(
        {}, description="other ranks for some modules: {name or regular expression: rank}"
    )
    alpha_pattern: dict[Expression, Positive] = Field(
        {}, description="other alphas for some modules: {name or regular expression: alpha}"
    )
    modules_to_save: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="modules trained in full and saved with the adapter"
    )


class LoraSettings(LowRankSettings):
    # A classifier's rate was measured by itself, and stays at 1e-4 where this one went down from 5e-4.
    default_rate = Rate(3.75e-4, for_classes=0.267)

    name: Literal["lora"] = Field("lora", description="low-rank matrices beside the frozen linear layers")
    rank_stabilized: bool = Field(False, description="scale by alpha/√rank instead of alpha/rank")
    init: Literal["default", "pissa", "olora"] = Field("default", description="how A and B start")
    learning_rate_ratio: Positive = Field(1.0, description="learning rate of B over that of A (LoRA+)")

    @field_validator("init")
    @classmethod
    def _starts_in_one_way(cls, value: str, info: ValidationInfo) -> str:
        return _not_beside_start_from("init", value, "default", info)


class QloraSettings(LoraSettings):
    """LoRA by another name, over a base that is quantized unless the recipe says how."""

    recipe_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "model": {"quantization": "nf4"},
        "training": {"optimizer": "auto"},
    }

    name: Literal["qlora"] = Field("qlora", description="lora over a quantized base")  # type: ignore[assignment]


class DoraSettings(LowRankSettings):
    default_rate = Rate(5e-4)

    name: Literal["dora"] = Field("dora", description="lora for the direction of each weight, plus its magnitude")


class AdaloraSettings(TargetedSettings):
    default_rate = Rate(2e-3)

    name: Literal["adalora"] = Field("adalora", description="low-rank matrices whose ranks shrink to where they matter")
    initial_rank: Rank = Field(24, description="every layer's rank at the start")
    target_rank: Rank = Field(16, description="the mean rank at the end")
    alpha: Positive = Field(32.0, description="the update is scaled by alpha/initial_rank")
    dropout: Dropout = Field(0.0, description=DROPOUT)
    orthogonal_weight: Number = Field(0.1, ge=0, description="weight of the penalty that keeps the factors orthogonal")
    initial_fraction: Share = Field(0.1, description="share of the steps before ranks shrink")
    final_fraction: Share = Field(0.3, description="share of the steps after ranks have shrunk")

    @field_validator("target_rank")
    @classmethod
    def _shrinks(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("initial_rank", value):
            raise PydanticCustomError("ftune", "method.target_rank must not exceed method.initial_rank")
        return value

    @field_validator("final_fraction")
    @classmethod
    def _leaves_time(cls, value: float, info: ValidationInfo) -> float:
        if value + info.data.get("initial_fraction", 0) >= 1:
            raise PydanticCustomError("ftune", "method.initial_fraction and final_fraction must add up to less than 1")
        return value


class VeraSettings(TargetedSettings):
    default_rate = Rate(7e-3)

    name: Literal["vera"] = Field("vera", description="two vectors a layer over random matrices that all layers share")
    rank: Rank = Field(256, description="the inner size of the random matrices")
    dropout: Dropout = Field(0.0, description=DROPOUT)


class Ia3Settings(MethodSettings):
    default_rate = Rate(1.5e-2)

    name: Literal["ia3"] = Field("ia3", description="scales of keys, values and MLP activations")
    target_modules: Literal["auto"] | ModuleNames = Field(
        "auto", description="auto is keys, values and each MLP's last layer; or names or regular expressions"
    )
    feedforward_modules: Annotated[tuple[Expression, ...], Field(strict=False)] = Field(
        (), description="those of the named modules whose inputs are scaled, not their outputs"
    )

    @field_validator("feedforward_modules")
    @classmethod
    def _are_named(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and info.data.get("target_modules", "auto") == "auto":
            raise PydanticCustomError(
                "ftune", "method.feedforward_modules are some of method.target_modules: name those too"
            )
        return value


class BitfitSettings(MethodSettings):
    default_rate = Rate(1e-3)

    name: Literal["bitfit"] = Field("bitfit", description="the biases alone are trained")


class BottleneckSettings(MethodSettings):
    default_rate = Rate(1e-3)
    parallel_rate: ClassVar = Rate(5e-3, for_classes=0.02)

    name: Literal["bottleneck"] = Field("bottleneck", description="small layers after or beside each block")
    size: Rank = Field(64, description="the inner size")
    placement: Literal["serial", "parallel"] = Field(
        "serial", description="after attention and MLP, or beside the MLP alone"
    )
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="the nonlinearity between the two layers")

    @property
    def rate(self) -> Rate:
        return self.parallel_rate if self.placement == "parallel" else self.default_rate


class VirtualTokenSettings(MethodSettings):
    """Methods that put something in front of every sample, at every layer."""

    layers: Literal["all"] = Field("all", description="what stands in front does so for every layer")
    virtual_tokens: Rank = Field(20, description="how many tokens stand in front")


class PrefixTuningSettings(VirtualTokenSettings):
    default_rate = Rate(2e-2)

    name: Literal["prefix_tuning"] = Field("prefix_tuning", description="keys and values in front of every layer")
    projection: bool = Field(False, description="make them by an MLP while training")


class PromptTuningSettings(VirtualTokenSettings):
    default_rate = Rate(1e-2)
    deep_rate: ClassVar = Rate(5e-2)

    name: Literal["prompt_tuning"] = Field("prompt_tuning", description="embeddings in front of the text")
    depth: Literal["shallow", "deep"] = Field("shallow", description="in front of the input, or of every layer's")
    init_text: str | None = Field(None, min_length=1, description="the text they start as; null = random tokens")

    @field_validator("init_text")
    @classmethod
    def _starts_in_one_way(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _not_beside_start_from("init_text", value, None, info)

    @property
    def rate(self) -> Rate:
        return self.deep_rate if self.depth == "deep" else self.default_rate
