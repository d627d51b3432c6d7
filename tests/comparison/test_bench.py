"""The bench: figures of a row are those of its trainings, nothing is run twice, one row's fault stays its own."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedlm.comparison.bench import small
from fedlm.comparison.bench.claims import CLAIMS, judge_claims
from fedlm.comparison.bench.course import Course
from fedlm.comparison.bench.driver import Settings, bench
from fedlm.comparison.bench.plan import Base, changes, job, jobs_of, rates
from fedlm.comparison.bench.rows import ROWS, Row, all_rows, choose
from fedlm.comparison.bench.table import at_bytes, best_rate, compared, difference, frontier, row_figures
from fedlm.errors import RecipeError, RunError
from fedlm.recipe.load import dump_recipe, load_recipe
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
BROKEN = Row("broken", "fedavg", "optimiser", change=("training.max_length=4096",))
SETTINGS = Settings(seeds=(1, 2), tuning_seeds=(0,), rates=2)
Finished = tuple[Path, dict[str, Any], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe without its seed 0, so that the data's and the trainings' differ."""
    path = tmp_path_factory.mktemp("bench") / "recipe.yaml"
    path.write_text(dump_recipe(recipe.model_copy(update={"seed": 5})))
    return path


@pytest.fixture(scope="module")
def finished(file: Path) -> Finished:
    """Two rows that end, one that cannot."""
    events: list[dict[str, Any]] = []
    rows = [*choose(["fedit", "ditto"], None), BROKEN]
    out = file.parent / "out"
    return out, bench(file, (), rows, SETTINGS, out=out, observe=events.append, workers=2), events


def without_clock(outcome: dict[str, Any]) -> dict[str, Any]:
    """All that must be the same in every run."""
    clock = ("seconds", "server_seconds", "wall_seconds", "peak_rss")
    rows = [{k: v for k, v in row.items() if k not in clock} for row in outcome["rows"]]
    return {**{k: v for k, v in outcome.items() if k != "seconds"}, "rows": rows}


def test_figures_are_those_of_a_plain_run(finished: Finished, file: Path, tmp_path: Path) -> None:
    """The reported seed, run by itself as `fedlm run` would, and measured on the test rows at its end."""
    from fedlm.data.federated import load_data
    from fedlm.federation.api import run_recipe
    from fedlm.federation.rundir import RunDir

    row = next(r for r in finished[1]["rows"] if r["name"] == "fedit")
    recipe = load_recipe(file)
    base = Base(file, (), recipe, 2)
    again = job(base, choose(["fedit"], None)[0], row["rate"], 1, "test").recipe
    assert (again.seed, again.data.seed, again.training.lr) == (1, 5, row["rate"])
    assert load_data(again).fingerprint == load_data(recipe).fingerprint
    run_recipe(again, run_dir=tmp_path / "run")
    directory = RunDir.open(tmp_path / "run", write=False)
    from fedlm.comparison.measuring import measure_on_silos
    from fedlm.evaluation import summarise
    from fedlm.federation.engines.local import LocalEngine

    checkpoint = directory.load_checkpoint()
    assert checkpoint is not None
    engine = LocalEngine(again, load_data(again), tmp_path / "engine")
    parts = measure_on_silos(engine, engine.silos(), checkpoint.parameters, role="test", run="x", items=False)
    assert row["loss_by_seed"]["1"] == pytest.approx(summarise(parts)["loss"], rel=1e-6)
    lines = [line for record in directory.rounds() for line in record["silos"].values()]
    assert row["bytes_up"] == sum(line["bytes_up"] for line in lines) / len(lines)
    assert row["bytes"] == sum(line["bytes_up"] + line["bytes_down"] for line in lines)
    assert row["steps"] == 12
    assert row["aggregation_error"] > 1e-3  # averages of factors are no factors of the average


def test_every_row_had_the_same_tuning_and_the_broken_one_keeps_its_fault(finished: Finished) -> None:
    _, outcome, events = finished
    ended = [e for e in events if e["kind"] == "training_done"]
    for name in ("fedit", "ditto"):
        row = next(r for r in outcome["rows"] if r["name"] == name)
        assert [len(losses) for losses in row["tuned"].values()] == [1, 1]
        assert row["rate"] == float(min(row["tuned"], key=lambda lr: row["tuned"][lr][0]))
        assert sorted(row["loss_by_seed"]) == ["1", "2"]
        assert row["curve"][0] == [0.0, pytest.approx(outcome["base"]["loss"])]
        assert [spent for spent, _ in row["curve"]] == [0.0, row["bytes"] / 2, row["bytes"]]
    broken = next(r for r in outcome["rows"] if r["name"] == "broken")
    assert "4096" in broken["reason"] and "loss" not in broken
    assert sum(e["arm"].startswith("broken") for e in ended) == 2
    assert ended[-1]["done"] == ended[-1]["total"] == 2 * (2 + 2) + 2
    assert not any("done" in e and e["arm"].startswith("broken") and not e["reason"] for e in ended)


def test_personal_rows_are_measured_on_own_and_others_rows(finished: Finished) -> None:
    rows = {row["name"]: row for row in finished[1]["rows"]}
    assert rows["ditto"]["others_loss"] > 0 and rows["ditto"]["others_loss"] != rows["ditto"]["loss"]
    assert rows["fedit"]["others_loss"] is None and rows["ditto"]["aggregation_error"] is None


def test_going_on_runs_only_what_is_missing_and_ends_in_the_same_figures(
    finished: Finished, file: Path, tmp_path: Path
) -> None:
    first, outcome, _ = finished
    out = tmp_path / "out"
    shutil.copytree(first, out)
    (out / "bench.json").unlink()
    lost = next(p for p in (out / "results").glob("ditto-*") if json.loads(p.read_text())["role"] == "test")
    seed = json.loads(lost.read_text())["seed"]
    lost.unlink()
    (out / "work" / f"{lost.stem}.1").mkdir()  # as a kill leaves it
    (out / "work" / f"{lost.stem}.1" / "half").touch()
    events: list[dict[str, Any]] = []
    rows = choose(["fedit", "ditto"], None)
    again = bench(file, (), rows, SETTINGS, out=out, observe=events.append, workers=1, resume=True)
    trained = {e["arm"] for e in events if e["kind"] == "step"}
    assert len(trained) == 1 and next(iter(trained)).endswith(f"seed {seed}")
    expected = without_clock(outcome)
    expected["rows"] = [row for row in expected["rows"] if row["name"] != "broken"]
    assert without_clock(again) == expected
    assert not any((out / "work").iterdir())
    assert [folder.name[:6] for folder in (first / "work").iterdir()] == ["broken"] * 2  # their logs


def test_a_process_that_dies_is_the_failure_of_its_training_alone(file: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_first(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and not killed and "0.02" in event["arm"]:
            for server in psutil.Process().children():
                for child in server.children():
                    if any("work" in f.path for f in child.open_files()):
                        killed.append(child.pid)
                        os.kill(child.pid, signal.SIGKILL)

    settings = Settings(seeds=(1,), rates=3)
    outcome = bench(file, (), choose(["fedprox"], None), settings, out=tmp_path / "out", observe=kill_first, workers=1)
    (row,) = outcome["rows"]
    assert killed and "signal 9" in row["failed_rates"]["0.02"]
    assert row["rate"] != 0.02 and row["loss_interval"] is None and math.isfinite(row["loss"])


def test_interrupted_it_goes_on(file: Path, tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "training_done":
            raise KeyboardInterrupt

    settings, out = Settings(seeds=(1,), rates=1), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bench(file, (), choose(["fedavg"], None), settings, out=out, observe=stop, workers=1)
    assert len(list((out / "results").iterdir())) == 1
    with pytest.raises(RunError, match="--resume"):
        bench(file, (), choose(["fedavg"], None), settings, out=out, workers=1)
    other = ["data.seed=6"]
    with pytest.raises(RunError, match="data has changed"):
        bench(file, other, choose(["fedavg"], None), settings, out=out, workers=1, resume=True)
    events: list[dict[str, Any]] = []
    bench(file, (), choose(["fedavg"], None), settings, out=out, observe=events.append, workers=1, resume=True)
    assert [e["stored"] for e in events if e["kind"] == "training_done"] == [True, False]


# the plan


def test_every_method_of_the_registry_has_a_row() -> None:
    rows = all_rows()
    assert {row.method for row in rows} == set(ALGORITHMS)
    assert len({row.name for row in rows}) == len(rows)
    assert {row.name for row in ROWS} <= {row.name for row in rows}


@pytest.mark.parametrize("name", ["small", "real"])
def test_every_row_is_possible_with_the_recipes_that_come_along(name: str) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = load_recipe(path)
    base = Base(path, (), recipe, 5)
    for row in all_rows():
        planned = jobs_of(base, row, tried := rates(base, row, 3), [1], "test")
        assert len({one.name for one in planned}) == len(tried) == (1 if row.method == "fedbpt" else 3), row.name
        assert {one.recipe.data.seed for one in planned} == {recipe.seed}


def test_rows_do_the_same_work(file: Path) -> None:
    """Local steps of all silos are those of the recipe, however often the server steps."""
    four = ("data.partition.silos=4",)
    recipe = load_recipe(file, four)
    base = Base(file, four, recipe, 4)
    for row in all_rows():
        if row.facts.min_rounds > recipe.federation.rounds:
            continue
        found = job(base, row, 1e-3, 1, "test").recipe
        federation, updates = found.federation, row.buffer if row.facts.asynchronous else 4
        trained = federation.rounds - row.facts.setup_rounds
        assert trained * updates >= recipe.federation.rounds * 4 - row.buffer, row.name
        assert found.training.steps == 3 * row.steps and found.federation.algorithm.name == row.method
        if found.adapter.kind == "lora":
            assert found.adapter.scale(found.adapter.rank) == recipe.adapter.scale(recipe.adapter.rank)


def test_learning_rates_are_around_a_middle(file: Path) -> None:
    base = Base(file, (), load_recipe(file), 2)
    row = Row("x", "fedavg", "optimiser", lr=0.1, spacing=2.0)
    assert rates(base, row, 3) == [1e-3, 2e-3, 4e-3]
    assert rates(base, row, 2) == [pytest.approx(1.41e-3), pytest.approx(2.83e-3)]
    for name in ("feedsign", "fedadam"):
        server = choose([name], None)[0]
        tried = rates(base, server, 3)
        assert server.server_lr == pytest.approx(tried[1])
        assert f"federation.algorithm.server_lr={tried[0]}" in changes(base, server, tried[0], 1, "test")
    assert job(base, server, 0.5, 1, "test").recipe.training.lr == 2e-2


def test_settings_and_names_that_cannot_be(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="seed 1 would both"):
        Settings(seeds=(1, 2), tuning_seeds=(0, 1))
    with pytest.raises(RunError, match="did you mean 'fedavg"):
        choose(["fedavgg"], None)
    with pytest.raises(RunError, match="no 'lroa'"):
        choose(None, ["lroa"])
    impossible = Row("x", "rolora", "lora", change=("federation.rounds=1",))
    with pytest.raises(RecipeError, match="at least 2 rounds"):
        bench(file, (), [impossible], SETTINGS, out=tmp_path / "a", must=True)
    outcome = bench(file, (), [impossible], SETTINGS, out=tmp_path / "b")
    assert "at least 2 rounds" in outcome["rows"][0]["reason"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "own").touch()
    with pytest.raises(RunError, match="not empty"):
        bench(file, (), [impossible], SETTINGS, out=tmp_path / "c")


# the table


def run(losses: list[float], up: int = 100, down: int = 50, error: float | None = None, **more: Any) -> dict[str, Any]:
    """A training of two silos' updates a round."""
    points = [
        {"round": i - 1, "bytes": i * 2 * (up + down), "loss": loss, "fairness": {"loss": {"worst": loss + 1}}}
        for i, loss in enumerate(losses)
    ]
    rounds = len(losses) - 1
    figures = {"trainings": 2 * rounds, "bytes_up": 2 * rounds * up, "bytes_down": 2 * rounds * down, "steps": 8}
    figures |= {"setup_up": 0, "setup_down": 0}
    clock = dict.fromkeys(("seconds", "server_seconds", "wall_seconds"), 1.0)
    return {
        "points": points,
        "aggregation_error": error,
        "mean_error": error,
        "peak_rss": 5,
        "tokens": 1,
        **figures,
        **clock,
        **more,
    }


def test_means_intervals_and_paired_differences_by_hand() -> None:
    one = row_figures({1: run([5.0, 4.0, 3.0], error=0.1), 2: run([5.0, 4.0, 3.2], error=0.3), 3: run([5.0, 4.0, 3.4])})
    assert one["loss"] == pytest.approx(3.2)
    # s = 0.2, t(2, 97.5 %) = 4.302653, half = t s / sqrt(3)
    assert one["loss_interval"] == pytest.approx([3.2 - 0.496828, 3.2 + 0.496828], abs=1e-6)
    assert one["mean_error"] == pytest.approx(0.2)
    assert (one["aggregation_error"], one["bytes_up"], one["bytes_down"], one["bytes"]) == (0.3, 100, 50, 600)
    assert one["curve"] == [[0, 5.0], [300, 4.0], [600, pytest.approx(3.2)]]
    assert one["worst_loss"] == pytest.approx(4.2)
    other = row_figures({seed: run([5.0, 4.0, 3.1 + 0.2 * (seed - 1)]) for seed in (1, 2, 3)})
    found = difference(other, one)
    assert found["difference"] == pytest.approx(0.1)
    assert found["difference_interval"] == pytest.approx([0.1, 0.1])  # the seeds' own scatter cancels
    assert row_figures({1: run([5.0, 4.0])})["loss_interval"] is None


def test_equal_bytes_and_the_frontier() -> None:
    cheap = row_figures({1: run([5.0, 4.8, 4.6], up=10, down=5)})
    dear = row_figures({1: run([5.0, 4.0, 3.0])})
    rows = {"fedit": dear, "cheap": cheap}
    shared = compared(rows)
    assert shared["reference"] == "fedit" and shared["budgets"] == [200.0, 600.0]
    assert cheap["at_bytes"] == [4.6, 4.6] and dear["at_bytes"] == [5.0, 3.0]  # a round of fedit costs 300
    assert cheap["fewer_up"] == 10.0
    assert compared(rows, [300.0])["budgets"] == [300.0] and dear["at_bytes"] == [4.0]
    assert at_bytes(dear["curve"], 299.0) == 5.0
    assert frontier(rows) == [[30.0, 4.8, "cheap"], [60.0, 4.6, "cheap"], [300.0, 4.0, "fedit"], [600.0, 3.0, "fedit"]]
    worse = row_figures({1: run([5.0, 4.9, 4.7], up=20, down=5)})
    assert "worse" not in {name for _, _, name in frontier({**rows, "worse": worse})}


def test_the_best_rate_and_whether_it_is_at_an_end() -> None:
    assert best_rate({0.1: [3.0], 0.2: [2.0], 0.3: [2.5]}) == (0.2, False)
    assert best_rate({0.1: [1.0, 3.0], 0.2: [2.5, 2.5]}) == (0.1, True)


def test_claims_follow_the_interval() -> None:
    fedit = row_figures({seed: run([5.0, 4.0 + seed], error=0.2) for seed in (1, 2, 3)})
    flora = row_figures({seed: run([5.0, 3.9 + seed + 0.001 * seed], error=1e-7) for seed in (1, 2, 3)})
    fedex = row_figures({seed: run([5.0, 4.1 + seed + 0.2 * (seed % 2)], error=1e-3) for seed in (1, 2, 3)})
    judged = {
        (c["claim"], *c["rows"]): c["verdict"]
        for c in judge_claims({"fedit": fedit, "flora": flora, "fedex-lora": fedex})
    }
    assert len(judged) == len(CLAIMS)
    assert judged[("stacking is better than averaging factors", "flora", "fedit")] == "reproduced"
    assert judged[("FLoRA aggregates exactly", "flora")] == "reproduced"
    assert judged[("FedEx-LoRA aggregates exactly", "fedex-lora")] == "not reproduced"
    assert judged[("exact aggregation is better than averaging factors", "fedex-lora", "fedit")] == "undecided"
    assert judged[("an adaptive server is better than averaging", "fedadam", "fedavg")] == "not measured"


def test_claims_of_fewer_bytes_say_how_much_of_the_gain_is_kept() -> None:
    fedit, squeezed = ({**row_figures({1: run([5.0, loss])}), "bytes_up": up} for loss, up in ((4.0, 80), (4.03, 10)))
    claim = next(c for c in judge_claims({"fedit": fedit, "fedit+int4": squeezed}) if "fedit+int4" in c["rows"])
    assert claim["verdict"] == "reproduced" and claim["figures"] == "8.0x fewer bytes up, loss +0.75%, 97% of its gain"


def test_claims_name_rows_that_there_are() -> None:
    assert {name for claim in CLAIMS for name in claim.needs} <= {row.name for row in all_rows()}


def test_set_up_rounds_and_kept_models_in_the_bytes() -> None:
    def silo(verb: str, round_: int, up: int, down: int) -> dict[str, Any]:
        about = {"kind": "silo_done", "verb": verb, "round": round_, "bytes_up": up, "bytes_down": down}
        return {**about, "steps": 1, "tokens": 1, "seconds": 1.0}

    def done(round_: int) -> dict[str, Any]:
        return {"kind": "round_done", "round": round_, "seconds": 1.0, "validation": {"loss": 5.0 - round_}}

    events = [silo("evaluate", -1, 0, 40), done(-1), silo("train", 0, 100, 3), silo("evaluate", 0, 0, 30), done(0)]
    events += [silo("train", 1, 10, 2), silo("evaluate", 1, 0, 30), done(1)]
    kept, plain = Course(1, True), Course(1, False)
    for event in events:
        kept.fold(event)
        plain.fold(event)
    assert [point["bytes"] for point in kept.points] == [0, 143, 185]  # the last model is only measured
    assert [point["bytes"] for point in plain.points] == [0, 103, 115]
    found = plain.figures()
    assert (found["trainings"], found["bytes_up"], found["setup_up"], found["setup_down"]) == (1, 110, 100, 3)


# the three forms


def test_the_same_figures_in_all_three_forms(finished: Finished) -> None:
    from fedlm.report.bench import columns, measured, write_bench

    out, outcome, _ = finished
    paths = write_bench(out, outcome)
    lines = {line["name"]: line for line in csv.DictReader(paths["csv"].open())}
    text, page = paths["md"].read_text(), paths["html"].read_text()
    for row in measured(outcome):
        assert float(lines[row["name"]]["loss"]) == row["loss"]
        assert float(lines[row["name"]]["loss_low"]) == row["loss_interval"][0]
        cells = [column.text(row) for column in columns(outcome)]
        assert f"| {' | '.join(cells)} |" in text
        assert all(f">{cell}</td>" in page for cell in cells)
        assert f'data-value="{row["loss"]}"' in page
    assert "4096" in lines["broken"]["reason"] and "broken" in text and "broken" in page
    for forbidden in ("http://", "src=", "@import"):
        assert forbidden not in page.split("<main>")[1].split("</main>")[0]


# what the small recipe is made of


def test_passages_lose_no_word() -> None:
    text = " ".join(f"Sentence {i} has some words in it, and here are a few more." for i in range(40)) + " The end."
    found = small.passages(text)
    assert " ".join(found) == text
    assert all(len(passage.split()) >= small.WORDS for passage in found[:-1]) and len(found) > 10
    assert small.passages("One. Two.") == ["One. Two."] and small.passages(" ") == []
