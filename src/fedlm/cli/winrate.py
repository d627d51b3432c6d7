"""`fedlm winrate`: of two models' answers to the same prompts, how often a reward model prefers the first one's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.models import Json
from fedlm.cli.output import print_json
from fedlm.errors import DataError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("winrate")(winrate)


def winrate(
    reward: Annotated[Path, typer.Argument(help="A run directory of task reward.", show_default=False)],
    first: Annotated[Path, typer.Argument(help="A model's answers: lines of {prompt, response}.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another's, to the same prompts.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two models' answers by a reward model, which should know neither from training.

    \b
    Example:
      fedlm winrate runs/reward aligned.jsonl base.jsonl
    """
    from fedlm.evaluation.win_rate import win_rate
    from fedlm.training.reward_model import load_reward

    one, other = _answers(first), _answers(second)
    if one.keys() != other.keys():
        raise DataError(
            f"{len(one.keys() ^ other.keys())} prompts are answered in one of the files only",
            where=f"{first}, {second}",
            fix="give both models the same prompts",
        )
    prompts = list(one)
    found = win_rate(load_reward(reward), prompts, [one[p] for p in prompts], [other[p] for p in prompts])
    if as_json:
        print_json({**asdict(found), "prompts": len(prompts)})
        return
    low, high = found.interval
    typer.echo(
        f"The first wins {found.rate:.1%} (95 % interval {low:.1%} to {high:.1%}): {found.wins} wins, {found.ties} "
        f"ties, {found.losses} losses; mean reward {found.margin:+.3f} above the second's."
    )


def _answers(file: Path) -> dict[str, str]:
    """Answers by prompt.

    Raises:
        DataError: the file cannot be read, a line is no such record, or a prompt comes twice.
    """
    found: dict[str, str] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the answers cannot be read ({type(error).__name__})", where=str(file)) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt, response = row["prompt"], row["response"]
        except (ValueError, KeyError, TypeError):
            raise DataError("the line is no record of prompt and response", where=f"{file}:{number}") from None
        if not isinstance(prompt, str) or not isinstance(response, str) or prompt in found:
            raise DataError("prompt and response are texts, and each prompt comes once", where=f"{file}:{number}")
        found[prompt] = response
    return found
