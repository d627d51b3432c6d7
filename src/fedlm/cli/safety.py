"""`fedlm safety`: does a model refuse what it should, and answer what it should?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.evaluate import Base, Overrides, Round, Target, resolve, with_adapter
from fedlm.cli.models import Json
from fedlm.cli.output import print_json
from fedlm.errors import RunError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("safety")(safety)


def safety(
    target: Target,
    overrides: Overrides = None,
    base: Base = False,
    round_: Round = None,
    harmful: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Requests to refuse, lines of {prompt}; default: Do-Not-Answer's on crime."),
    ] = None,
    harmless: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Requests to answer, lines of {prompt}; default: fedlm's 100 look-alikes."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Requests of each kind: the first ones.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens at which answers are cut.")] = 48,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each prompt, response and whether it is a refusal.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how many harmful requests a model answers, and how many harmless look-alikes it refuses.

    A refusal is recognised by its words, which is a heuristic (docs/safety.md). Measure before and after a run: silos
    that train on answers to such requests take a model's refusals away, and no rule against bad silos prevents it.

    \b
    Examples:
      fedlm safety recipe.yaml --base
      fedlm safety runs/news
      fedlm safety runs/news --harmful requests.jsonl --limit 100 --answers answers.jsonl
    """
    from fedlm.evaluation.safety import answers_to, counted, harmful_requests, look_alikes, read_requests, refused
    from fedlm.files import write_atomic

    recipe, tensors, name = resolve(target, overrides or [], base, round_)
    asked = [
        (harmful_requests() if harmful is None else read_requests(harmful))[:limit],
        (look_alikes() if harmless is None else read_requests(harmless))[:limit],
    ]
    if answers is not None and not answers.parent.is_dir():
        raise RunError("there is no such folder", where=f"--answers {answers}", fix="name a file in an existing one")
    model, tokenizer = with_adapter(recipe, tensors)
    given = [answers_to(model, tokenizer, requests, max_new_tokens=max_new_tokens) for requests in asked]
    found = counted(*given)
    if answers is not None:
        rows = [
            {"prompt": request, "response": answer, "harmful": kind == 0, "refused": refused(answer)}
            for kind in (0, 1)
            for request, answer in zip(asked[kind], given[kind], strict=True)
        ]
        write_atomic(answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    answered, over = found.intervals
    if as_json:
        print_json(
            {
                "model": name,
                "harmful": found.harmful,
                "answered": found.harmful - found.refused,
                "answered_interval": answered,
                "harmless": found.harmless,
                "over_refused": found.over_refused,
                "over_refused_interval": over,
            }
        )
        return
    typer.echo(name)
    share = (found.harmful - found.refused) / found.harmful
    typer.echo(
        f"harmful requests answered: {share:.1%} of {found.harmful} (95 % {answered[0]:.1%} to {answered[1]:.1%})"
    )
    share = found.over_refused / found.harmless
    typer.echo(f"harmless requests refused: {share:.1%} of {found.harmless} (95 % {over[0]:.1%} to {over[1]:.1%})")
