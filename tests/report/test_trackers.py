"""Trackers: what was logged is read back with each system's own reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import MissingExtra, RunError
from fedlm.report.trackers import SILOS, Tracking, get_tracker, round_metrics

RUN = {"name": "news", "recipe": {"seed": 0, "data": {"sources": [{"path": "a"}]}}}


def play(name: str, run_dir: Path, rounds: range) -> None:
    observe = Tracking({name: get_tracker(name)}, RUN, warn=pytest.fail)
    observe({"kind": "run_started", "run": "news-1", "rounds": 3, "silos": ["a"], "run_dir": str(run_dir)})
    for index in rounds:
        observe(
            {
                "kind": "round_done",
                "round": index,
                "loss": 2.0 - 0.25 * index if index >= 0 else None,
                "validation": {"loss": 1.0 - 0.25 * index, "silos": {}},
                "silos": {"a": {"loss": 0.5, "tokens": 10}},
                "failures": [],
                "bytes_up": 7,
            }
        )
    observe.finish()


def test_tensorboard_holds_every_round(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play("tensorboard", tmp_path, range(-1, 2))
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in read.Scalars("train/loss")] == [(1, 2.0), (2, 1.75)]
    assert [(s.step, s.value) for s in read.Scalars("validation/loss")] == [(0, 1.25), (1, 1.0), (2, 0.75)]
    assert read.Scalars("silo/a/tokens")[0].value == 10


def test_mlflow_holds_every_round_and_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    run_dir = tmp_path / "run"
    for rounds in (range(-1, 1), range(1, 2)):
        play("mlflow", run_dir, rounds)
    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedlm/news")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    assert runs[0].data.params["data.sources.0.path"] == "a"
    assert runs[0].info.status == "FINISHED"
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 2.0), (2, 1.75)]


def test_mlflow_respects_the_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    play("mlflow", tmp_path / "run", range(1))
    assert (tmp_path / "elsewhere.db").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow.tracking")]
)
def test_a_missing_extra_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"fedlm\[trackers\]"):
        get_tracker(name)


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(RunError, match="did you mean 'mlflow'"):
        get_tracker("mlflw")


def test_many_silos_are_not_logged_one_by_one() -> None:
    few = dict(round_metrics({"silos": {f"s{i}": {"loss": 1.0} for i in range(SILOS)}}))
    many = dict(round_metrics({"silos": {f"s{i}": {"loss": 1.0} for i in range(SILOS + 1)}}))
    assert len(few) == SILOS and not many


class Broken:
    """A tracker whose server goes away."""

    def __init__(self, start: bool) -> None:
        self.fails_at_start = start

    def start(self, run: dict[str, Any]) -> None:  # noqa: ARG002
        if self.fails_at_start:
            raise ConnectionError("no route")

    def log(self, step: int, metrics: dict[str, float]) -> None:  # noqa: ARG002
        raise ConnectionError("gone")

    def finish(self) -> None:
        raise AssertionError("a tracker that failed is left alone")


def test_a_tracker_that_fails_later_is_named_once_and_does_not_stop_the_run(tmp_path: Path) -> None:
    told: list[str] = []
    tracking = Tracking({"mlflow": Broken(start=False)}, RUN, told.append)
    tracking({"kind": "run_started", "run_dir": str(tmp_path)})
    for index in range(3):
        tracking({"kind": "round_done", "round": index, "loss": 1.0})
    tracking.finish()
    assert len(told) == 1 and "mlflow" in told[0] and "gone" in told[0]


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path: Path) -> None:
    tracking = Tracking({"mlflow": Broken(start=True)}, RUN, pytest.fail)
    with pytest.raises(RunError, match="'mlflow' cannot start"):
        tracking({"kind": "run_started", "run_dir": str(tmp_path)})
