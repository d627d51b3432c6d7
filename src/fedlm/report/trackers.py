"""Experiment trackers: a round's figures go to TensorBoard or MLflow as they're measured.

A tracker sees numbers and the recipe, never text. `Tracking` makes trackers an observer of events.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedlm.errors import FedlmError, MissingExtra, RunError, nearest
from fedlm.messages import Event
from fedlm.report.format import is_number

SILOS = 32
"""Figures of single silos are logged up to this many silos a round; beyond, only the round's own."""


class Tracker(Protocol):
    """Where figures go. `start` is called once, then `log` per round, then `finish`, also after a failure."""

    def start(self, run: dict[str, Any]) -> None:
        """Begin: `run` holds "name", "run" (its id), "run_dir" (a path) and "recipe" (plain JSON)."""
        ...

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Figures of one round; step 0 is the base model, step n the model after n rounds."""
        ...

    def finish(self) -> None: ...


class TensorBoard:
    """Event files in run_dir/tensorboard: `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tracker 'tensorboard'", "trackers") from error
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None

    def start(self, run: dict[str, Any]) -> None:
        self._writer = self._make(log_dir=str(Path(run["run_dir"]) / "tensorboard"))
        if run.get("recipe"):
            lines = [f"    {key}: {value}" for key, value in flat(run["recipe"])]
            self._writer.add_text("recipe", "\n".join(lines), 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class MLflow:
    """A database in run_dir/mlruns, or the server at MLFLOW_TRACKING_URI where that is set.

    A resumed run goes on in the same MLflow run. To look at it: `mlflow ui --backend-store-uri sqlite:///RUN/mlruns/mlflow.db`.
    """

    def __init__(self) -> None:
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise MissingExtra("tracker 'mlflow'", "trackers") from error
        for noisy in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)  # it tells of every table that it makes
        self._client_class, self._metric, self._param = MlflowClient, Metric, Param
        self._client: Any = None
        self._run_id = ""

    def start(self, run: dict[str, Any]) -> None:
        folder = Path(run["run_dir"]).resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"
        if uri.startswith(f"sqlite:///{folder}"):
            (folder / "mlruns").mkdir(parents=True, exist_ok=True)
        self._client = self._client_class(tracking_uri=uri)
        name = f"fedlm/{run['name']}"
        found = self._client.get_experiment_by_name(name)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(name, self._artifacts(uri, folder))
        )
        label = str(run.get("run") or folder.name)
        earlier = self._client.search_runs([experiment], filter_string=f"attributes.run_name = '{_quoted(label)}'")
        if earlier:
            self._run_id = earlier[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        self._run_id = self._client.create_run(experiment, run_name=label).info.run_id
        params = [self._param(key, str(value)[:6000]) for key, value in flat(run.get("recipe") or {})]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        import time

        now = int(time.time() * 1000)
        batch = [self._metric(name, value, now, step) for name, value in metrics.items()]
        for start in range(0, len(batch), 500):
            self._client.log_batch(self._run_id, metrics=batch[start : start + 500])

    def finish(self) -> None:
        if self._client is not None and self._run_id:
            self._client.set_terminated(self._run_id)
            self._client = None

    @staticmethod
    def _artifacts(uri: str, folder: Path) -> str | None:
        return str(folder / "mlruns" / "artifacts") if uri.startswith(f"sqlite:///{folder}") else None


TRACKERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def get_tracker(name: str) -> Tracker:
    """The tracker of this name.

    Raises:
        RunError: there is no such tracker.
        MissingExtra: its package isn't installed.
    """
    if name not in TRACKERS:
        raise RunError(f"there is no tracker '{name}': {nearest(name, TRACKERS)}", where="trackers")
    return TRACKERS[name]()


class Tracking:
    """An observer that starts trackers when the run starts, logs every finished round, and ends them.

    A tracker that can't start stops the run before anything is trained. One that fails later (its server went away) is
    named by `warn` and left out from then on: it isn't worth the run.

    Args:
        trackers: by name, as `get_tracker` makes them.
        run: "name" and "recipe"; the rest comes with the event that starts the run.
        warn: receives one sentence.
    """

    def __init__(self, trackers: Mapping[str, Tracker], run: dict[str, Any], warn: Callable[[str], None]) -> None:
        self._waiting, self._run, self._warn = dict(trackers), run, warn
        self._started: dict[str, Tracker] = {}

    def __call__(self, event: Event) -> None:
        if event.get("kind") == "run_started":
            self._start(event)
        elif event.get("kind") == "round_done":
            metrics = dict(round_metrics(event))
            for name in list(self._started):
                self._guarded(name, lambda tracker: tracker.log(int(event["round"]) + 1, metrics))

    def finish(self) -> None:
        """End all trackers; safe to call twice."""
        for name in list(self._started):
            self._guarded(name, lambda tracker: tracker.finish())
        self._started.clear()

    def _start(self, event: Event) -> None:
        while self._waiting:
            name, tracker = self._waiting.popitem()
            try:
                tracker.start({**self._run, "run": event.get("run"), "run_dir": event["run_dir"]})
            except FedlmError:
                raise
            except Exception as error:
                raise RunError(
                    f"tracker '{name}' cannot start ({type(error).__name__}: {error})",
                    fix="mend it, or leave it out of the recipe's `trackers`",
                ) from error
            self._started[name] = tracker

    def _guarded(self, name: str, call: Callable[[Tracker], None]) -> None:
        try:
            call(self._started[name])
        except Exception as error:
            del self._started[name]
            self._warn(f"Tracker '{name}' failed and gets no further figures ({type(error).__name__}: {error}).")


def round_metrics(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The figures of one round as (name, value), e.g. ("validation/loss", 1.2) or ("silo/silo-0001/loss", 1.4)."""
    for key in ("loss", "seconds", "bytes_up", "bytes_down", "peak_pss"):
        if is_number(line.get(key)):
            yield ("train/loss" if key == "loss" else f"round/{key}"), float(line[key])
    if "failures" in line:
        yield "round/failures", float(len(line["failures"] or []))
    for key, value in (line.get("validation") or {}).items():
        if is_number(value):
            yield f"validation/{key}", float(value)
    silos = line.get("silos") or {}
    if len(silos) <= SILOS:
        for name, figures in silos.items():
            for key, value in figures.items():
                if is_number(value):
                    yield f"silo/{name}/{key}", float(value)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested JSON with dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{prefix}.{i}")
    else:
        yield prefix, value


def _quoted(text: str) -> str:
    return text.replace("'", "")
