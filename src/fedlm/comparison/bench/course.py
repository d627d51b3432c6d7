"""The course of one training, folded from its events: quality over bytes, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fedlm.errors import RunError
from fedlm.messages import Event, Fields


@dataclass
class Course:
    """Sums over a run's events.

    Bytes are those of training: the model that travels to silos, and updates back, as the engine measured them. What
    the measuring between rounds sends is no part of a method and is left out, but where silos keep the model that they
    were measured with and train from it, its way down counts for the training.

    Attributes:
        setup_rounds: rounds at the start in which nothing is trained yet; their bytes are in the sums, and not in what
            a silo's round takes.
        kept: silos keep the model that they received last.
    """

    setup_rounds: int = 0
    kept: bool = False
    points: list[Fields] = field(default_factory=list)
    """After every measured round (-1: before training): the summary of the rows, and the bytes so far."""
    aggregation: list[float] = field(default_factory=list)
    up: int = 0
    down: int = 0
    setup_up: int = 0
    setup_down: int = 0
    measuring_down: int = 0
    """Sent down to measure a model from which nothing was trained yet."""
    trainings: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    server_seconds: float = 0.0

    def fold(self, event: Event) -> None:
        """Take in one event."""
        if event["kind"] == "silo_done" and event["verb"] == "evaluate":
            self.measuring_down += event["bytes_down"] if self.kept else 0
        elif event["kind"] == "silo_done" and event["verb"] == "train":
            down, self.measuring_down = event["bytes_down"] + self.measuring_down, 0
            self.up += event["bytes_up"]
            self.down += down
            if event["round"] < self.setup_rounds:
                self.setup_up += event["bytes_up"]
                self.setup_down += down
            else:
                self.trainings += 1
            self.steps += event["steps"]
            self.tokens += event["tokens"]
            self.seconds += event["seconds"]
        elif event["kind"] == "round_done":
            self._round(event)

    def _round(self, record: dict[str, Any]) -> None:
        self.wall_seconds += record["seconds"]
        self.server_seconds += record.get("server_seconds", 0.0)
        error = (record.get("aggregation") or {}).get("aggregation_error")
        if error is not None:
            self.aggregation.append(float(error))
        if record["validation"] is not None:
            summary = {name: value for name, value in record["validation"].items() if name != "failures"}
            self.points.append({"round": record["round"], "bytes": self.up + self.down, **summary})

    def figures(self) -> Fields:
        """What the training gave, as plain JSON.

        Raises:
            RunError: nothing was measured, or the loss is not finite.
        """
        from fedlm.federation.memory import peak_rss

        if len(self.points) < 2 or self.points[-1].get("loss") is None:
            raise RunError("no silo holds rows to measure on", fix="raise data.split.validation and data.split.test")
        if not math.isfinite(self.points[-1]["loss"]):
            raise RunError("the loss at the end is not finite", fix="lower the learning rate")
        return {
            "points": self.points,
            "aggregation_error": max(self.aggregation, default=None),
            "mean_error": fmean(self.aggregation) if self.aggregation else None,
            "bytes_up": self.up,
            "bytes_down": self.down,
            "setup_up": self.setup_up,
            "setup_down": self.setup_down,
            "trainings": self.trainings,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "server_seconds": self.server_seconds,
            "peak_rss": peak_rss(),
        }
