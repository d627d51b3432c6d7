"""The whole comparison on the tiny model: every arm runs, is measured on the same rows, and is not run twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import RunError
from fedlm.recipe.schema import Recipe

ARMS = [
    "base",
    "federated",
    "alone-compute:silo-0000",
    "alone-compute:silo-0001",
    "centralised",
    "alone:silo-0000",
    "alone:silo-0001",
]


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    from fedlm.comparison.triple import compare

    folder = tmp_path_factory.mktemp("runs") / "compared"
    events: list[Any] = []
    return folder, compare(recipe, run_dir=folder, observe=events.append), events


def test_every_arm_is_there_with_its_steps(finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, outcome, _ = finished
    arms = {arm["arm"]: arm for arm in outcome["arms"]}
    assert sorted(arms) == sorted(ARMS)
    steps = {name: arm["cost"]["steps"] for name, arm in arms.items()}
    assert steps == {
        "base": 0,
        "federated": 12,
        "centralised": 12,
        "alone:silo-0000": 6,
        "alone:silo-0001": 6,
        "alone-compute:silo-0000": 12,
        "alone-compute:silo-0001": 12,
    }
    assert json.loads((folder / "comparison.json").read_text()) == outcome
    assert {arm["metrics"]["examples"] for arm in arms.values()} == {arms["base"]["metrics"]["examples"]}
    for name, arm in arms.items():
        assert arm["metrics"]["loss_interval"][0] < arm["metrics"]["loss"] < arm["metrics"]["loss_interval"][1]
        if name != "base":
            assert arm["metrics"]["loss"] < arms["base"]["metrics"]["loss"], name
            assert arm["cost"]["bytes_up"] > 0 and arm["cost"]["peak_pss"] > 0


def test_arms_are_measured_after_their_last_round_not_their_best(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlm.comparison.measuring import measure_on_silos
    from fedlm.comparison.triple import compare
    from fedlm.data.federated import load_data
    from fedlm.evaluation import summarise
    from fedlm.federation import coordinator
    from fedlm.federation.engines.local import LocalEngine
    from fedlm.federation.rundir import RunDir

    advance = coordinator._advance

    def first_is_best(*args: Any, **kwargs: Any) -> Any:
        progress = advance(*args, **kwargs)
        progress.best_round = 0
        return progress

    monkeypatch.setattr(coordinator, "_advance", first_is_best)
    outcome = compare(recipe, run_dir=tmp_path / "run", budgets=["steps"], silos=["silo-0000"])
    directory = RunDir.open(tmp_path / "run", write=False)
    assert (directory.meta["best_round"], directory.checkpoint_rounds()) == (0, [0, 1])
    checkpoint = directory.load_checkpoint(1)
    assert checkpoint is not None
    data = load_data(recipe)
    engine = LocalEngine(recipe, data, tmp_path / "engine")
    measured = measure_on_silos(engine, data.names, checkpoint.parameters, role="test", run="again", items=False)
    metrics = {arm["arm"]: arm["metrics"] for arm in outcome["arms"]}
    assert metrics["federated"]["loss"] == summarise(measured)["loss"]


def test_arms_without_their_comparison_are_not_believed(
    finished: tuple[Path, dict[str, Any], list[Any]], recipe: Recipe, tmp_path: Path
) -> None:
    from fedlm.comparison.triple import compare

    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    for force in (False, True):
        with pytest.raises(RunError, match=r"run\.json is missing"):
            compare(recipe, run_dir=tmp_path / "run", force=force)


def test_resuming_on_other_data_is_refused(
    finished: tuple[Path, dict[str, Any], list[Any]], recipe: Recipe, tmp_path: Path
) -> None:
    from fedlm.comparison.triple import compare

    shutil.copytree(finished[0], tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**meta, "data": "0" * 64}))
    with pytest.raises(RunError, match="the data has changed"):
        compare(recipe, run_dir=tmp_path / "run", resume=True)


def test_the_directory_is_a_run_directory(finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, _, _ = finished
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((folder / "arms" / "alone.silo-0000" / "run.json").read_text())["status"] == "finished"


def test_events_name_their_arm(finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    events = finished[2]
    assert {event["arm"] for event in events} == set(ARMS)
    assert {event["arms"] for event in events} == {len(ARMS)}
    silos = {e["silo"] for e in events if e["arm"] == "alone:silo-0001" and e["kind"] == "step"}
    assert silos == {"silo-0001"}


def test_the_base_arm_is_the_untrained_model(recipe: Recipe, finished: tuple[Path, dict[str, Any], list[Any]]) -> None:
    from fedlm.data.federated import load_data
    from fedlm.evaluation import measure, summarise
    from fedlm.models.load import load_base, load_tokenizer
    from fedlm.training.tasks import get_task

    data = load_data(recipe)
    model, tokenizer = load_base(recipe.model), load_tokenizer(recipe.model)
    plain = {
        name: measure(
            model, tokenizer, data.silo(name).test, data.kind, get_task(recipe.task), recipe.evaluation, max_length=96
        )
        for name in data.names
    }
    base = next(arm for arm in finished[1]["arms"] if arm["arm"] == "base")
    assert base["metrics"]["loss"] == pytest.approx(summarise(plain)["loss"], abs=1e-5)
    assert base["metrics"]["accuracy"] == summarise(plain)["accuracy"]


def test_resuming_runs_only_what_is_missing(
    recipe: Recipe, finished: tuple[Path, dict[str, Any], list[Any]], tmp_path: Path
) -> None:
    import shutil

    from fedlm.comparison.triple import compare

    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    (folder / "comparison.json").unlink()
    lost = folder / "arms" / "alone.silo-0001"
    shutil.rmtree(lost)
    (folder / "arms" / "centralised" / "test.json").unlink()
    events: list[Any] = []
    outcome = compare(recipe, run_dir=folder, resume=True, observe=events.append)
    assert {e["arm"] for e in events if e["kind"] == "step"} == {"alone:silo-0001"}
    assert [(a["arm"], a["metrics"]) for a in outcome["arms"]] == [
        (a["arm"], a["metrics"]) for a in finished[1]["arms"]
    ]
    assert outcome["verdict"] == finished[1]["verdict"]


@pytest.mark.slow
def test_workers_give_the_same_metrics(
    recipe: Recipe, finished: tuple[Path, dict[str, Any], list[Any]], tmp_path: Path
) -> None:
    from fedlm.comparison.triple import compare

    outcome = compare(recipe, run_dir=tmp_path / "two", workers=2, budgets=["steps"])
    serial = {a["arm"]: a["metrics"] for a in finished[1]["arms"]}
    assert len(outcome["arms"]) == 5
    assert {a["arm"]: a["metrics"] for a in outcome["arms"]} == {a["arm"]: serial[a["arm"]] for a in outcome["arms"]}


def test_a_taken_directory_and_a_changed_recipe_are_refused(
    recipe: Recipe, finished: tuple[Path, dict[str, Any], list[Any]]
) -> None:
    from fedlm.comparison.triple import compare

    with pytest.raises(RunError, match="already holds a run"):
        compare(recipe, run_dir=finished[0])
    changed = recipe.model_copy(update={"training": recipe.training.model_copy(update={"lr": 1.0})})
    with pytest.raises(RunError, match=r"training\.lr: 0\.02 -> 1\.0"):
        compare(changed, run_dir=finished[0], resume=True)


def test_several_seeds(recipe: Recipe, tmp_path: Path) -> None:
    from fedlm.comparison.triple import compare

    outcome = compare(recipe, run_dir=tmp_path / "seeds", seeds=[0, 1], budgets=["steps"])
    assert [(a["arm"], a["seed"]) for a in outcome["arms"] if a["arm"] in ("base", "federated")] == [
        ("base", 0),
        ("federated", 0),
        ("base", 1),
        ("federated", 1),
    ]
    assert (tmp_path / "seeds" / "arms" / "seed-1" / "federated" / "run.json").exists()
    assert outcome["verdict"]["comparisons"][0]["interval_over"] == "seeds"


def test_a_stateful_algorithm_is_compared_with_plain_local_training(recipe: Recipe, tmp_path: Path) -> None:
    from fedlm.comparison.triple import compare
    from fedlm.recipe.schema import AlgorithmSpec

    federation = recipe.federation.model_copy(update={"algorithm": AlgorithmSpec(name="scaffold")})
    outcome = compare(
        recipe.model_copy(update={"federation": federation}),
        run_dir=tmp_path / "scaffold",
        budgets=["steps"],
        silos=["silo-0000"],
    )
    assert [a["arm"] for a in outcome["arms"]] == ["base", "federated", "centralised", "alone:silo-0000"]


def test_no_test_rows_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    from fedlm.comparison.triple import compare

    split = recipe.data.split.model_copy(update={"test": 0.0})
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"split": split})})
    with pytest.raises(RunError, match="no silo holds a test row"):
        compare(without, run_dir=tmp_path / "none")
