"""The recipe: what users write, checked; what the rest of ftune reads."""

from ftune.recipe.loading import Change, changes, differences, dump, load
from ftune.recipe.schema import (
    DataFile,
    DataSection,
    EvaluationSection,
    GatesSection,
    HarnessProbe,
    HubDataset,
    ModelSection,
    OutputSection,
    Recipe,
    TrainingSection,
)
from ftune.recipe.writing import documentation, json_schema, starter

__all__ = [
    "Change",
    "DataFile",
    "DataSection",
    "EvaluationSection",
    "GatesSection",
    "HarnessProbe",
    "HubDataset",
    "ModelSection",
    "OutputSection",
    "Recipe",
    "TrainingSection",
    "changes",
    "differences",
    "documentation",
    "dump",
    "json_schema",
    "load",
    "starter",
]
