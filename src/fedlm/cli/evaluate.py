"""`fedlm eval`: measure a run's adapter, or a recipe's base model, on the silos' held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlm.cli.output import print_json
from fedlm.errors import RecipeError, RunError

if TYPE_CHECKING:
    from fedlm.messages import Tensors
    from fedlm.recipe.schema import Recipe


Target = Annotated[
    Path, typer.Argument(metavar="RUN|RECIPE", help="A run directory, or a recipe with --base.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; repeatable.")
]
Base = Annotated[bool, typer.Option("--base", help="Measure the base model instead of what was trained.")]
Round = Annotated[str | None, typer.Option("--round", help="best, last or a number; default: the run's adapter.")]
"""Which model is measured: what `resolve` takes."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    target: Target,
    overrides: Overrides = None,
    base: Base = False,
    role: Annotated[str, typer.Option(help="Which held-out rows: test or validation.")] = "test",
    round_: Round = None,
    items: Annotated[bool, typer.Option("--items", help="With --json: every row's result, without its text.")] = False,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Run these lm-eval tasks instead, e.g. arc_easy,piqa.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --harness: examples per task.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that measure silos side by side.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a run's model on held-out text of all silos: loss, accuracy, and how evenly they are spread.

    \b
    Examples:
      fedlm eval runs/news
      fedlm eval runs/news --role validation --round last
      fedlm eval recipe.yaml --base
      fedlm eval runs/news --harness arc_easy --limit 100
    """
    if role not in ("test", "validation"):
        raise RunError(f"'{role}' is no held-out role", where="--role", fix="test or validation")
    from fedlm.federation.start import whole_model

    recipe, tensors, name = resolve(target, overrides or [], base, round_)
    if harness is not None:
        result: dict[str, Any] = {"model": name, "harness": _harness(recipe, tensors, harness, limit)}
    else:
        message = whole_model(tensors, _start(target, recipe))
        folder = _data_folder(target)
        result = {"model": name, "role": role, **_on_silos(recipe, folder, message, role, items, workers, as_json)}
    if as_json:
        print_json(result)
    elif harness is not None:
        for task, values in result["harness"].items():
            typer.echo(f"{task}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
    else:
        tell(result)


def resolve(target: Path, overrides: list[str], base: bool, round_: str | None) -> tuple[Recipe, Tensors, str]:
    """The recipe, what to measure, and its name.

    Raises:
        RecipeError, RunError: no such run or recipe, a damaged run.json, or nothing trained to measure.
    """
    from fedlm.inference.session import is_run, run_recipe, run_tensors
    from fedlm.recipe.load import load_recipe

    if target.is_dir() or is_run(target):
        run = run_recipe(target)
        recipe = load_recipe(target / "recipe.yaml", overrides) if overrides else run
        if not base:
            tensors, which = run_tensors(target, round_)
            return recipe, tensors, f"{target}, {which}"
    else:
        recipe = load_recipe(target, overrides)
        if not base:
            raise RecipeError(
                "a recipe has no trained model to measure",
                where=str(target),
                fix="add --base for the base model, or name a run directory",
            )
    from fedlm.models.adapters import base_tensors

    return recipe, base_tensors(recipe), "base model"


def _start(target: Path, recipe: Recipe) -> Tensors:
    """What a run starts from, for tasks that compare with it; nothing for a recipe."""
    from fedlm.federation.rundir import RunDir
    from fedlm.federation.start import held_start

    return held_start(RunDir.open(target, write=False), recipe) if (target / "run.json").is_file() else {}


def _data_folder(run: Path) -> Path:
    """The folder that the relative paths of a run's recipe, or of a recipe's file, start from; RunError when run.json
    is damaged."""
    from fedlm.federation.rundir import RunDir

    if run.is_file():
        return run.parent
    if not (run / "run.json").is_file():
        return Path()
    base = RunDir.open(run, write=False).meta.get("base")
    if not isinstance(base, str):
        raise RunError("run.json does not say which folder the data's paths start from", where=str(run / "run.json"))
    return Path(base)


def _on_silos(
    recipe: Recipe, folder: Path, tensors: Tensors, role: str, items: bool, workers: int | None, silent: bool
) -> dict[str, Any]:
    """The summary over all silos' rows of this role; with `items` each silo's rows under "items"."""
    import tempfile

    from fedlm.comparison.measuring import measure_on_silos
    from fedlm.data.federated import load_data
    from fedlm.evaluation import summarise
    from fedlm.federation.engines.local import LocalEngine, resolve_workers
    from fedlm.recipe.privacy import withheld
    from fedlm.report.progress import Progress

    # all silos' rows lie here, and whoever reads the figures could read the rows: nothing needs to be hidden
    if withheld(recipe) and not silent:
        typer.echo("The run let no figure leave a silo. These are of rows that lie here, outside its budget.", err=True)
    opened = recipe.privacy and recipe.privacy.model_copy(update={"figures": "open"})
    recipe = recipe.model_copy(update={"guards": [], "privacy": opened})
    spec = recipe.federation if workers is None else recipe.federation.model_copy(update={"workers": workers})
    with Progress(silent=silent) as progress, tempfile.TemporaryDirectory(prefix="fedlm-eval-") as scratch:
        progress({"kind": "phase", "text": "reading the data"})
        data = load_data(recipe, folder)
        holders = [name for name in data.names if len(getattr(data.silo(name), role))]
        if not holders:
            raise RunError(f"no silo holds a {role} row", where="data.split", fix=f"raise data.split.{role}")
        count = resolve_workers(spec, len(holders), recipe.model.device)
        engine = LocalEngine(recipe, data, Path(scratch), workers=count, observe=progress, base=folder)
        try:
            progress({"kind": "phase", "text": f"measuring on the {role} rows of {len(holders)} silos"})
            measured = measure_on_silos(engine, holders, tensors, role=role, run="eval", items=items)
        finally:
            engine.close()
    summary = summarise(measured)
    return {**summary, "items": {silo: m.get("items", {}) for silo, m in measured.items()}} if items else summary


def _harness(recipe: Recipe, tensors: Tensors, tasks: str, limit: int | None) -> dict[str, Any]:
    from fedlm.evaluation.harness import run_harness
    from fedlm.recipe.tasks import TASKS

    model, tokenizer = with_adapter(recipe, tensors)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return run_harness(model, tokenizer, names, limit=limit, chat=TASKS[recipe.task].template)


def with_adapter(recipe: Recipe, tensors: Tensors) -> tuple[Any, Any]:
    """The recipe's model with these values, in evaluation mode, and its tokenizer."""
    from fedlm.models.adapters import attach, set_tensors
    from fedlm.models.load import load_base, load_tokenizer
    from fedlm.recipe.heads import outputs_of

    model = attach(load_base(recipe.model), recipe.adapter, recipe.seed, outputs_of(recipe))
    set_tensors(model, tensors, recipe.adapter)
    model.eval()
    return model, load_tokenizer(recipe.model)


def tell(result: dict[str, Any]) -> None:
    """The figures over all silos, and a row per silo where they are few."""
    from rich.console import Console
    from rich.table import Table

    from fedlm.report.format import METRICS, count, metric, metric_name

    console = Console(highlight=False)
    keys = [key for key in METRICS if key in result]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("rows", justify="right")
    for key in keys:
        table.add_column(metric_name(key), justify="right")
    silos = result["silos"]
    for name, values in silos.items() if len(silos) <= 20 else ():
        table.add_row(name, count(values["examples"]), *[metric(key, values.get(key)) for key in keys])
    table.add_row("all silos", count(result["examples"]), *[metric(key, result[key]) for key in keys], style="bold")
    console.print(f"{result['model']} on {result['role']} rows", soft_wrap=True)
    console.print(table)
    for key in keys:
        if interval := result.get(f"{key}_interval"):
            low, high = (metric(key, bound) for bound in interval)
            console.print(f"{metric_name(key)}: 95 % interval {low} to {high}", style="dim")
        if (spread := result["fairness"].get(key)) and len(silos) > 1:
            worst = f"worst {metric(key, spread['worst'])} ({spread['worst_silo']})"
            console.print(
                f"{metric_name(key)} over silos: mean {metric(key, spread['mean'])}, {worst}, "
                f"variance {spread['variance']:.2g}",
                style="dim",
            )
