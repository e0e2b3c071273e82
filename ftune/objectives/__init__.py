"""The objectives, by the name a recipe calls them: each says what a micro-batch's loss is."""

from typing import cast

from ftune.objectives import classification, sft
from ftune.objectives.base import Objective

OBJECTIVES: dict[str, Objective] = {
    "sft": cast(Objective, sft),
    "classification": cast(Objective, classification),
}
