"""What answers are scored by and compared with, checked before anything is loaded: metric, function, previous run."""

from collections.abc import Sequence
from pathlib import Path

from ftune import evaluate
from ftune.data import MAX_SHOWN, Dataset, Example, label_of
from ftune.errors import Problem, UserError
from ftune.evaluate import TOKEN_METRICS, FunctionMetric, Previous, function, previous
from ftune.evaluate.metrics import NO_JSON, read_json
from ftune.folder import RunFolder
from ftune.recipe import Recipe
from ftune.run.datasets import is_classification
from ftune.settings import function_parts, is_function


def metric_name(metric: str) -> str:
    """As reports call it: a function by its file's name, without the folder."""
    if not is_function(metric):
        return metric
    path, name = function_parts(metric)
    return f"{path.name}:{name}"


def function_of(recipe: Recipe) -> FunctionMetric | None:
    """The function that the recipe's metric names; its file is run here, for the first time."""
    if is_classification(recipe) or not is_function(recipe.evaluation.metric):
        return None
    return function.load(*function_parts(recipe.evaluation.metric))


def check_answers(recipe: Recipe, test: Dataset | None, own: FunctionMetric | None) -> FunctionMetric | None:
    """Try the metric on the expected answers: json_match needs them to be JSON; the user's function, returned with
    its rows, must score the first one, and an empty answer to it, as a model may give."""
    if test is None or not all(map(evaluate.has_answer, test.examples)):
        return own
    if recipe.evaluation.metric == "json_match":
        check_json(test.examples)
    if own is None:
        return None
    assert isinstance(recipe.data.test, Path)
    own = own.with_rows(recipe.data.test)
    first = test.examples[0]
    for answer in (evaluate.expected(first), ""):
        own(first, answer)
    return own


def check_json(examples: Sequence[Example]) -> None:
    """An expected answer that is no JSON would be wrong whatever a model answers."""
    broken = [example.row_id for example in examples if read_json(evaluate.expected(example)) is NO_JSON]
    what, hint = "the expected answer is not JSON", "correct the row, or use exact_match"
    problems = [Problem(what, f"data.test (row {row_id})", hint) for row_id in broken[:MAX_SHOWN]]
    if len(broken) > MAX_SHOWN:
        problems.append(Problem(f"and {len(broken) - MAX_SHOWN} more rows without JSON", "data.test"))
    if problems:
        raise UserError.collect(problems)


def previous_of(recipe: Recipe, test: Dataset | None, own: FunctionMetric | None) -> Previous | None:
    """The previous run's answers and scores in the order of the test rows."""
    settings = recipe.evaluation
    if settings.previous is None:
        return None
    problems = []
    if recipe.data.test is None:
        problems.append(Problem("there is no test set to compare on", previous.KEY, "name one with data.test"))
    if settings.metric in TOKEN_METRICS:
        what = f"a run measured by {settings.metric} keeps no answers to compare with, item by item"
        problems.append(Problem(what, previous.KEY, "use a metric of answers, or set it to null"))
    if settings.previous.resolve() == recipe.output.dir.resolve():
        problems.append(Problem("this is the run itself, output.dir", previous.KEY, "name another run"))
    if problems:
        raise UserError.collect(problems)
    if test is None or not (is_classification(recipe) or all(map(evaluate.has_answer, test.examples))):
        return None
    items = [_item(example, is_classification(recipe)) for example in test.examples]
    sha256 = own.sha256 if own is not None else None
    return previous.read(RunFolder(settings.previous), metric_name(settings.metric), sha256, items)


def _item(example: Example, is_labelled: bool) -> tuple[str, str]:
    """Prompt and expected answer, as samples.jsonl has them."""
    if is_labelled:
        return example.text, label_of(example)
    return evaluate.prompt_text(example), evaluate.expected(example)
