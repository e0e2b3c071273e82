"""The command line: each verb parses, calls one story and prints."""

import atexit
import gc
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from ftune.console.documents import print_json
from ftune.errors import ExitCode, FtuneError, Interrupted, RunError, UserError

app = typer.Typer(
    help="Fine-tune language models from a recipe, and get the evidence that it worked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
TargetPath = Annotated[Path, typer.Argument(metavar="TARGET", help="A run, an adapter folder or a model folder.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to override.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.")]
Base = Annotated[str | None, typer.Option("--base", help="The base of an adapter: a folder or hub id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")]


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.yaml"),
    method: Annotated[str, typer.Option(help="The method to start with.")] = "lora",
    task: Annotated[str, typer.Option(help="chat, completion, text or classification.")] = "chat",
) -> None:
    """Write a commented starter recipe."""
    from ftune import folder, recipe
    from ftune.console.streams import note

    text = recipe.starter(method, task)
    if file.exists():
        raise UserError("this file exists already", str(file), "choose another name")
    folder.write_text(file, text)
    note(f"wrote {file}; next: ftune check {file}")


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema."""
    from ftune import recipe

    print_json(recipe.json_schema())


@app.command()
def methods(json: Json = False) -> None:
    """Print the table of methods."""
    from ftune.console.tables import print_methods
    from ftune.settings import ABILITIES, METHOD_NAMES

    rows = [
        {"name": n, "description": e.description, "papers": list(e.papers), "available": e.settings is not None}
        | {ability: getattr(e.abilities, ability) for ability in ABILITIES}
        for n, e in METHOD_NAMES.items()
    ]
    print_json({"methods": rows}) if json else print_methods(rows)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, json: Json = False) -> None:
    """The whole dry run, without training: every problem at once."""
    from ftune import recipe as recipes

    loaded = recipes.load(recipe, overrides or ())
    from ftune.console.checks import print_check
    from ftune.run import preview

    found = preview.check(loaded)
    print_json(found) if json else print_check(found)
    if found["problems"]:
        raise typer.Exit(ExitCode.USER_ERROR)


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int | None, typer.Option(min=1, help="How many: 3 unless told, 20 in HTML, all in JSON.")] = None,
    json: Json = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to look at in a browser.")] = None,
) -> None:
    """Show the exact tokens, labels and segments that training will see."""
    from ftune import recipe as recipes

    loaded = recipes.load(recipe, overrides or ())
    from ftune.console.inspection import print_inspection
    from ftune.report.inspection import write_inspection
    from ftune.run import preview

    found = preview.inspect(loaded, rows or (None if json else 20 if html else 3))
    if html:
        write_inspection(found, html, recipe.stem)
    if json:
        print_json(found)
    elif html is None:
        print_inspection(found)
    else:
        typer.echo(str(html))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: Annotated[str | None, typer.Option(help="Names with commas between, or all.")] = None,
    json: Json = False,
) -> None:
    """Parameters and memory, from the model's config.json alone."""
    from ftune import recipe as recipes

    loaded = recipes.load(recipe, overrides or ())
    from ftune.console.tables import print_plans
    from ftune.run import preview

    plans = preview.plan_methods(loaded, methods)
    if json:
        print_json({"plans": plans} if methods else plans[0])
    else:
        print_plans(plans)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train, save, verify, evaluate, report."""
    from ftune import recipe as recipes

    loaded = recipes.load(recipe, overrides or ())
    from ftune.run import training

    finish(training.train_run(loaded, resume, overwrite), loaded.output.dir, json)


@app.command("eval")
def evaluate(
    target: TargetPath,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="What to measure on, where TARGET is no run.")] = None,
    base: Base = None,
    json: Json = False,
) -> None:
    """Measure the task, the baselines and what was forgotten."""
    from ftune.run import afterwards, targets

    found = targets.resolve(target, base, recipe)
    finish(afterwards.evaluate_target(found), target if found.run else None, json)


@app.command()
def merge(
    target: TargetPath,
    output: Annotated[Path | None, typer.Option("--output", help="The folder to write.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="How much of the adapter: 1 is all of it.")] = 1.0,
    quantized: Annotated[
        bool,
        typer.Option("--quantized", help="Write it in the bits it was trained over; tells what is lost."),
    ] = False,
    base: Base = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fold the adapter into its base, proved equal, or refuse."""
    from ftune.console.checks import print_merge
    from ftune.run import afterwards, targets

    merged = afterwards.merge_target(targets.resolve(target, base), output, strength, overwrite, quantized)
    print_json(merged) if json else print_merge(merged)


@app.command()
def verify(target: TargetPath, base: Base = None, json: Json = False) -> None:
    """Prove a run, an adapter or a merged model again from its files."""
    from ftune.console.checks import print_checks
    from ftune.run import afterwards, targets

    found = afterwards.verify_target(targets.resolve(target, base))
    print_json(found) if json else print_checks(found)
    if not found["passed"]:
        raise typer.Exit(ExitCode.GATE_FAILED)


@app.command()
def generate(
    target: TargetPath,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 128,
    base: Base = None,
) -> None:
    """Answer one prompt, greedily."""
    from ftune.run import afterwards, targets

    typer.echo(afterwards.generate_from(targets.resolve(target, base), prompt, max_new_tokens))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    review: Annotated[
        Path | None, typer.Option("--review", help="Take the verdicts.json of its review sheet into the report.")
    ] = None,
) -> None:
    """Build report.md, report.html and review.html again from the run folder alone."""
    from ftune.run import reporting

    typer.echo(str(reporting.rebuild_report(run, review)))


def finish(document: dict[str, Any], path: Path | None, json: bool) -> None:
    """Print a report; a failed gate is exit code 1."""
    from ftune.console.summary import print_report

    print_json(document) if json else print_report(document, path)
    if not all(gate["passed"] for gate in document["gates"]):
        raise typer.Exit(ExitCode.GATE_FAILED)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    code = ExitCode.TERMINATED if number == signal.SIGTERM else ExitCode.INTERRUPTED
    raise Interrupted(f"stopped by {signal.Signals(number).name}", hint="run the command again", exit_code=code)


def unexpected(error: Exception) -> RunError:
    """A fault of ours, told as text: what it is and which line raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"unexpected {type(error).__name__}: {error}"
    return RunError(what, f"{place.filename}:{place.lineno}", "set FTUNE_TRACEBACK=1 to see more, and report it")


def fail(error: FtuneError) -> NoReturn:
    from ftune.console.streams import print_error

    print_error(error)
    sys.exit(error.exit_code)


def main() -> None:
    """The console script: errors become text and exit codes."""
    atexit.register(gc.freeze)  # a process that ends need not be searched for garbage: 6 % of a short answer
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except FtuneError as error:
        fail(error)
    except Exception as error:
        if "FTUNE_TRACEBACK" in os.environ:
            raise
        fail(unexpected(error))
