"""`fedlm chat`: talk to a run's model, or to a base model."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fedlm.cli.models import Json, model_spec
from fedlm.cli.output import print_json, warn_of_shared_part

if TYPE_CHECKING:
    from fedlm.inference.generate import Sampling
    from fedlm.inference.session import Chat

HELP = "/reset forgets the conversation, /base switches between the federated and the base model, /exit leaves."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(chat)


def chat(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a model source.", show_default=False)
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this one message and leave; - reads it from stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    round_: Annotated[
        str | None, typer.Option("--round", help="For a RUN: best, last or a number; default: its adapter.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Start with the run's base model, without its adapter.")] = False,
    sha256: Annotated[str | None, typer.Option(help="SHA-256, for a MODEL in a package.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, for a hub MODEL.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, for a MODEL; default: bfloat16.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Talk to a run's federated model, or to a base model.

    \b
    Examples:
      fedlm chat runs/news
      fedlm chat runs/news --prompt "What is this article about?" --max-new-tokens 20
      fedlm chat smollm2-135m-instruct --temperature 0.7
    """
    from fedlm.errors import ModelError
    from fedlm.inference.generate import Sampling
    from fedlm.inference.session import is_run, open_chat, run_recipe
    from fedlm.models.folders import local_path

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text come through, and `reply` refuses them
    if as_json and prompt is None:
        raise ModelError("--json needs --prompt")
    of_run = is_run(local_path(source))
    if of_run and (given := [n for n, v in (("sha256", sha256), ("revision", revision), ("dtype", dtype)) if v]):
        options = " and ".join(f"--{name}" for name in given)
        raise ModelError(f"{options} cannot be given for a run: its recipe says how its model is loaded", where=source)
    if not of_run and round_ is not None:
        raise ModelError("--round names a round of a run, and this is none", where=source, fix="leave it out")
    spec = None if of_run else model_spec(source, sha256, revision, dtype or "bfloat16")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    session = open_chat(source, spec, round_)
    if of_run:
        warn_of_shared_part(run_recipe(local_path(source)).federation.algorithm.name)
    if base:
        session.toggle_base()
    if prompt is not None:
        _one_shot(session, sys.stdin.read() if prompt == "-" else prompt, sampling, as_json)
    else:
        _converse(session, sampling)


def _one_shot(session: Chat, prompt: str, sampling: Sampling, as_json: bool) -> None:
    pieces = []
    for piece in session.reply(prompt, sampling):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    if as_json:
        print_json({"model": session.title, "base": session.use_base, "text": "".join(pieces)})
    else:
        typer.echo()


def _converse(session: Chat, sampling: Sampling) -> None:
    """Read lines until /exit or the end of input. A fault in one turn is told, and the conversation goes on."""
    import contextlib

    from fedlm.errors import FedlmError

    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and line history in input())
    typer.echo(f"{session.title}. {HELP}", err=True)
    if not session.has_template:
        typer.echo("This model has no chat template: it continues your text.", err=True)
    while True:
        try:
            line = input("base> " if session.use_base else "> ").strip()
        except EOFError:
            typer.echo(err=True)
            return
        try:
            if line == "/exit":
                return
            if line == "/reset":
                session.history = []
                typer.echo("The conversation is forgotten.", err=True)
            elif line == "/base":
                now = "base" if session.toggle_base() else "federated"
                typer.echo(f"You talk to the {now} model now; the conversation starts anew.", err=True)
            elif line.startswith("/"):
                typer.echo(f"Unknown command. {HELP}", err=True)
            elif line:
                _answer(session, line, sampling)
        except FedlmError as error:
            typer.secho(str(error), fg=typer.colors.RED, err=True)


def _answer(session: Chat, line: str, sampling: Sampling) -> None:
    """Print one answer; Ctrl-C stops it, and it is forgotten."""
    try:
        for piece in session.reply(line, sampling):
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo(" (stopped; this turn is forgotten)", nl=False)
    typer.echo()
