"""What the coordinator says to the silos and what it makes of their answers: train, evaluate."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Literal

import torch

from fedlm.algorithms.base import Accumulator, Algorithm, Place, weight_of
from fedlm.errors import RecipeError, RunError, UpdateRefused
from fedlm.evaluation import summarise
from fedlm.federation.enrolment import Enrolment
from fedlm.federation.figures import check_counts, check_training
from fedlm.federation.folding import FoldResult, Verdict, fold_in_order
from fedlm.federation.masked_figures import measure_masked
from fedlm.federation.noise import SumNoise
from fedlm.federation.records import LEFT_OUT, Traffic, failure_lines, reasons, silo_line
from fedlm.federation.rundir import RunDir
from fedlm.federation.sampling import quorum, sample
from fedlm.federation.start import with_start
from fedlm.federation.updates import check_update, largest_weight
from fedlm.federation.versions import Downlink
from fedlm.guards import get_chain, update_key
from fedlm.messages import Engine, Event, Failure, FailureKind, Fields, Observe, Reply, Request, Tensors
from fedlm.recipe.guards import mask_of
from fedlm.recipe.privacy import withheld
from fedlm.recipe.schema import Recipe
from fedlm.training.plan import Plan, whole


class Conversations:
    """One run's exchanges with its silos.

    Attributes:
        enrolled: who takes part.
        role: the rows that the model is measured on between rounds.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        run_dir: RunDir,
        algorithm: Algorithm,
        names: list[str],
        observe: Observe | None,
        start: Tensors,
    ) -> None:
        self.recipe, self.spec, self.engine, self.dir = recipe, recipe.federation, engine, run_dir
        self.algorithm, self.names, self.chain = algorithm, names, get_chain(recipe.guards)
        self._whole = whole(recipe)
        self.downlink = Downlink(recipe, self.rank) if self.spec.downlink.send == "changed" else None
        self.enrolled = Enrolment(recipe, run_dir, self)
        self.role = "validation"
        self.noise: SumNoise | None = None
        """Where noise protects silos: it says how large an update may be."""
        self.chosen: dict[str, list[int]] = {}
        """By silo, its groups of rows that stand for all silos' rows, or its centres that public rows lie near, where
        the recipe asks for either."""
        self._start = start
        self._parts: tuple[Tensors, dict[int, Tensors]] | None = None
        """The last broadcast and, by rank, what of it travels."""
        self._observe = observe

    def train(
        self,
        number: int,
        sampled: list[str],
        want: int,
        broadcast: Tensors,
        parameters: Tensors,
        accepted: dict[str, int],
        accumulator: Accumulator,
        traffic: Traffic,
    ) -> FoldResult:
        """Send the broadcast, fold the updates that come back, refuse bad ones.

        Args:
            sampled: silos asked, in canonical order; the first `want` replies are used.
            broadcast: what travels.
            parameters: the global model, which says what an update must look like.
            accepted: by silo, the last round whose update was aggregated.
            accumulator: receives the good updates.
            traffic: receives the bytes.
        """

        def requests() -> Iterator[Request]:
            for name in sampled:
                fields = {
                    "round": number,
                    "rounds": self.spec.rounds,
                    "accepted": accepted.get(name, -1),
                    "silos": want,
                }
                if self.noise is not None:
                    fields |= self.noise.asked
                yield self.request(name, "train", number, broadcast, fields)

        def check(reply: Reply) -> Verdict:
            return self.verdict(reply, parameters)

        def arrivals() -> Generator[Reply | Failure]:
            with closing(self.exchange(requests())) as answers:
                for answer in answers:
                    if isinstance(answer, Reply):
                        traffic.add(answer)
                        self.done(number, answer)
                        answer = self.opened(answer, parameters)
                    yield answer
                    del answer

        # Noise is added to the plain sum, whatever the algorithm does with updates one by one.
        folding = self.algorithm if self.noise is None else Algorithm(self.algorithm.spec, self.algorithm.adapter)
        # Closing stops the silos that are no longer waited for.
        with closing(arrivals()) as arriving:
            result = fold_in_order(folding, accumulator, sampled, arriving, self.dir.spool, check, enough=want)
        for failure in result.failures:
            self.failed(number, failure)
        if number == 0 and not withheld(self.recipe):
            self._tell_lost_rows(result)
            self._tell_repeated(result)
        return result

    def verdict(self, reply: Reply, parameters: Tensors) -> Verdict:
        """What an update counts for, and where it was made.

        Args:
            parameters: the global model, which says what an update must look like.

        Raises:
            UpdateRefused: it cannot be averaged, or the reply's figures cannot be written down.
        """
        place, expected = self._expected(reply, parameters)
        weight = weight_of(self.spec.algorithm, reply.fields)
        augment = self.recipe.data.augment
        more = augment.rows if augment is not None and reply.silo in self.chosen else 0  # public rows
        most = largest_weight(self.recipe, self.enrolled.training_rows[reply.silo] + more)
        dtypes = self.algorithm.update_dtypes
        check_update(reply.silo, reply.tensors, expected, weight, max_weight=most, dtypes=dtypes)
        if self.noise is not None:
            self.noise.check(reply.silo, reply.tensors, reply.fields)
        return Verdict(weight, place)

    def check_guards(self, parameters: Tensors) -> None:
        """Before anything is trained: whether the guards fit the updates of every silo, and the model's own steps.

        Raises:
            RecipeError: they do not.
        """
        rounds, where = self.spec.rounds, "guards"
        alike = {self.plan(silo): silo for silo in self.enrolled.trainers}
        try:
            for round_ in range(min(self.algorithm.cycle, rounds)):
                moving: dict[str, torch.Size] = {}
                for plan, silo in alike.items():
                    place = Place(silo, round_, rounds, self.recipe.seed, plan.rank)
                    shapes = self.shapes(parameters, place)
                    moving |= {name: shape for name, shape in shapes.items() if name in parameters}
                    if self.chain is not None:
                        where = "guards"
                        self.chain.layouts(shapes)
                if self.downlink is not None:
                    where = "federation.downlink.guards"
                    self.downlink.check(moving)
        except UpdateRefused as refusal:
            raise RecipeError(refusal.what, where=where, fix=refusal.fix) from None

    def opened(self, reply: Reply, parameters: Tensors, dispatch: int | None = None) -> Reply | Failure:
        """The reply with its update as it was before the guards; a failure where no honest silo sent this.

        Args:
            parameters: the global model, which says what an update must look like.
            dispatch: of the training, in an asynchronous federation.
        """
        if self.chain is None:
            return reply
        try:
            _, expected = self._expected(reply, parameters)
            key = update_key(self.recipe.seed, reply.silo, reply.round, dispatch)
            return replace(reply, tensors=self.chain.decode(reply.tensors, expected, key))
        except UpdateRefused as refusal:
            return Failure(reply.silo, FailureKind.BAD_UPDATE, refusal.what)

    def _expected(self, reply: Reply, parameters: Tensors) -> tuple[Place, dict[str, torch.Size]]:
        """Where an update was made, and the names and shapes that it must have.

        Raises:
            UpdateRefused: the reply's figures cannot be written down.
        """
        check_training(reply, self.recipe)
        place = self._place(reply)
        expected = self.shapes(parameters, place)
        if self.plan(reply.silo).partial and not any(".lora_" in name for name in expected):
            raise UpdateRefused("the silo's plan trains nothing of this model", where=reply.silo)
        return place, expected

    def shapes(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        """Names and shapes of an update that was made there, by what its silo trains."""
        plan, shapes = self.plan(place.silo), self.algorithm.expected_update(parameters, place)
        return {n: shape for n, shape in shapes.items() if not plan.partial or ".lora_" not in n or plan.trains(n)}

    def _place(self, reply: Reply) -> Place:
        """Where an update was made; a silo may have worked with a smaller rank than its own, and says so."""
        silo, steps = reply.silo, reply.fields["steps"]
        if not isinstance(steps, int):
            raise UpdateRefused(f"the reply's number of steps is {steps}", where=silo)
        asked = self.recipe.training.steps
        if asked is not None and steps > asked:
            raise UpdateRefused(f"the reply says {steps} steps, and {asked} were asked for", where=silo)
        most = self.rank(silo)
        rank = reply.fields.get("rank", most)
        if isinstance(rank, bool) or not isinstance(rank, int) or not min(1, most) <= rank <= most:
            raise UpdateRefused(f"the reply's rank is {str(rank)[:40]}, the silo's is {most}", where=silo)
        return Place(silo, reply.round, self.spec.rounds, self.recipe.seed, rank, steps)

    def _tell_lost_rows(self, result: FoldResult) -> None:
        if (selection := self.recipe.data.selection) is not None:
            left = sum(int(fields.get(LEFT_OUT, 0)) for fields in result.fields.values())
            of = sum(self.enrolled.training_rows[name] for name in result.fields)
            self.phase(f"{left} of {of} rows are left out by '{selection.method}' (in {len(result.fields)} silos)")
        for figure, what in (("dropped", "keep no target token and are not used"), ("cut", "are cut")):
            rows = {name: int(fields[figure]) for name, fields in result.fields.items() if fields[figure]}
            if rows:
                limit = self.recipe.training.max_length
                of = sum(self.enrolled.training_rows[name] for name in rows)
                self.phase(f"{sum(rows.values())} of {of} rows {what} at {limit} tokens (in {len(rows)} silos)")

    def _tell_repeated(self, result: FoldResult) -> None:
        """Pre-training is meant to see text once: say who goes through theirs more than once in a single round."""
        if self.recipe.task != "pretrain" or self.recipe.training.steps is None:
            return
        taken = {name: (int(f["examples"]), int(f["rows"])) for name, f in result.fields.items()}
        again = {name: examples / rows for name, (examples, rows) in taken.items() if examples > rows}
        if again:
            worst = max(again, key=again.__getitem__)
            examples, rows = taken[worst]
            self.phase(
                f"{len(again)} of {len(taken)} silos have less text than a round takes ('{worst}' goes "
                f"{again[worst]:.1f} times through its {rows} sequences for {examples} examples): lower training.steps "
                "or batch_size"
            )

    def validate(self, tensors: Tensors, number: int, traffic: Traffic, accepted: Mapping[str, int]) -> Fields | None:
        """Summary on the rows that are measured between rounds; None when no silo has any."""
        if not self.enrolled.measured_rows[self.role]:
            return None
        return self.measure(tensors, self.role, number, traffic, accepted)

    def measure(
        self,
        tensors: Tensors,
        role: str,
        number: int,
        traffic: Traffic,
        accepted: Mapping[str, int],
        rows_of: Literal["own", "others"] = "own",
    ) -> Fields:
        """Let silos measure a model on their rows of one role, and summarise.

        Args:
            tensors: what `Algorithm.evaluated` gives.
            accepted: by silo, the last round whose update was aggregated: what a personal model is made of.
            rows_of: 'others': each silo's model on a sample of the other silos' rows, in a simulation.

        Raises:
            RunError: fewer answers than the quorum.
        """
        rows = self.enrolled.measured_rows[role]
        names = list(rows)
        panel = sample(names, self.recipe.evaluation.silos or len(names), self.recipe.seed, "panel")
        if mask_of(self.recipe) is not None:
            return measure_masked(self, tensors, role, number, panel, traffic, accepted)
        asked: Fields = {"role": role, "items": False, "rows_of": rows_of}
        requests = (
            self.request(n, "evaluate", number, tensors, {**asked, "accepted": accepted.get(n, -1)}) for n in panel
        )
        counts: dict[str, Fields] = {}
        failures: list[Failure] = []
        for answer in self.exchange(requests):
            try:
                if isinstance(answer, Reply):
                    check_counts(answer, self.recipe, rows[answer.silo])
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
        if self.downlink is None:
            yield from self.engine.exchange(requests, self.spec.deadline)
        else:
            yield from self.downlink.exchange(self.engine, requests, self.spec.deadline)

    def rank(self, silo: str) -> int:
        """The LoRA rank that a silo works with; 0 without LoRA."""
        return self.plan(silo).rank

    def plan(self, silo: str) -> Plan:
        """What a silo does of a round."""
        return self.enrolled.plans.get(silo) or self._whole

    def request(self, silo: str, verb: str, number: int, tensors: Tensors, fields: Fields) -> Request:
        if tensors or (self._start and verb != "hello"):
            tensors = self._for_rank(tensors, self.rank(silo))
        if verb == "train" and silo in self.chosen:
            fields = {**fields, "chosen": self.chosen[silo]}
        if silo in self.enrolled.plans:
            fields = {**fields, "plan": self.enrolled.plans[silo].fields()}
        attempt = int(self.dir.meta.get("restarts", 0))
        return Request(silo, verb, self.dir.run, number, attempt, tensors, fields)

    def _for_rank(self, tensors: Tensors, rank: int) -> Tensors:
        """The same object for every silo of a rank, so that engines send it once to all of them."""
        if not self._parts or self._parts[0] is not tensors:
            self._parts = (tensors, {})
        ranks = self._parts[1]
        if rank not in ranks:
            ranks[rank] = with_start(self.algorithm.for_rank(tensors, rank), self._start, self.recipe)
        return ranks[rank]

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
