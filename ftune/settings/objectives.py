"""One settings class per objective."""

from typing import Literal

from pydantic import Field

from ftune.settings.fields import Settings


class ObjectiveSettings(Settings):
    name: str


class SftSettings(ObjectiveSettings):
    name: Literal["sft"] = Field("sft", description="supervised fine-tuning: predict the answer's tokens")


class ClassificationSettings(ObjectiveSettings):
    name: Literal["classification"] = Field("classification", description="a label for each text")
