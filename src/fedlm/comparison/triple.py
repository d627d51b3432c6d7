"""Federated against each silo alone and all data in one place: the comparison that says whether federating helped.

The directory of a comparison is the federated arm's run directory with the other arms beside it:

    run.json, rounds.jsonl, adapter/ ...    the federated run (of the recipe's own seed)
    arms/ARM/run.json, rounds.jsonl ...     every other arm, itself a run of one participant (':' becomes '.')
    arms/ARM/test.json                      the arm's result on every item of the global test set, and its cost
    arms/seed-N/ARM/...                     the same for further seeds, the federated arm included
    comparison.json                         arms, table and verdict

An arm with a test.json is never run again, so a comparison that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlm.algorithms import get_algorithm
from fedlm.comparison.arms import BASE, BUDGETS, FEDERATED, Arm, federated_recipe, local_recipe, plan_arms
from fedlm.comparison.measuring import measure_on_silos
from fedlm.comparison.verdict import ArmResult, arm_metrics, judge, table
from fedlm.errors import RunError
from fedlm.federation.api import MAY_CHANGE, about, new_run, remove_run, same_data, using
from fedlm.federation.coordinator import run
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.local import LocalEngine, resolve_workers
from fedlm.federation.interrupt import Interrupt
from fedlm.federation.rundir import RunDir
from fedlm.federation.sampling import sample
from fedlm.federation.start import begun, held_start, whole_model, with_start
from fedlm.files import read_json, write_json
from fedlm.messages import Event, Fields, Observe, Tensors
from fedlm.models.processor import slow_type
from fedlm.recipe.guards import mask_of
from fedlm.recipe.load import diff_recipes, load_recipe
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.preference import check_silos
from fedlm.recipe.presets import reseeded
from fedlm.recipe.schema import Recipe

if TYPE_CHECKING:
    from fedlm.data.federated import FederatedData

SCHEMA = 1


def compare(
    recipe: Recipe,
    *,
    base: Path = Path(),
    run_dir: Path,
    observe: Observe | None = None,
    seeds: Sequence[int] | None = None,
    budgets: Sequence[str] = BUDGETS,
    silos: Sequence[str] | None = None,
    workers: int | None = None,
    resume: bool = False,
    force: bool = False,
) -> Fields:
    """Train all arms, measure each on the test rows of all silos, and judge; see `fedlm.comparison.arms` for the arms.

    Args:
        base: the folder that relative paths of the recipe start from.
        run_dir: where everything is written; must be new or empty unless `resume`.
        observe: receives every event with "arm" and "arms" (their number) added; called from several threads.
        seeds: the whole comparison is repeated for each; the recipe's own seed by default. A seed also decides the
            split and the partition.
        budgets: 'steps' and 'compute': which of the two kinds of silo-alone arms to train.
        silos: the silos that train alone; all by default.
        workers: processes, instead of the recipe's `federation.workers`.
        resume: go on with a comparison that was interrupted.
        force: replace the run or comparison that `run_dir` holds.

    Returns:
        What comparison.json holds: {"schema", "arms": [{"arm", "seed", "metrics", "cost"}], "table", "verdict",
        "budgets", "seeds", "seconds"}.

    Raises:
        RunError: no test rows, the directory is in use, updates are masked, or a silo or round failed.
        KeyboardInterrupt: everything that was finished is kept.
    """
    from fedlm.data.federated import load_data

    started = time.monotonic()
    if mask_of(recipe) is not None:
        raise RunError(
            "a comparison trains silos alone, and a sum over one silo hides nothing",
            where="guards",
            fix="compare without the mask: --set 'guards=[]'",
        )
    if recipe.privacy is not None:
        raise RunError(
            "a comparison measures silos' rows, and under `privacy` no figure of them leaves",
            where="privacy",
            fix="compare without it: --set privacy=null",
        )
    seeds = list(dict.fromkeys(seeds or [recipe.seed]))
    _check_directory(recipe, run_dir, resume, force)
    if observe and (note := slow_type(recipe.model)):
        observe({"kind": "note", "text": note})
    results: list[ArmResult] = []
    silo_count = 0
    with Interrupt():  # SIGTERM ends a comparison as Ctrl-C does
        for seed in seeds:
            seeded = reseeded(recipe, seed)
            data = load_data(seeded, base)
            check_silos(seeded, data.names)
            if force and not results:  # not before the new data could be read
                remove_run(run_dir)
            silo_count = len(data.names)
            own = seed == recipe.seed
            arms_root = run_dir / "arms" if own else run_dir / "arms" / f"seed-{seed}"
            federated = run_dir if own else arms_root / FEDERATED
            one = _Comparison(seeded, data, base, federated, arms_root, observe, workers, len(seeds))
            results += one.run(plan_arms(seeded, one.training_rows(), budgets=budgets, silos=silos))
    outcome: Fields = {
        "schema": SCHEMA,
        "arms": [{"arm": r.arm, "seed": r.seed, "metrics": arm_metrics(r), "cost": r.cost} for r in results],
        "table": table(results),
        "verdict": judge(results, silos_total=silo_count),
        "budgets": list(budgets),
        "seeds": seeds,
        "seconds": time.monotonic() - started,
    }
    with disk_errors(run_dir):
        write_json(run_dir / "comparison.json", outcome)
    return outcome


def _check_directory(recipe: Recipe, run_dir: Path, resume: bool, force: bool) -> None:
    """Raises:
    RunError: there is a comparison and it is not to be resumed, or it is of another recipe.
    """
    if not (run_dir / "run.json").exists():
        if (run_dir / "arms").exists():
            raise RunError(
                "this directory holds arms of a comparison, but run.json is missing",
                where=str(run_dir),
                fix="remove it or choose another --run-dir",
            )
        return
    if force:
        return
    if not resume:
        raise RunError(
            "this directory already holds a run",
            where=str(run_dir),
            fix="go on with it with --resume, replace it with --force, or choose another --run-dir",
        )
    changed = diff_recipes(load_recipe(run_dir / "recipe.yaml"), federated_recipe(recipe))
    changed = [line for line in changed if not line.startswith(MAY_CHANGE)]
    if changed:
        raise RunError(
            "the recipe has changed since this comparison began: " + "; ".join(changed),
            where=str(run_dir),
            fix="undo the change, or start a new comparison",
        )


class _Comparison:
    """The comparison with one seed."""

    def __init__(
        self,
        recipe: Recipe,
        data: FederatedData,
        base: Path,
        federated: Path,
        arms_root: Path,
        observe: Observe | None,
        workers: int | None,
        seeds: int,
    ) -> None:
        self.recipe, self.data, self.base = recipe, data, base
        self.federated_dir, self.arms_root = federated, arms_root
        self._observe, self._seeds = observe, seeds
        spec = recipe.federation if workers is None else recipe.federation.model_copy(update={"workers": workers})
        self.workers = resolve_workers(spec, max(2, len(data.names)), recipe.model.device)
        panel = sample(data.names, recipe.evaluation.silos or len(data.names), recipe.seed, "panel")
        self.testers = [name for name in sorted(panel) if len(data.silo(name).test)]
        if not self.testers:
            raise RunError("no silo holds a test row, so there is nothing to compare on", fix="raise data.split.test")
        if (federated / "run.json").exists():
            same_data(RunDir.open(federated, write=False), data)
        self._arm_of_run: dict[str, str] = {}
        self._count = 0

    def training_rows(self) -> dict[str, int]:
        return {name: self.data.card(name)["rows"].get("train", 0) for name in self.data.names}

    def run(self, arms: list[Arm]) -> list[ArmResult]:
        """All arms: the federation first, by itself; then those that train in one place, side by side."""
        self._count = len(arms) + 2
        main, local = federated_recipe(self.recipe), local_recipe(self.recipe)
        with contextlib.ExitStack() as opened:
            first = _Lazily(lambda: self._engine(main, self.federated_dir))
            opened.callback(first.close)
            federated = self._federated(main, first)

            def first_model() -> Tensors:
                """What every arm starts from."""
                start = held_start(RunDir.open(self.federated_dir, write=False), self.recipe)
                return whole_model(begun(self.recipe, start), start)

            base = self._measured(BASE, lambda: (self.measure(first.engine, first_model(), BASE), dict(_NOTHING)))
            if all(self._result_file(arm.folder).exists() for arm in arms) or (
                main.training == local.training and main.federation.algorithm == local.federation.algorithm
            ):
                second = first
            else:
                first.close()  # two engines at once would hold the base model twice
                second = _Lazily(lambda: self._engine(local, self.arms_root))
                opened.callback(second.close)
            results = self._side_by_side(arms, second)
        return [base, federated, *results]

    # ---------------------------------------------------------------- arms

    def _federated(self, recipe: Recipe, lazily: _Lazily) -> ArmResult:
        def train() -> tuple[dict[str, Any], Fields]:
            # The run directory before the engine, which puts its own folders into it.
            with self._directory(self.federated_dir, recipe, FEDERATED) as directory:
                return self._train(FEDERATED, recipe, lazily.engine, directory, None)

        return self._measured(FEDERATED, train)

    def _side_by_side(self, arms: list[Arm], lazily: _Lazily) -> list[ArmResult]:
        missing = [arm for arm in arms if not self._result_file(arm.folder).exists()]
        # One engine for all arms, taken before any starts: an arm must not make another when this one is closed.
        engine = lazily.engine if missing else None

        def result(arm: Arm) -> ArmResult:
            def train() -> tuple[dict[str, Any], Fields]:
                recipe = local_recipe(self.recipe, arm.rounds)
                with self._directory(self.arms_root / arm.folder, recipe, arm.name) as directory:
                    assert arm.silo is not None and engine is not None
                    return self._train(arm.name, recipe, engine, directory, [arm.silo])

            return self._measured(arm.name, train, arm.folder)

        if self.workers == 1 or engine is None:
            return [result(arm) for arm in arms]
        engine.start()
        # As many as there are workers, so that the longest arm, which comes first, has one for itself all the time.
        pool = ThreadPoolExecutor(min(len(arms), self.workers), thread_name_prefix="fedlm-arm")
        futures: list[Future[ArmResult]] = [pool.submit(result, arm) for arm in arms]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done() and (error := future.exception()) is not None:
                    raise error
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            engine.close()  # ends the exchanges that other arms wait in
            raise
        finally:
            pool.shutdown(wait=True)

    def _train(
        self, arm: str, recipe: Recipe, engine: LocalEngine, directory: RunDir, silos: list[str] | None
    ) -> tuple[dict[str, Any], Fields]:
        """Run one arm to its end and measure the model after its last round."""
        ended = run(
            recipe,
            engine,
            directory,
            observe=lambda event: self._tell(event, arm),
            resume=True,
            silos=silos,
            final_test=False,
        )
        if ended.status != "finished":
            raise KeyboardInterrupt
        checkpoint = directory.load_checkpoint()
        assert checkpoint is not None, "a finished run keeps its last checkpoint"
        algorithm = get_algorithm(recipe.federation.algorithm, recipe.adapter)
        start = held_start(directory, recipe)
        if ALGORITHMS[recipe.federation.algorithm.name].personal:
            tensors = algorithm.evaluated(checkpoint.parameters, checkpoint.server_state)
            message = with_start(tensors, start, recipe)
            measured = self.measure(engine, message, arm, directory.run, checkpoint.progress.accepted)
        else:
            exported = algorithm.exported(checkpoint.parameters, checkpoint.server_state)
            measured = self.measure(engine, whole_model({**start, **exported}, start), arm)
        return measured, cost_of(directory.iterate_rounds())

    def measure(
        self,
        engine: LocalEngine,
        tensors: Tensors,
        arm: str,
        run_name: str | None = None,
        accepted: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """The counts of every silo's test rows, with items, by silo; see `measure_on_silos`.

        Raises:
            RunError: a silo gave none.
        """
        self._tell({"kind": "phase", "text": "measuring on the test rows of all silos"}, arm)
        name = run_name or f"test-{arm}".replace(":", ".")
        self._arm_of_run[name] = arm
        return measure_on_silos(engine, self.testers, tensors, role="test", run=name, items=True, accepted=accepted)

    def _measured(self, arm: str, work: Any, folder: str | None = None) -> ArmResult:
        """The arm's stored result, or that of `work`, stored."""
        file = self._result_file(folder or arm)
        if not file.exists():
            measured, cost = work()
            with disk_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {"schema": SCHEMA, "measured": measured, "cost": cost})
        stored = read_json(file)
        return ArmResult(arm, self.recipe.seed, stored["measured"], stored["cost"])

    # ---------------------------------------------------------------- places and events

    def _result_file(self, folder: str) -> Path:
        return self.arms_root / folder / "test.json"

    def _engine(self, recipe: Recipe, folder: Path) -> LocalEngine:
        return LocalEngine(recipe, self.data, folder, workers=self.workers, observe=self._from_engine, base=self.base)

    @contextlib.contextmanager
    def _directory(self, folder: Path, recipe: Recipe, arm: str) -> Iterator[RunDir]:
        """The arm's run directory, made or opened again, locked while it is used."""
        if (folder / "run.json").exists():
            directory = RunDir.open(folder)
        else:
            directory = new_run(recipe, folder, base=self.base, arm=arm, **about(self.data))
        self._arm_of_run[directory.run] = arm
        with using(directory):
            yield directory

    def _from_engine(self, event: Event) -> None:
        self._tell(event, self._arm_of_run.get(str(event.get("run")), ""))

    def _tell(self, event: Event, arm: str) -> None:
        if self._observe:
            label = arm if self._seeds == 1 else f"{arm} (seed {self.recipe.seed})"
            self._observe({**event, "arm": label, "arms": self._count * self._seeds})


class _Lazily:
    """An engine that is made when it is first needed."""

    def __init__(self, make: Any) -> None:
        self._make, self._engine = make, None

    @property
    def engine(self) -> LocalEngine:
        if self._engine is None:
            self._engine = self._make()
        assert self._engine is not None
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


_NOTHING: Mapping[str, int] = dict.fromkeys(("bytes_up", "bytes_down", "seconds", "wall_seconds", "tokens", "steps"), 0)
"""What the base model costs."""


def cost_of(rounds: Iterator[Mapping[str, Any]]) -> Fields:
    """What an arm cost, from its rounds.jsonl.

    `seconds` is training time summed over silos, which does not depend on what ran beside it; `wall_seconds` is the
    clock's, of the rounds with validation and transport. `peak_pss` is the memory of all processes of the comparison.
    """
    cost: Fields = {**_NOTHING, "peak_pss": 0}
    for record in rounds:
        if record["round"] < 0:
            continue
        for name in ("bytes_up", "bytes_down"):
            cost[name] += record[name]
        cost["wall_seconds"] += record["seconds"]
        cost["peak_pss"] = max(cost["peak_pss"], record["peak_pss"])
        for line in record["silos"].values():
            cost["seconds"] += line["seconds"]
            cost["tokens"] += line["tokens"]
            cost["steps"] += line["steps"]
    cost["tokens_per_second"] = cost["tokens"] / cost["seconds"] if cost["seconds"] else None
    return cost
