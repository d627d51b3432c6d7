"""`fedlm network demo`: a recipe simulated, and over a network on this machine, compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.output import print_json
from fedlm.errors import NetworkError


def demo(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe that simulates silos; the demo's if not given.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for kits, logs and the two runs.")] = Path("runs/network-demo"),
    namespaces: Annotated[
        str, typer.Option(metavar="auto|yes|no", help="Put each party into a network namespace (Linux, root).")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a recipe with simulated silos, then over a network on this machine, and compare the adapters bit for bit.

    The coordinator and every silo are processes of their own with mutual TLS, started by the commands that real parties
    use. All keys are made in one place, so use it with nothing but demonstrations.

    \b
    Examples:
      fedlm network demo
      fedlm network demo recipe.yaml --out runs/rehearsal
    """
    from fedlm.federation.engines.flare.demo import rehearse, run_fedlm, silos_of
    from fedlm.federation.engines.flare.namespaces import possible
    from fedlm.federation.engines.flare.tools import need_nvflare
    from fedlm.models.processor import for_this_machine
    from fedlm.recipe.load import dump_recipe, load_recipe
    from fedlm.recipe.starters import read_template

    need_nvflare()
    if namespaces not in ("auto", "yes", "no"):
        raise NetworkError(f"'{namespaces}' is not auto, yes or no", where="--namespaces")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if recipe is None:
        recipe = out / "recipe.yaml"
        recipe.write_text(for_this_machine(read_template("news")))
        recipe.write_text(dump_recipe(load_recipe(recipe, ["data.partition.silos=3", "federation.rounds=2"])))
    found = load_recipe(recipe)
    models = [here for here in (found.model.source, found.model.tokenizer) if here and Path(here).exists()]
    apart = namespaces == "yes" or (namespaces == "auto" and possible())

    def say(text: str) -> None:
        typer.secho(f"== {text}", bold=True, err=True)

    say("reading the data")
    result = rehearse(recipe, silos_of(found, recipe.parent), models, out, apart, say, run_fedlm)
    local, network = result.local, result.network
    if as_json:
        print_json({"same": result.same, "namespaces": apart, "local": local, "network": network})
    else:
        typer.echo(f"\n{'':<12}{'rounds':>8}{'seconds':>10}{'MB up':>8}{'MB down':>9}  adapter (SHA-256)")
        for name, run in (("simulated", local), ("network", network)):
            mega = f"{run['bytes_up'] / 1e6:>8.1f}{run['bytes_down'] / 1e6:>9.1f}"
            typer.echo(f"{name:<12}{run['rounds']:>8}{run['seconds']:>10.1f}{mega}  {run['sha256']}")
        typer.echo()
    if not result.same:
        raise NetworkError("the two runs did not end in the same adapter", where=str(out))
    if not as_json:
        typer.secho("The same adapter, bit for bit.", fg=typer.colors.GREEN)
