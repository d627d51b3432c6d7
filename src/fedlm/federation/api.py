"""Run a recipe, from the start or from where it stopped: what `fedlm run` calls."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedlm
from fedlm.errors import FedlmError, RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.choose import Choice, make_engine
from fedlm.federation.rundir import RunDir
from fedlm.messages import Fields, Observe
from fedlm.recipe.preference import check_silos
from fedlm.recipe.schema import Recipe

if TYPE_CHECKING:
    from fedlm.data.federated import FederatedData
    from fedlm.federation.records import RunResult

MAY_CHANGE = ("federation.workers", "federation.keep", "federation.retries", "federation.reconnect", "trackers")
"""Recipe fields that change no bit of the result, so a resumed run may have others."""


def run_recipe(
    recipe: Recipe | None,
    *,
    base: Path | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    force: bool = False,
    observe: Observe | None = None,
    silos: Sequence[str] | None = None,
    engine: str = "local",
    address: str | None = None,
    network: Path | None = None,
) -> RunResult:
    """Run a federation: of simulated silos on this machine or a Ray cluster, or of organisations.

    The engine changes no bit of the result, so a run may be resumed on another one.

    Args:
        recipe: what to run; may be None to resume with the run's own recipe.
        base: folder that relative paths of the recipe start from; the current one by default, when resuming the one
            the run started with.
        run_dir: by default runs/<name>-<UTC time>.
        resume: continue the run in `run_dir`.
        force: replace the run that `run_dir` holds.
        observe: receives progress events.
        silos: names that take part; all by default.
        engine: "local" or "ray" (see `engines.choose`).
        address: with "ray", a running cluster; by default Ray is started on this machine.
        network: the coordinator's kit, for a run with organisations; when resuming, by default the run's own.

    Raises:
        RunError: see `RunDir` and `coordinator.run`; also a resume with a changed recipe, naming what changed.
        FedlmError: the model or the data cannot be loaded.
    """
    where = Choice(engine, address, network)
    if resume:
        if run_dir is None:
            raise RunError("resuming needs the run directory", fix="name it: --resume RUN")
        directory = RunDir.open(run_dir)
        try:
            if network is None and (kit := directory.meta.get("kit")):
                where = replace(where, network=Path(kit))
            recipe = same_recipe(directory, recipe)
            base = base or Path(directory.meta["base"])
        except BaseException:
            directory.close()
            raise
    else:
        if recipe is None:
            raise RunError("there is no recipe to run")
        base = base or Path()
        run_dir = run_dir or Path("runs") / f"{recipe.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        # Before the directory: a mistake in the recipe leaves nothing behind. Over a network no text is read here.
        data = None if network else _read(recipe, base, observe)
        facts = about(data) if data is not None else {**about_network(network), "skipped": {}}
        directory = new_run(recipe, run_dir, base=base, force=force, **facts)
    with using(directory):
        if resume:
            from fedlm.federation.start import same_start

            same_network(directory, where.network)
            same_start(directory, recipe)
            data = None if where.network else _read(recipe, base, observe)
            if data is not None:
                same_data(directory, data)
        return _run(recipe, data, directory, base, resume, observe, silos, where)


@contextlib.contextmanager
def using(directory: RunDir) -> Iterator[RunDir]:
    """Closes the directory at the end. If the model, the data or what silos say at the greeting turn out to be unusable
    before anything was computed, the directory is removed: the mistake can be mended, and the same command given again.
    """
    try:
        yield directory
    except FedlmError:
        if not directory.begun:
            directory.discard()
        raise
    finally:
        directory.close()


def _read(recipe: Recipe, base: Path, observe: Observe | None) -> FederatedData:
    from fedlm.data.federated import load_data
    from fedlm.federation.memory import release_freed

    if observe:
        observe({"kind": "phase", "text": "reading the data"})
    data = load_data(recipe, base)
    check_silos(recipe, data.names)
    if recipe.reinforce.reward.run is not None:
        from fedlm.models.folders import local_path
        from fedlm.training.reward_model import reward_tensors

        reward_tensors(local_path(recipe.reinforce.reward.run))  # simulated silos would tell it only when they train
    release_freed()
    return data


def about(data: FederatedData) -> Fields:
    """What run.json says of the data."""
    return {"data": data.fingerprint, "skipped": data.skipped}


def same_data(directory: RunDir, data: FederatedData) -> None:
    """Raises:
    RunError: the silos' rows are not those that this run began with, so going on would not end in the same model.
    """
    if directory.meta.get("data", data.fingerprint) != data.fingerprint:
        raise RunError(
            "the data has changed since this run began: its rows, their silos or their roles are others",
            where=str(directory.path),
            fix="put the data back, or start a new run",
        )


def about_network(kit: Path | None) -> Fields:
    """What run.json says of the network; nothing without one. Raises NetworkError when this is no coordinator's kit."""
    if kit is None:
        return {}
    from fedlm.federation.engines.flare.kit import read_kit

    return {"network": read_kit(kit, "coordinator").network, "kit": str(kit.resolve())}


def same_network(directory: RunDir, kit: Path | None) -> None:
    """Raises:
    RunError: the run began with other parties, who hold its private states.
    NetworkError: this is no coordinator's kit.
    """
    began, now = directory.meta.get("network"), about_network(kit).get("network")
    if began != now:
        raise RunError(
            f"this run began {f'over the network {began}' if began else 'with simulated silos'}, "
            f"it cannot go on {f'over the network {now}' if now else 'with simulated ones'}",
            where=str(directory.path),
            fix="continue it with that network's kit" if began else "continue it without --network",
        )


def new_run(recipe: Recipe, run_dir: Path, *, base: Path = Path(), force: bool = False, **facts: Any) -> RunDir:
    """A new, locked run directory for this recipe; `facts` go into its run.json.

    Raises:
        RunError: the directory is taken (without `force`) or cannot be written.
        FedlmError: the recipe cannot start from the run that it names (see `read_start`).
    """
    from fedlm.federation.start import keep_start, read_start
    from fedlm.recipe.load import dump_recipe

    start = read_start(recipe)
    if force:
        remove_run(run_dir)
    now = datetime.now(UTC)
    meta = {
        "run": f"{recipe.name}-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        "name": recipe.name,
        "fedlm": fedlm.__version__,
        "versions": {},
        "created": now.isoformat(timespec="seconds"),
        "base": str(base.resolve()),
        **({"start": start.facts} if start.facts else {}),
        **facts,
    }
    directory = RunDir.create(run_dir, meta=meta, recipe_text=dump_recipe(recipe))
    keep_start(directory, start)
    return directory


def remove_run(run_dir: Path) -> None:
    """Remove a run that nobody is running in; what is no run stays.

    Raises:
        RunError: another process is running in it, or it cannot be removed.
    """
    if not (run_dir / "run.json").is_file():
        return
    RunDir.open(run_dir).close()
    run_dir = run_dir.resolve()
    with disk_errors(run_dir):
        # Moved away whole first: a kill half-way leaves no half of a run under this name.
        old = run_dir.with_name(f".{run_dir.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(run_dir.rename(old))


def _run(
    recipe: Recipe,
    data: FederatedData | None,
    directory: RunDir,
    base: Path,
    resume: bool,
    observe: Observe | None,
    silos: Sequence[str] | None,
    where: Choice,
) -> RunResult:
    from fedlm.federation import coordinator
    from fedlm.models.fingerprint import base_identity
    from fedlm.models.processor import slow_type

    if observe and not where.network and (note := slow_type(recipe.model)):
        observe({"kind": "note", "text": note})
    if "model" not in directory.meta:  # for runs that start from this one
        directory.update_meta(model=base_identity(recipe.model))
    engine = make_engine(where, recipe, data, directory, silos=silos, base=base, observe=observe)
    try:
        return coordinator.run(recipe, engine, directory, observe=observe, resume=resume, silos=silos)
    finally:
        engine.close()


def same_recipe(directory: RunDir, recipe: Recipe | None) -> Recipe:
    """The recipe to go on with.

    Raises:
        RunError: it differs from the run's own where that changes results, and how.
    """
    from fedlm.recipe.load import diff_recipes, load_recipe

    own = load_recipe(directory.path / "recipe.yaml")
    if recipe is None:
        return own
    changes = [c for c in diff_recipes(own, recipe) if not c.startswith(MAY_CHANGE)]
    if changes:
        raise RunError(
            "the recipe is not the one this run started with: " + "; ".join(changes),
            where=str(directory.path),
            fix="resume without changes, or start a new run (a run whose end or schedule moves is another run)",
        )
    return recipe
