"""One settings class per objective."""

from typing import ClassVar, Literal

from pydantic import Field

from ftune.settings.fields import Settings


class ObjectiveSettings(Settings):
    rate_share: ClassVar[float] = 1.0
    """What part of a method's default learning rate suits it; docs/methods.md has the measurements."""

    name: str


class SftSettings(ObjectiveSettings):
    name: Literal["sft"] = Field("sft", description="supervised fine-tuning: predict the answer's tokens")


class ClassificationSettings(ObjectiveSettings):
    rate_share = 0.2  # a step sees one label a row: its gradient is noisier than that of whole answers

    name: Literal["classification"] = Field("classification", description="a label for each text")
