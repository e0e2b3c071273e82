"""The command line: each verb parses, calls one story and prints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ftune.console.documents import print_json
from ftune.errors import ExitCode, UserError
from ftune.quantities import numbers

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
Force = Annotated[
    bool, typer.Option("--force", help="Go on with another base than was trained on; it is told and recorded.")
]
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
def schema(
    report: Annotated[bool, typer.Option("--report", help="Of report.json instead of the recipe.")] = False,
) -> None:
    """Print the JSON Schema of the recipe, or of report.json."""
    from ftune import recipe
    from ftune.report.schema import report_schema

    print_json(report_schema() if report else recipe.json_schema())


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

    document = training.train_run(loaded, resume, overwrite)
    if document is not None:
        finish(document, loaded.output.dir, json)


@app.command()
def compare(
    recipe: RecipePath,
    methods: Annotated[str, typer.Option(help='For example "lora, {name: lora, rank: 4}, ia3", or all.')],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each method, counted from the recipe's.")] = 1,
    output: Annotated[Path | None, typer.Option("--output", help="The folder of all runs and of the result.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what has finished, go on with the rest.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run the recipe with several methods and seeds, and set them side by side."""
    from ftune.console.sweep import print_sweep
    from ftune.run import compare as comparisons
    from ftune.run.variants import Call

    call = Call(recipe, tuple(overrides or ()), methods, seeds, output, resume, overwrite)
    document = comparisons.compare_methods(call)
    print_json(document) if json else print_sweep(document)
    raise typer.Exit(document["exit_code"])


@app.command("eval")
def evaluate(
    target: TargetPath,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="What to measure on, where TARGET is no run.")] = None,
    strengths: Annotated[
        str | None, typer.Option("--strengths", help="Also measure these shares of it: 0,0.25,0.5,0.75,1.")
    ] = None,
    base: Base = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Measure the task, the baselines and what was forgotten."""
    from ftune.run import afterwards, targets

    at = numbers(strengths, "--strengths")
    found = targets.resolve(target, base, recipe, force)
    finish(afterwards.evaluate_target(found, at), target if found.run else None, json)


@app.command()
def merge(
    targets: Annotated[list[Path], typer.Argument(metavar="TARGET...", help="One run or adapter folder, or several.")],
    output: Annotated[Path | None, typer.Option("--output", help="The folder to write.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="How much of the adapter: 1 is all of it.")] = 1.0,
    weights: Annotated[str | None, typer.Option("--weights", help="Of several: how much of each, 0.7,0.3.")] = None,
    combine: Annotated[str | None, typer.Option("--combine", help="Of several: linear, ties or dare.")] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="The share that is kept: 0.2 by ties, 0.5 by dare.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what dare drops at random: 0.")] = None,
    quantized: Annotated[
        bool,
        typer.Option("--quantized", help="Write it in the bits it was trained over; tells what is lost."),
    ] = False,
    base: Base = None,
    force: Force = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fold one adapter into its base, proved equal, or several at once; or refuse."""
    from ftune.console.merges import print_combination, print_merge
    from ftune.run import afterwards, combination
    from ftune.run.targets import resolve

    how = combination.asked_for(len(targets), weights, combine, density, seed)
    found = [resolve(target, base, is_forced=force) for target in targets]
    if how is None:
        merged = afterwards.merge_target(found[0], output, strength, overwrite, quantized)
    else:
        combination.refuse_for_several(strength=strength != 1.0, quantized=quantized)
        merged = combination.merge_several(found, output, how, overwrite)
    if json:
        print_json(merged)
    else:
        print_merge(merged) if how is None else print_combination(merged)


@app.command()
def verify(
    target: TargetPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="TARGET is a recipe: prove that a killed run goes on to the same bytes.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", help="With --resume: how many steps are trained.")] = 4,
    base: Base = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Prove a run, an adapter or a merged model again from its files; or a recipe's exact resume."""
    from ftune.console.checks import print_checks
    from ftune.run import resume_proof, targets, verifying

    if resume:
        found = resume_proof.prove_resume(target, overrides or [], steps)
    elif overrides:
        raise UserError("keys are overridden in a recipe only", overrides[0], "leave it out, or add --resume")
    else:
        found = verifying.verify_target(targets.resolve(target, base, is_forced=force))
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
    from ftune.console.streams import print_text
    from ftune.run import afterwards, targets

    print_text(afterwards.generate_from(targets.resolve(target, base), prompt, max_new_tokens))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run's folder; several are compared.")],
    output: Annotated[Path | None, typer.Option("--output", help="A page of the comparison, .html or .md.")] = None,
    review: Annotated[
        Path | None, typer.Option("--review", help="Take the verdicts.json of a run's review sheet into its report.")
    ] = None,
    json: Json = False,
) -> None:
    """Build a run's report again from its folder alone, or compare several runs."""
    if len(runs) > 1:
        from ftune.console.comparison import print_comparison
        from ftune.report import comparison

        if review is not None:
            raise UserError("verdicts are about one run", "--review", "name that run alone")
        document, told = comparison.compare_runs(runs, output)
        print_json(document) if json else print_comparison(document, told, output)
        return
    if output is not None:
        raise UserError("a single run's pages lie in its folder", "--output", "name the runs to compare it with")
    from ftune import folder
    from ftune.run import reporting

    page = reporting.rebuild_report(runs[0], review)
    print_json(folder.read_json(page.with_name("report.json"))) if json else typer.echo(str(page))


def finish(document: dict[str, Any], path: Path | None, json: bool) -> None:
    """Print a report; a failed gate is exit code 1."""
    from ftune.console.summary import print_report

    print_json(document) if json else print_report(document, path)
    if not all(gate["passed"] for gate in document["gates"]):
        raise typer.Exit(ExitCode.GATE_FAILED)
