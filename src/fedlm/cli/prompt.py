"""`fedlm prompt`: what a frozen model gets from text: the search for a prompt, and learning in context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlm.cli.output import print_json

if TYPE_CHECKING:
    from fedlm.federation.engines.choose import Choice
    from fedlm.messages import Event
    from fedlm.recipe.schema import Recipe

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
RunDirectory = Annotated[
    Path | None, typer.Option(help="Where the run goes; default: runs/NAME-TIME.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run in --run-dir.")]
SiloNames = Annotated[
    list[str] | None, typer.Option(help="A silo that takes part; repeatable; default: all.", show_default=False)
]
EngineName = Annotated[str, typer.Option(help="local or ray: what simulated silos run on.")]
Network = Annotated[
    Path | None, typer.Option(metavar="KIT", help="The coordinator's kit: silos are organisations.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        rich_markup_mode=None, no_args_is_help=True, help="Prompts that are text: no parameters travel."
    )
    group.command("search")(search)
    group.command("icl")(icl)
    app.add_typer(group, name="prompt")


def search(
    recipe: RecipeFile,
    run_dir: RunDirectory = None,
    resume: Resume = False,
    force: Force = False,
    silo: SiloNames = None,
    engine: EngineName = "local",
    network: Network = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Search a prompt: silos score candidates on their rows, the coordinator keeps the best and edits them.

    Sums of scores leave the silos, no text; an owner allows them with the verb 'score'.

    \b
    Examples:
      fedlm init prompt-search --out search.yaml
      fedlm prompt search search.yaml --run-dir runs/prompt
      fedlm prompt search search.yaml --run-dir runs/prompt --resume
    """
    from fedlm.federation.prompt_search import search_prompt

    loaded, where = _read(recipe, overrides, engine, network)
    found = search_prompt(
        loaded, base=recipe.parent, run_dir=run_dir, resume=resume, force=force, silos=silo, where=where,
        observe=None if as_json else _tell,
    )  # fmt: skip
    if as_json:
        print_json(
            {"prompt": found.prompt, "run": str(found.run_dir), "rounds": found.rounds, "validation": found.validation,
             "test": found.test}
        )  # fmt: skip
        return
    typer.echo(f"prompt: {found.prompt or '(none is better than every candidate)'}")
    words = {"none": "no prompt", "first": "the first candidate", "best": "this prompt"}
    for name, figures in found.test.items():
        typer.echo(f"{words[name]}: {_said(figures)} on {figures['rows']} test rows")
    typer.echo(f"in {found.run_dir / 'prompt.txt'}")


def icl(
    recipe: RecipeFile,
    run_dir: RunDirectory = None,
    resume: Resume = False,
    force: Force = False,
    silo: SiloNames = None,
    engine: EngineName = "local",
    network: Network = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Let silos answer questions from their own rows in context, and fuse their answers, round by round.

    Log-probabilities of choices leave the silos, no row; an owner allows them with the verb 'answer'.

    \b
    Examples:
      fedlm init in-context --out icl.yaml
      fedlm prompt icl icl.yaml --run-dir runs/icl
    """
    from fedlm.federation.in_context import answer_questions

    loaded, where = _read(recipe, overrides, engine, network)
    found = answer_questions(
        loaded, base=recipe.parent, run_dir=run_dir, resume=resume, force=force, silos=silo, where=where,
        observe=None if as_json else _tell,
    )  # fmt: skip
    if as_json:
        print_json(
            {
                "run": str(found.run_dir),
                "questions": found.questions,
                "rounds": found.rounds,
                "accuracy": found.accuracy,
            }
        )
        return
    accuracy = found.accuracy
    typer.echo(f"accuracy on {found.questions} questions after {found.rounds} round(s):")
    typer.echo(f"  without examples   {accuracy['zero_shot']['accuracy']:.3f}")
    typer.echo(f"  one silo alone     {accuracy['alone']:.3f} (mean of {len(accuracy['silos'])})")
    typer.echo(f"  together           {accuracy['fused']['accuracy']:.3f}")
    typer.echo(f"answers in {found.run_dir / 'answers.json'}")


def _read(file: Path, overrides: list[str] | None, engine: str, network: Path | None) -> tuple[Recipe, Choice]:
    from fedlm.federation.engines.choose import Choice
    from fedlm.recipe.load import load_recipe

    return load_recipe(file, overrides or []), Choice(engine, None, network)


def _tell(event: Event) -> None:
    if event["kind"] in ("prompt_round", "answers_round"):
        typer.echo(f"round {event['round']}/{event['rounds']}: {_said(event['score'])}", err=True)


def _said(figures: dict[str, float]) -> str:
    parts = [f"accuracy {figures['accuracy']:.3f}"] if "accuracy" in figures else []
    return ", ".join(parts + ([f"log-likelihood {figures['likelihood']:.3f}"] if "likelihood" in figures else []))
