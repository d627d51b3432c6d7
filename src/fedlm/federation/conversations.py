"""What the coordinator says to the silos and what it makes of their answers: hello, train, evaluate."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch

from fedlm.algorithms.base import Accumulator, Algorithm, weight_of
from fedlm.errors import RunError, UpdateRefused
from fedlm.evaluation import summarise
from fedlm.federation.folding import FoldResult, fold_in_order
from fedlm.federation.memory import release_freed
from fedlm.federation.records import Traffic, failure_lines, reasons, silo_line
from fedlm.federation.rundir import RunDir, disk_errors
from fedlm.federation.sampling import quorum, sample
from fedlm.federation.silo import PROTOCOL
from fedlm.federation.updates import check_update, largest_weight
from fedlm.files import read_json, write_json
from fedlm.messages import Engine, Event, Failure, FailureKind, Fields, Observe, Reply, Request, Tensors
from fedlm.recipe.schema import Recipe


def require_numbers(reply: Reply, names: Iterable[str]) -> None:
    """Refuse a reply whose figures cannot be added up or written down.

    Raises:
        UpdateRefused: one of these fields is no number, or any figure is negative or not finite.
    """
    for name in names:
        value = reply.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UpdateRefused(f"the reply has no number '{name}'", where=reply.silo)
    for name, value in reply.fields.items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise UpdateRefused(f"the reply's '{name[:40]}' is {value}", where=reply.silo)


class Conversations:
    """One run's exchanges with its silos.

    Attributes:
        training_rows: after `enrol`, by silo, its number of training rows.
        trainers: after `enrol`, names of the silos with training rows, sorted.
        measurers: by role, names of the silos with rows of that role.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        run_dir: RunDir,
        algorithm: Algorithm,
        names: list[str],
        observe: Observe | None,
    ) -> None:
        self.recipe, self.spec, self.engine, self.dir = recipe, recipe.federation, engine, run_dir
        self.algorithm, self.names = algorithm, names
        self.training_rows: dict[str, int] = {}
        self.trainers: list[str] = []
        self.measurers: dict[str, list[str]] = {}
        self._observe = observe

    def enrol(self) -> None:
        """Ask every silo for its versions and row counts; those without training rows are not sampled later.

        Raises:
            RunError: no silo answers, or one speaks another protocol version.
        """
        file = self.dir.path / "data.json"
        if not file.exists():
            self.phase("greeting the silos")
            cards: dict[str, Any] = {}
            refused: list[Failure] = []
            versions: dict[str, Any] = {}
            hello = (self.request(name, "hello", -1, {}, {"protocol": PROTOCOL}) for name in self.names)
            for answer in self.engine.exchange(hello):
                if isinstance(answer, Failure):
                    refused.append(answer)
                    self.failed(-1, answer)
                else:
                    cards[answer.silo] = answer.fields["card"]
                    versions = versions or answer.fields["versions"]
            mismatch = [f for f in refused if f.kind is FailureKind.VERSION_MISMATCH]
            if mismatch or not cards:
                raise RunError("no run is possible with these silos: " + reasons(mismatch or refused))
            with disk_errors(file):
                write_json(file, {"silos": {name: cards[name] for name in sorted(cards)}})
            self.dir.update_meta(versions=versions)
        rows = {name: card["rows"] for name, card in read_json(file)["silos"].items()}
        self.training_rows = {n: rows[n]["train"] for n in self.names if n in rows and rows[n]["train"] > 0}
        self.trainers = list(self.training_rows)
        for role in ("validation", "test"):
            self.measurers[role] = [n for n in self.names if n in rows and rows[n][role] > 0]
        del rows
        release_freed()
        if not self.trainers:
            raise RunError("no silo holds a training row", fix="check the sources, the partition and the split")
        if idle := len(self.names) - len(self.trainers):
            self.phase(f"{idle} of {len(self.names)} silos hold no training row or did not answer, and are not sampled")

    def train(
        self,
        number: int,
        sampled: list[str],
        want: int,
        broadcast: Tensors,
        expected: dict[str, torch.Size],
        accepted: dict[str, int],
        accumulator: Accumulator,
        traffic: Traffic,
    ) -> FoldResult:
        """Send the broadcast, fold the updates that come back, refuse bad ones.

        Args:
            sampled: silos asked, in canonical order; the first `want` replies are used.
            expected: names and shapes of an update.
            accepted: by silo, the last round whose update was aggregated.
            accumulator: receives the good updates.
            traffic: receives the bytes.
        """

        def requests() -> Iterator[Request]:
            for name in sampled:
                fields = {"round": number, "rounds": self.spec.rounds, "accepted": accepted.get(name, -1)}
                yield self.request(name, "train", number, broadcast, fields)

        def check(reply: Reply) -> float:
            """The weight of a good update. Raises UpdateRefused for any other."""
            require_numbers(reply, ("loss", "examples", "tokens", "target_tokens", "steps", "seconds"))
            weight = weight_of(self.spec.algorithm, reply.fields)
            most = largest_weight(self.recipe, self.training_rows[reply.silo])
            check_update(reply.silo, reply.tensors, expected, weight, max_weight=most)
            return weight

        def arrivals() -> Generator[Reply | Failure]:
            with closing(self.exchange(requests())) as answers:
                for answer in answers:
                    if isinstance(answer, Reply):
                        traffic.add(answer)
                        self.done(number, answer)
                    yield answer
                    del answer

        # Closing stops the silos that are no longer waited for.
        with closing(arrivals()) as arriving:
            result = fold_in_order(self.algorithm, accumulator, sampled, arriving, self.dir.spool, check, enough=want)
        for failure in result.failures:
            self.failed(number, failure)
        return result

    def validate(self, parameters: Tensors, number: int, traffic: Traffic) -> Fields | None:
        """Summary on validation rows; None when no silo has any."""
        if not self.measurers["validation"]:
            return None
        return self.measure(parameters, "validation", number, traffic)

    def measure(self, parameters: Tensors, role: str, number: int, traffic: Traffic) -> Fields:
        """Let silos measure a model on their rows of one role, and summarise.

        Raises:
            RunError: fewer answers than the quorum.
        """
        names = self.measurers[role]
        panel = sample(names, self.recipe.evaluation.silos or len(names), self.recipe.seed, "panel")
        requests = (self.request(n, "evaluate", number, parameters, {"role": role, "items": False}) for n in panel)
        counts: dict[str, Fields] = {}
        failures: list[Failure] = []
        for answer in self.exchange(requests):
            try:
                if isinstance(answer, Reply):
                    require_numbers(answer, ("examples",))
            except UpdateRefused as refusal:
                answer = Failure(answer.silo, FailureKind.BAD_UPDATE, refusal.what)
            if isinstance(answer, Failure):
                failures.append(answer)
                self.failed(number, answer)
            else:
                counts[answer.silo] = answer.fields
                traffic.add(answer)
                self.done(number, answer)
        needed = quorum(self.spec, len(panel))
        if len(counts) < needed:
            raise RunError(
                f"only {len(counts)} of {len(panel)} silos measured the model, the quorum is {needed}: "
                + reasons(failures),
                where=str(self.dir.path),
                fix="mend the silos and continue with --resume",
            )
        return {**summarise(counts), "failures": failure_lines(failures)}

    def exchange(self, requests: Iterable[Request]) -> Generator[Reply | Failure]:
        """The engine's exchange under the round's deadline."""
        yield from self.engine.exchange(requests, self.spec.deadline)

    def request(self, silo: str, verb: str, number: int, tensors: Tensors, fields: Fields) -> Request:
        attempt = int(self.dir.meta.get("restarts", 0))
        return Request(silo, verb, self.dir.run, number, attempt, tensors, fields)

    def tell(self, event: Event) -> None:
        if self._observe:
            self._observe({**event, "run": self.dir.run})

    def phase(self, text: str) -> None:
        self.tell({"kind": "phase", "text": text})

    def done(self, number: int, reply: Reply) -> None:
        self.tell(
            {"kind": "silo_done", "round": number, "silo": reply.silo, "verb": reply.verb, **silo_line(reply.fields)}
        )

    def failed(self, number: int, failure: Failure) -> None:
        event = {"kind": "silo_failed", "round": number, "silo": failure.silo}
        self.tell({**event, "failure": failure.kind.value, "reason": failure.reason})
