"""`fedlm recipe memory`: what each kind of silo of a recipe would do of a round, and the memory that it needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlm.cli.output import print_json
from fedlm.errors import FedlmError

if TYPE_CHECKING:
    from fedlm.recipe.capacity import Capacity
    from fedlm.recipe.schema import Recipe

MB = 10**6


def memory(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)] = Path("recipe.yaml"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Override a field, e.g. training.max_length=256."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="Also plan for a silo with this much memory, e.g. 1.5GB; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Predict the memory of a silo's training process, and say what fits into the silos' budgets.

    The model is found (and downloaded if need be), its weights are not loaded.

    \b
    Examples:
      fedlm recipe memory recipe.yaml
      fedlm recipe memory recipe.yaml --budget 1.5GB --budget 2GB
      fedlm recipe memory recipe.yaml --set training.max_length=256 --json
    """
    from fedlm.recipe.capacity import Capacity
    from fedlm.recipe.load import load_recipe
    from fedlm.training.footprint import shape_of
    from fedlm.training.plan import MARGIN, make_plan, predict

    changes = [*(set_ or [])]
    loaded = load_recipe(recipe, changes)
    for amount in budget or []:  # checked as the recipe's own budgets are
        load_recipe(recipe, [*changes, f"federation.capacity.default.memory={amount}"])
    if loaded.adapter.kind != "lora":
        raise FedlmError(
            f"memory is predicted for LoRA, and this recipe trains '{loaded.adapter.kind}'", where="adapter.kind"
        )
    shape = shape_of(loaded)
    rows: list[dict[str, Any]] = []
    for label, capacity in [*kinds(loaded), *((f"--budget {b}", Capacity(memory=b)) for b in budget or [])]:
        row: dict[str, Any] = {"silos": label, "budget": capacity.memory}
        try:
            plan = make_plan(loaded, capacity, shape)
        except FedlmError as error:
            row["problem"] = error.sentence()
        else:
            parts = predict(loaded, shape, plan)
            row |= {"predicted": parts.total, "parts": asdict(parts), "plan": plan.fields(), "does": plan.words(shape)}
        rows.append(row)
    if as_json:
        print_json({"margin": MARGIN, "silos": rows})
    else:
        show(rows, MARGIN)
    if any("problem" in row for row in rows):
        raise typer.Exit(2)


def kinds(recipe: Recipe) -> list[tuple[str, Capacity]]:
    """Every capacity that a silo of the recipe may have, with whose it is."""
    spec = recipe.federation.capacity
    default = spec.default
    found = [("every silo" if not (spec.dealt or spec.silos) else "every other silo", default)]
    if spec.dealt:
        found = [(f"dealt, number {i + 1}", default.with_(capacity)) for i, capacity in enumerate(spec.dealt)]
    return found + [(name, default.with_(capacity)) for name, capacity in spec.silos.items()]


def show(rows: list[dict[str, Any]], margin: float) -> None:
    """The table for people."""
    parts = ("program", "weights", "adapter", "activations", "logits", "heap")
    wide = max(len(row["silos"]) for row in rows)
    typer.echo(f"Peak memory of a silo's training process on a CPU in MB, predicted within {margin:.0%}:")
    typer.echo(f"  {'':{wide}}  {'budget':>8} {'total':>7}   {' '.join(f'{part:>11}' for part in parts)}")
    for row in rows:
        start = f"  {row['silos']:{wide}}  {row['budget'] or '-':>8}"
        if "problem" in row:
            typer.echo(f"{start} {'-':>7}")
            continue
        figures = " ".join(f"{row['parts'][part] / MB:>11.0f}" for part in parts)
        typer.echo(f"{start} {row['predicted'] / MB:>7.0f}   {figures}")
    typer.echo("Of every round it does:")
    for row in rows:
        if "problem" in row:
            typer.secho(f"  {row['silos']:{wide}}  {row['problem']}", fg=typer.colors.RED, err=True)
        else:
            typer.echo(f"  {row['silos']:{wide}}  {row['does']}")
