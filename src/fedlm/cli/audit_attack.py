"""`fedlm audit attack`: try attacks on a run or a recipe, by whoever has the rows, and write down what came of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlm.cli.output import plain, print_json
from fedlm.errors import FedlmError, RecipeError, RunError, nearest

if TYPE_CHECKING:
    from fedlm.attacks.trial import Trial, Tried
    from fedlm.data.federated import FederatedData
    from fedlm.federation.rundir import RunDir
    from fedlm.messages import Observe
    from fedlm.recipe.schema import Recipe

LINE = 500
"""Characters of a line that is shown."""
NEEDS_A_RUN = ("membership", "extraction")


@dataclass(frozen=True)
class _Target:
    """What is attacked, and the rows that show how well.

    Attributes:
        recipe: with the rows' own description in it; `asked` is the recipe as it was given.
        base: the folder that relative paths start from.
        run: the finished run; None of a recipe.
        silos: whose rows are here.
    """

    recipe: Recipe
    asked: Recipe
    base: Path
    data: FederatedData
    run: RunDir | None
    silos: list[str]


def attack(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|RECIPE", help="A finished run, or a recipe.", show_default=False)
    ],
    attacks: Annotated[
        str, typer.Option(metavar="A,B", help="Which: dager, membership, extraction, canaries.")
    ] = "dager,membership,extraction",
    rows: Annotated[int, typer.Option(min=10, help="Rows that were trained on, and others, at most.")] = 200,
    canaries: Annotated[
        int, typer.Option(min=100, max=500, help="With the attack canaries: how many, half of which are planted.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Chooses rows, and draws canaries.")] = 0,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="A silo's own rows: the file of `fedlm silo data`.", show_default=False),
    ] = None,
    silo: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --data: the silo's name.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write; default: attacks.json of the run.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Try attacks on a run or a recipe, each beside a configuration that it must beat and a baseline.

    It needs the rows: of a simulation, or with --data a silo's own. On a recipe: which tokens an update of round 0
    tells (dager). On a finished run also whether its model tells members from others (membership) or writes rows that
    it is shown the beginning of (extraction). With canaries a simulated copy of the run is trained with made-up secrets
    in it, which takes as long as the run. Only figures are written, no text; `fedlm audit` shows them.

    \b
    Examples:
      fedlm audit attack runs/news
      fedlm audit attack news.yaml --out news.attacks.json
      fedlm audit attack runs/news --attacks canaries --canaries 200
      fedlm audit attack runs/news --data data.yaml --silo hospital-a
    """
    from fedlm.attacks.trial import FILE, Tried, read_tried
    from fedlm.recipe.load import recipe_hash
    from fedlm.report.progress import Progress

    wanted = _wanted(attacks)
    found_here: list[Trial] = []
    left_out: dict[str, str] = {}
    with Progress(silent=as_json) as progress:
        progress({"kind": "phase", "text": "reading the data"})
        case = _target(target, data, silo)
        file = out or (target / FILE if case.run is not None else None)
        digest = recipe_hash(case.asked)
        tried = Tried(digest) if file is None else read_tried(file, digest)
        for names, work in _work(case, wanted, rows, canaries, seed):
            try:
                trials, without = work(progress)
            except FedlmError as error:
                trials, without = [], dict.fromkeys(names, error.what)
            found_here += trials
            left_out |= without
            tried = tried.with_more(trials, without)
            if file is not None and found_here:  # what took long stays, whatever becomes of the rest
                tried.write(file)
    if not found_here:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise RunError(f"no attack could be tried: {reasons}", where=str(target))
    page = None
    if case.run is not None and file == target / FILE:
        from fedlm.report.audit import audit_of, write_audit

        page = write_audit(target, audit_of(target))
    if as_json:
        print_json({**tried.as_json(), "file": None if file is None else str(file)})
        return
    show_tried(tried)
    for written in (file, page):
        if written is not None:
            typer.echo(f"Wrote {written}")


def show_tried(tried: Tried) -> None:
    """The trials by configuration, and what was not tried."""
    from fedlm.report.tried import MEANING, notes, rows, sentence

    typer.echo(sentence(tried))
    above = None
    for attack, where, of, figure, words, success, baseline in rows(tried):
        if (attack, where) != above:
            typer.echo(f"\n{attack} on {plain(where, LINE)} ({of})")
            above = attack, where
        typer.echo(f"  {plain(figure)}: {success}, baseline {baseline}: {words}")
    if tried.trials:
        typer.echo(f"\n{MEANING}")
    for line in notes(tried):
        typer.echo(f"- {plain(line, LINE)}")
    typer.echo("Not tried:")
    for name, why in tried.not_tried().items():
        typer.echo(f"- {plain(name)}: {plain(why, LINE)}")


def _wanted(attacks: str) -> list[str]:
    from fedlm.attacks.trial import ATTACKS

    names = [name.strip() for name in attacks.split(",") if name.strip()]
    for name in names:
        if name not in ATTACKS:
            raise RunError(f"there is no attack '{name}'", where="--attacks", fix=nearest(name, ATTACKS))
    if not names:
        raise RunError("no attack is named", where="--attacks", fix=f"choose among {', '.join(ATTACKS)}")
    return [name for name in ATTACKS if name in names]


def _target(target: Path, data: Path | None, silo: str | None) -> _Target:
    """What the command is about, with rows.

    Raises:
        FedlmError: there is no such run or recipe, the run has not finished, or its rows are not here.
    """
    from fedlm.data.federated import load_data
    from fedlm.federation.api import same_data
    from fedlm.federation.rundir import RunDir
    from fedlm.recipe.load import load_recipe

    if (data is None) != (silo is None):
        raise RunError("--data and --silo belong together", fix="give a silo's data file, and its name in the network")
    run = None
    if target.is_dir():
        run = RunDir.open(target, write=False)
        recipe, base = load_recipe(target / "recipe.yaml"), Path(str(run.meta.get("base") or "."))
        if run.meta["status"] != "finished":
            raise RunError(
                f"this run has not finished (it is {run.meta['status']}), so there is no final model to attack",
                where=str(target),
                fix=f"finish it: fedlm run --resume {target}; or attack its recipe: {target / 'recipe.yaml'}",
            )
    else:
        recipe, base = load_recipe(target), target.parent
    if recipe.search is not None or recipe.in_context is not None:
        raise RunError("nothing is trained here, and these attacks are on what is trained", where=str(target))
    if data is not None and silo is not None:
        own, rows, folder = _own_rows(recipe, data, silo)
        return _Target(own, recipe, folder, rows, run, [silo])
    if recipe.data.at_silos or (run is not None and run.meta.get("network")):
        raise RunError(
            "the rows are at the silos and not here: without them dager cannot make a silo's update, and neither "
            "membership nor extraction can be judged, which ask of rows that were trained on and of rows that were not",
            where=str(target),
            fix="let a silo's owner run it with --data DATA --silo NAME, or attack a simulation of the recipe",
        )
    rows = load_data(recipe, base)
    if run is not None:
        same_data(run, rows)
    return _Target(recipe, recipe, base, rows, run, rows.names)


def _own_rows(recipe: Recipe, file: Path, silo: str) -> tuple[Recipe, FederatedData, Path]:
    """The recipe with a silo's own text, that text, and the folder that its paths start from."""
    from fedlm.federation.silo.holdings import load_holdings
    from fedlm.federation.silo.refusals import Forbidden

    text = load_holdings(file)
    try:
        own = text.recipe_for(recipe, silo)
        return own, text.load(own, silo), text.base
    except Forbidden as reason:
        raise RecipeError(str(reason), where=str(file)) from None


def _work(
    case: _Target, wanted: list[str], rows: int, canaries: int, seed: int
) -> Iterator[tuple[list[str], Callable[[Observe], tuple[list[Trial], dict[str, str]]]]]:
    """The attacks that are asked for, those together that share what they need."""
    if "dager" in wanted:
        yield ["dager"], lambda observe: (_dager(case, seed, observe), {})
    if of_run := [name for name in wanted if name in NEEDS_A_RUN]:
        yield of_run, lambda observe: _on_model(case, of_run, rows, seed, observe)
    if "canaries" in wanted:
        yield ["canaries"], lambda observe: (_planted(case, canaries, seed, observe), {})


def _dager(case: _Target, seed: int, observe: Observe) -> list[Trial]:
    from fedlm.attacks.token_recovery import token_trials

    return token_trials(case.recipe, case.data, case.base, seed=seed, observe=observe)


def _on_model(
    case: _Target, attacks: list[str], rows: int, seed: int, observe: Observe
) -> tuple[list[Trial], dict[str, str]]:
    from fedlm.attacks.final_model import model_trials
    from fedlm.federation.start import held_start
    from fedlm.inference.session import run_tensors

    if case.run is None:
        return [], dict.fromkeys(attacks, "needs a finished run: it attacks the final model")
    tensors, _ = run_tensors(case.run.path)
    start = held_start(case.run, case.recipe)
    used = _rounds_used(case.run, case.silos)
    return model_trials(
        case.recipe, case.data, tensors, start, used, attacks=attacks, rows=rows, seed=seed, observe=observe
    )


def _rounds_used(run: RunDir, silos: list[str]) -> dict[str, list[int]]:
    """By silo, the rounds whose updates are in the final model, which is the best round's.

    Raises:
        RunError: none of these silos' is.
    """
    best = run.meta.get("best_round")
    found: defaultdict[str, list[int]] = defaultdict(list)
    for line in run.iterate_rounds():
        if line["round"] >= 0 and (best is None or line["round"] <= best):
            for silo in line.get("replied") or []:
                if silo in silos:
                    found[silo].append(int(line["round"]))
    if not found:
        raise RunError("no update of these silos is in the final model", where=str(run.path))
    return dict(found)


def _planted(case: _Target, canaries: int, seed: int, observe: Observe) -> list[Trial]:
    from fedlm.attacks.planted import canary_trials

    return canary_trials(case.recipe, case.data, case.base, canaries=canaries, seed=seed, observe=observe)
