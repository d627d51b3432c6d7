"""The `fedlm` command: a table of commands that are imported only when called, and how errors are told.

Each command lives in a module of its own that exports `register(app: typer.Typer) -> None`. The table below is all that
`fedlm --help` and shell completion read, so neither imports torch.

Exit codes: 0 done, 1 a fault of fedlm's own, 2 something the user can mend (recipe, data, machine, usage), 130 Ctrl-C.
With `--json` a command prints exactly one JSON value on stdout; progress and errors stay on stderr.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fedlm import __version__, logs
from fedlm.errors import FedlmError, nearest


@dataclass(frozen=True)
class Entry:
    """Where a command is implemented (`fedlm.cli.<module>`) and its line in `fedlm --help`."""

    module: str
    help: str


COMMANDS: dict[str, Entry] = {
    "init": Entry("init", "Write a commented recipe to start from."),
    "recipe": Entry("recipe", "Check, show or document recipes."),
    "models": Entry("models", "List known models, and fetch them ahead of time."),
    "tokenizer": Entry("tokenizer", "Train a tokenizer on text that stays at the silos."),
    "prompt": Entry("prompt", "Search a prompt, or answer questions in context: no parameters travel."),
    "run": Entry("run", "Run the federation that a recipe describes, or resume one."),
    "pipeline": Entry("pipeline", "Run named stages, each from the model of the one before it."),
    "compare": Entry("compare", "Federated against each silo alone and all data in one place."),
    "bench": Entry("bench", "Every algorithm on the same work, in one table."),
    "eval": Entry("evaluate", "Measure a model or a run's adapter on held-out text."),
    "safety": Entry("safety", "Measure whether a model refuses what it should, and answers what it should."),
    "winrate": Entry("winrate", "Compare two models' answers by a reward model."),
    "chat": Entry("chat", "Talk to the base model with a run's adapter."),
    "report": Entry("report", "Write report.html of a run."),
    "export": Entry("export", "Export a run's adapter for PEFT, or merged into the model."),
    "network": Entry("network", "Make a network of organisations, enrol silos, see who is connected."),
    "coordinator": Entry("coordinator", "Run the coordinator's side of a network."),
    "silo": Entry("silo", "Run a silo's side of a network."),
    "audit": Entry("audit", "Check and show what a silo was asked and what it answered."),
    "doctor": Entry("doctor", "Say what this machine has and what is missing."),
}

_NO_ROOM = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT}
_NO_PLACE = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}


class CommandTable(TyperGroup):
    """A group that lists commands from the table and imports a command's module when the command is called."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.help, rich_markup_mode=None))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Replace the table's line by the real command, which `register` of its module adds to a fresh app."""
        entry = COMMANDS.get(args[0]) if args else None
        if entry is not None:
            part = typer.Typer(rich_markup_mode=None, add_completion=False)
            importlib.import_module(f"fedlm.cli.{entry.module}").register(part)
            self.add_command(typer.main.get_group(part).commands[args[0]])
        elif args and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No command '{args[0]}': {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn exceptions into sentences and exit codes."""
        debug = bool(ctx.params.get("debug")) or os.environ.get("FEDLM_DEBUG", "") not in ("", "0")
        try:
            return super().invoke(ctx)
        except FedlmError as error:
            if debug:
                traceback.print_exc()
            complain(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain("Interrupted.")
            raise typer.Exit(130) from None
        except Exception as error:
            sentence = _mendable(error)
            if sentence is not None:
                if debug:
                    traceback.print_exc()
                complain(sentence)
                raise typer.Exit(2) from None
            # typer's own exceptions (usage errors, Exit, Abort) and a closed pipe are typer's to answer
            if type(error).__module__.startswith("typer") or isinstance(error, EOFError | BrokenPipeError):
                raise
            if debug:
                traceback.print_exc()
                complain(f"Unexpected {type(error).__name__}; the traceback is above.")
            else:
                place = _write_traceback(error)
                complain(
                    f"Unexpected {type(error).__name__}: this is a fault in fedlm, please report it with {place} "
                    "(look through it first: it may quote your data). `fedlm --debug ...` shows it here."
                )
            raise typer.Exit(1) from None


def _mendable(error: Exception) -> str | None:
    """A sentence for what the machine refused; None for everything else."""
    if _out_of_memory(error):
        return (
            "The memory of this machine or its GPU is not enough. Fix: lower training.batch_size or micro_batch_size, "
            "training.max_length, federation.workers or adapter.rank, or choose a smaller model."
        )
    if not isinstance(error, OSError) or error.errno not in _NO_ROOM | _NO_PLACE:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in _NO_PLACE:
        return f"{where}{error.strerror}. Fix: correct the path, or make the folder first."
    return f"{where}{error.strerror}. Fix: make room or give permission there, or choose another place."


def _out_of_memory(error: Exception) -> bool:
    """Python's, the system's, and torch's: its GPU error by name, since torch is not imported here."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def complain(sentence: str) -> None:
    """One sentence on stderr, red on a terminal; a line of the log where that is JSON."""
    if logs.as_json():
        logging.getLogger("fedlm.cli").error(sentence)
        return
    typer.secho(sentence, fg=typer.colors.RED, err=True)


def _write_traceback(error: BaseException) -> Path:
    """Write the traceback to a new file that only this user can read. It may quote data, so it isn't printed."""
    descriptor, name = tempfile.mkstemp(prefix="fedlm-traceback-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write("".join(traceback.format_exception(error)))
    return Path(name)


app = typer.Typer(
    cls=CommandTable,
    name="fedlm",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedlm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Organisations that may not share their text train, align and use one language model together.

    \b
    fedlm init news                      write recipe.yaml
    fedlm recipe check recipe.yaml       is it possible?
    fedlm compare recipe.yaml            does federating help?
    fedlm run recipe.yaml                federate
    fedlm chat runs/RUN                  talk to the result
    """


def main() -> None:
    """Entry point of the `fedlm` script."""
    try:
        app(prog_name="fedlm")
    except KeyboardInterrupt:  # before the command had begun
        sys.exit(130)
