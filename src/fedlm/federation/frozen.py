"""Run directories of runs that train nothing: a search for a prompt, learning in context."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlm.errors import RunError
from fedlm.federation.api import about, about_network, new_run, same_data, same_network, same_recipe, using
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.choose import Choice, make_engine
from fedlm.federation.rundir import RunDir
from fedlm.files import write_atomic
from fedlm.messages import Engine, Observe
from fedlm.recipe.schema import Recipe


@contextmanager
def frozen_run(
    recipe: Recipe,
    base: Path,
    run_dir: Path | None,
    resume: bool,
    force: bool,
    where: Choice,
    silos: Sequence[str] | None,
    observe: Observe | None,
) -> Iterator[tuple[RunDir, Engine]]:
    """A new run directory or one to go on with, locked, and the engine to its silos; both are closed at the end.

    Raises:
        RunError: the directory is taken, holds another recipe's run, or resuming is asked for without one.
        FedlmError: the data or the network cannot be used.
    """
    from fedlm.data.federated import load_data

    if resume:
        if run_dir is None:
            raise RunError("resuming needs the run directory", fix="name it")
        directory = RunDir.open(run_dir)
        try:
            same_recipe(directory, recipe)
            if where.network is None and (kit := directory.meta.get("kit")):
                where = replace(where, network=Path(kit))
            same_network(directory, where.network)
            data = None if where.network else load_data(recipe, base)
            if data is not None:
                same_data(directory, data)
        except BaseException:
            directory.close()
            raise
    else:
        run_dir = run_dir or Path("runs") / f"{recipe.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        data = None if where.network else load_data(recipe, base)
        facts = about(data) if data is not None else {**about_network(where.network), "skipped": {}}
        directory = new_run(recipe, run_dir, base=base, force=force, **facts)
    with using(directory):
        engine = make_engine(where, recipe, data, directory, silos=silos, base=base, observe=observe)
        try:
            yield directory, engine
        finally:
            engine.close()


def write_rounds(directory: RunDir, records: Sequence[dict[str, Any]]) -> None:
    """rounds.jsonl anew, whole; nothing while there are no records."""
    if records:
        file = directory.path / "rounds.jsonl"
        with disk_errors(file):
            lines = [json.dumps(record, sort_keys=True, allow_nan=False) + "\n" for record in records]
            write_atomic(file, "".join(lines).encode())
