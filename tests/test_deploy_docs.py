"""docs/deploy.md and the files of deploy/ call commands, options and metrics that there are."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fedlm.cli.main import COMMANDS
from tests.run_deploy import PAGE, PARTIES, steps

DEPLOY = PAGE.parents[1] / "deploy"


def documented() -> Iterator[list[str]]:
    """Every call of fedlm in the page's blocks."""
    for step in steps(PAGE.read_text()):
        for line in re.sub(r"<<'END'\n.*?\nEND$", "", step.text, flags=re.DOTALL | re.MULTILINE).splitlines():
            for part in re.split(r"&&|\|", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["fedlm"]:
                    yield words[1:]


def deployed() -> Iterator[list[str]]:
    """What units, images and compose files start."""
    for unit in sorted((DEPLOY / "systemd").iterdir()):
        (started,) = re.findall(r"^ExecStart=/opt/fedlm/bin/fedlm (.*)$", unit.read_text(), re.MULTILINE)
        yield started.split()
    for name in ("coordinator", "silo"):
        text = (DEPLOY / f"Dockerfile.{name}").read_text().replace("\\\n", "")
        for started in re.findall(r'CMD (\["fedlm".*\])$', text, re.MULTILINE):
            yield json.loads(started)[1:]
    yield from (
        line.split()[1:]
        for line in re.findall(r"^#\s+(fedlm .*)$", (DEPLOY / "compose.coordinator.yaml").read_text(), re.MULTILINE)
    )


CALLS = sorted({" ".join(words): words for words in [*documented(), *deployed()]}.items())


def test_every_kind_of_call_was_found() -> None:
    found = {tuple(words[:2]) for _, words in CALLS}
    assert {("network", "new"), ("network", "join"), ("coordinator", "start"), ("silo", "start")} <= found
    assert len(list(deployed())) == 3 + 3 + 1


@pytest.mark.parametrize("words", [pytest.param(words, id=call) for call, words in CALLS])
def test_a_call_is_possible(words: list[str]) -> None:
    app = typer.Typer(add_completion=False)
    importlib.import_module(f"fedlm.cli.{COMMANDS[words[0]].module}").register(app)
    command: Any = typer.main.get_group(app)
    rest = list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    context = command.make_context(words[0], rest)  # options, values and the number of arguments
    assert context.params


def test_every_metric_in_the_page_exists(tmp_path: Path) -> None:
    from fedlm.endpoint import new_registry
    from fedlm.federation.engines.flare import start
    from fedlm.federation.engines.flare.figures import serve_figures
    from fedlm.report.metrics import RunMetrics

    known = set(re.findall(r"fedlm_\w+", inspect.getsource(start)))
    silo, run = new_registry(), new_registry()
    serve_figures(silo, tmp_path / "figures.json")
    RunMetrics(run)
    for registry in (silo, run):
        for family in registry.collect():
            known |= {family.name, family.name + "_total"}
    named = set(re.findall(r"`((?:fedlm|process)_\w+)", PAGE.read_text()))
    assert len(named) > 20
    assert named <= known


def test_the_page_asks_only_for_what_a_reader_has() -> None:
    """A file is carried after it was made, to a party that there is."""
    made: set[tuple[str, str]] = set()
    for step in steps(PAGE.read_text()):
        if step.carry is not None:
            source, target, name = step.carry
            assert {source, target} <= set(PARTIES)
            assert (source, name) in made, f"line {step.line}: {name} was not made at {source}"
            made.add((target, name))
            continue
        for silo in re.findall(r"name: (hospital-\w)", step.text):
            made.add((step.party, f"{silo}.invitation.yaml"))
        for silo in re.findall(r"join (\S+)\.invitation\.yaml", step.text):
            assert (step.party, f"{silo}.invitation.yaml") in made
            made.add((step.party, f"{silo}.request.zip"))
        for silo in re.findall(r"approve \S+ (\S+)\.request\.zip", step.text):
            assert (step.party, f"{silo}.request.zip") in made
            made.add((step.party, f"{silo}.signed.zip"))


def test_a_block_without_a_party_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1: the first line must say"):
        steps("```bash\nfedlm doctor\n```\n")
    with pytest.raises(ValueError, match="not understood"):
        steps("<!-- cary: a b c -->\n")
