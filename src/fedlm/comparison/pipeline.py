"""Run a pipeline: one stage's run after the other, then every stage's model on the same test rows.

    pipeline.json     the stages' recipes as resolved
    STAGE/            each stage's run directory
    measured.json     {"cells": {TEST: {MODEL: summary}}}: what every model is worth on the test rows of TEST's stage
    report.html       the stages side by side (`fedlm.report.pipeline`)

A stage whose run is finished is not run again, a cell that is measured is not measured again, and a run that was killed
goes on from its last checkpoint: whatever ends the process, the pipeline ends in the same bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedlm
from fedlm.comparison.measuring import measure_on_silos
from fedlm.errors import FedlmError, RunError
from fedlm.evaluation import summarise
from fedlm.federation.api import MAY_CHANGE, run_recipe
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.choose import Choice
from fedlm.federation.engines.local import LocalEngine, resolve_workers
from fedlm.federation.rundir import RunDir
from fedlm.federation.start import begun, held_start, whole_model
from fedlm.files import read_json, write_json
from fedlm.messages import Event, Fields, Observe, Tensors
from fedlm.recipe.load import diff_recipes
from fedlm.recipe.pipeline import Pipeline, Stage
from fedlm.recipe.schema import AlgorithmSpec, FederationSpec, Recipe
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.data.federated import FederatedData

SCHEMA = 1
BASE = "base"
"""The model that the first stage starts from."""


def run_pipeline(
    pipeline: Pipeline,
    run_dir: Path,
    *,
    resume: bool = False,
    observe: Observe | None = None,
    where: Choice | None = None,
) -> Fields:
    """Run all stages that are not finished, and measure.

    Args:
        run_dir: new or empty, unless `resume`; the one that the pipeline was loaded for.
        observe: receives every event with "arm" (the stage) and "arms" (their number) added.
        where: the engine, as in `run_recipe`. Over a network nothing is measured beyond what each run measures.

    Returns:
        {"status": "finished" | "interrupted", "stages": {NAME: status}, "measured": {TEST: {MODEL: summary}}}

    Raises:
        RunError: the directory holds something else, a stage that has begun has changed, or a run fails. What was
            finished is kept.
        FedlmError: a stage cannot begin; the stages before it are kept.
    """
    where = where or Choice()
    _open(pipeline, run_dir, resume)
    status: dict[str, str] = {}
    for stage in pipeline.stages:
        status[stage.name] = _run(stage, run_dir / stage.name, _named(observe, stage.name, pipeline), where)
        if status[stage.name] != "finished":
            return {"status": status[stage.name], "stages": status, "measured": _cells(run_dir)}
    if where.network is None:
        _measure(pipeline, run_dir, observe)
    return {"status": "finished", "stages": status, "measured": _cells(run_dir)}


def _open(pipeline: Pipeline, run_dir: Path, resume: bool) -> None:
    """Write down what is to be run, or check that it is what was begun.

    Raises:
        RunError: see `run_pipeline`.
    """
    file = run_dir / "pipeline.json"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    if file.is_file():
        if not resume:
            raise RunError(
                "this directory already holds a pipeline",
                where=str(run_dir),
                fix="go on with it with --resume, or choose another --run-dir",
            )
        try:
            known = read_json(file)
            before = {stage["name"]: Recipe.model_validate(stage["recipe"]) for stage in known["stages"]}
            created = known["created"]
        except (ValueError, KeyError, TypeError):
            raise RunError("pipeline.json is damaged", where=str(file)) from None
        _same(pipeline, before, run_dir)
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise RunError(
            "the directory is not empty and holds no pipeline", where=str(run_dir), fix="choose an empty one"
        )
    with disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        stages = [{"name": s.name, "recipe": s.recipe.model_dump(mode="json")} for s in pipeline.stages]
        facts = {"name": pipeline.name, "created": created, "fedlm": fedlm.__version__}
        write_json(file, {"schema": SCHEMA, **facts, "stages": stages, "measure": list(pipeline.measure)})


def _same(pipeline: Pipeline, before: Mapping[str, Recipe], run_dir: Path) -> None:
    """Stages that have begun must be there as they were, in their order; those to come may change."""
    begun_stages = [name for name in before if (run_dir / name / "run.json").exists()]
    now = [stage.name for stage in pipeline.stages]
    if now[: len(begun_stages)] != begun_stages:
        raise RunError(
            f"the stages that have begun are {', '.join(begun_stages)}, and the pipeline now has {', '.join(now)}",
            where=str(run_dir),
            fix="put the stages back in their order, or start a new pipeline",
        )
    for stage in pipeline.stages[: len(begun_stages)]:
        changes = [c for c in diff_recipes(before[stage.name], stage.recipe) if not c.startswith(MAY_CHANGE)]
        if changes:
            raise RunError(
                f"stage '{stage.name}' has begun, and its recipe is another one now: " + "; ".join(changes),
                where=str(run_dir),
                fix="undo the change, or start a new pipeline in another --run-dir",
            )


def _run(stage: Stage, folder: Path, observe: Observe | None, where: Choice) -> str:
    """The status of a stage's run after it was run, or found finished."""
    there = (folder / "run.json").is_file()
    if there and RunDir.open(folder, write=False).meta["status"] == "finished":
        return "finished"
    result = run_recipe(
        stage.recipe,
        base=stage.base,
        run_dir=folder,
        resume=there,
        observe=observe,
        engine=where.engine,
        address=where.address,
        network=where.network,
    )
    return result.status


def _named(observe: Observe | None, arm: str, pipeline: Pipeline) -> Observe | None:
    """An observer that is told of which stage an event is."""
    if observe is None:
        return None

    def told(event: Event) -> None:
        observe({**event, "arm": arm, "arms": len(pipeline.stages)})

    return told


# ---------------------------------------------------------------- every model on the same rows


def _measure(pipeline: Pipeline, run_dir: Path, observe: Observe | None) -> None:
    """Fill in what measured.json lacks, cell by cell."""
    cells = _cells(run_dir)
    models = [BASE, *(s.name for s in pipeline.stages if TASKS[s.recipe.task].head == "none")]
    for test in (stage for stage in pipeline.stages if stage.name in pipeline.measure):
        known = cells.setdefault(test.name, {})
        if all(model in known for model in models):
            continue
        from fedlm.data.federated import load_data

        data = load_data(test.recipe, test.base)
        silos = [name for name in data.names if len(data.silo(name).test)]
        for model in models if silos else ():
            if model in known:
                continue
            if observe is not None:
                observe({"kind": "phase", "text": f"measuring {model} on the test rows of {test.name}"})
            known[model] = _cell(pipeline, run_dir, model, test, data, silos)
            with disk_errors(run_dir):
                write_json(run_dir / "measured.json", {"schema": SCHEMA, "cells": cells})


def _cell(
    pipeline: Pipeline, run_dir: Path, model: str, test: Stage, data: FederatedData, silos: list[str]
) -> dict[str, Any]:
    """The summary of one model on one stage's test rows; {"reason"} where it cannot be measured there."""
    stage = pipeline.stages[0] if model == BASE else next(s for s in pipeline.stages if s.name == model)
    recipe = probe(test.recipe, stage.recipe)
    workers = resolve_workers(recipe.federation, len(silos), recipe.model.device)
    try:
        tensors = _tensors(stage, run_dir / stage.name, first=model == BASE)
        with tempfile.TemporaryDirectory(prefix="fedlm-pipeline-") as scratch:
            engine = LocalEngine(recipe, data, Path(scratch), workers=workers, base=test.base)
            try:
                found = measure_on_silos(engine, silos, tensors, role="test", run="pipeline", items=False)
            finally:
                engine.close()
    except FedlmError as error:  # such as a base without a chat template on instructions
        return {"reason": error.sentence()}
    return {key: value for key, value in summarise(found).items() if key != "silos"}


def probe(test: Recipe, of: Recipe) -> Recipe:
    """A stage's rows and measures, with the model and adapter of another: what silos need to measure that one."""
    template = test.model.chat_template or of.model.chat_template
    federation = FederationSpec(
        algorithm=AlgorithmSpec(), workers=test.federation.workers, threads=test.federation.threads
    )
    return test.model_copy(
        update={
            "start": None,
            "model": of.model.model_copy(update={"chat_template": template}),
            "adapter": of.adapter,
            "federation": federation,
            "guards": [],
        }
    )


def _tensors(stage: Stage, run: Path, *, first: bool) -> Tensors:
    """A whole model in the stage's own terms: its final one, or what it began with."""
    from fedlm.models.export import load_adapter

    directory = RunDir.open(run, write=False)
    start = held_start(directory, stage.recipe)
    if first:
        return whole_model(begun(stage.recipe, start), start)
    return whole_model(load_adapter(directory.adapter, stage.recipe.adapter), start)


def _cells(run_dir: Path) -> dict[str, dict[str, Any]]:
    file = run_dir / "measured.json"
    if not file.is_file():
        return {}
    try:
        cells: dict[str, dict[str, Any]] = read_json(file)["cells"]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            "measured.json is damaged", where=str(file), fix="remove it: --resume then measures again"
        ) from None
    return cells
