"""What a run's recipe.yaml says to the pages. Where it is missing or broken, the defaults hold."""

from typing import Any

import yaml

from ftune.recipe import EvaluationSection
from ftune.recipe.document import MAX_BYTES


def is_classifier(recipe: str | None) -> bool:
    """Whether the run learned labels, of which every row has one."""
    objective = _sections(recipe).get("objective")
    return (objective.get("name") if isinstance(objective, dict) else objective) == "classification"


def review_count(recipe: str | None) -> int:
    """How many outputs the review sheet is to show; 0 is none."""
    evaluation = _sections(recipe).get("evaluation")
    count = evaluation.get("review") if isinstance(evaluation, dict) else None
    return count if isinstance(count, int) and count >= 0 else int(EvaluationSection.model_fields["review"].default)


def _sections(recipe: str | None) -> dict[str, Any]:
    try:
        sections = yaml.safe_load(recipe or "") if len(recipe or "") <= MAX_BYTES else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return sections if isinstance(sections, dict) else {}
