"""Who takes part in a run: every silo is greeted, and its data card says what it can train and measure."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlm.errors import RunError, UpdateRefused, nearest
from fedlm.federation.aggregation import not_summed
from fedlm.federation.disk import disk_errors
from fedlm.federation.figures import check_card
from fedlm.federation.memory import release_freed
from fedlm.federation.records import reasons
from fedlm.federation.rundir import RunDir
from fedlm.federation.sampling import quorum, wanted
from fedlm.federation.silo import PROTOCOL
from fedlm.files import read_json, write_json
from fedlm.messages import Failure, FailureKind, Fields, Reply
from fedlm.recipe.schema import Recipe
from fedlm.training.plan import Plan, parse_plan

if TYPE_CHECKING:
    from fedlm.federation.conversations import Conversations


class Enrolment:
    """Who takes part.

    Attributes:
        training_rows: by silo, its number of training rows.
        trainers: names of the silos with training rows that are trained on, sorted.
        measured_rows: by role, its number of rows by silo, of the silos that have any.
        plans: by silo that has one, what it does of a round.
        refused: why silos do not take part; written down with the next round.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, silos: Conversations) -> None:
        self._recipe, self._dir, self._silos = recipe, run_dir, silos
        self._spec, self._names = recipe.federation, silos.names
        self.training_rows: dict[str, int] = {}
        self.trainers: list[str] = []
        self.measured_rows: dict[str, dict[str, int]] = {}
        self.plans: dict[str, Plan] = {}
        self.refused: list[Failure] = []
        self._idle: set[str] = set()
        self._missing: list[str] = []
        self._late: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        """Answers to `hello` of silos that were missing, not yet taken in."""
        self._greeter: threading.Thread | None = None

    def greet(self) -> None:
        """Ask every silo for its versions and row counts; those without training rows are not sampled later.

        A resumed run keeps the cards it has, and greets the silos that did not answer before.

        Raises:
            RunError: fewer silos than the quorum take part, or the recipe says what a silo can do that there is not.
        """
        known = self._silos.engine.silos()
        for field, named in (("capacity", self._spec.capacity.silos), ("speeds", self._spec.speeds.silos)):
            for name in named:
                if name not in known:
                    raise RunError(
                        f"there is no silo '{name}'", where=f"federation.{field}.silos", fix=nearest(name, known)
                    )
        file = self._dir.path / "data.json"
        cards = self._known_cards(file)
        if strangers := [name for name in self._names if name not in cards]:
            self._silos.phase("greeting the silos")
            refused = self.refused = []
            versions: dict[str, Any] = {}
            for answer in self._ask(strangers):
                if isinstance(answer, Failure):
                    refused.append(answer)
                    self._silos.failed(-1, answer)
                else:
                    cards[answer.silo] = answer.fields["card"]
                    versions = versions or answer.fields["versions"]
            mismatch = [f for f in refused if f.kind is FailureKind.VERSION_MISMATCH]
            needed = quorum(self._spec, wanted(self._spec, len(self._names)))
            if len(cards) < needed:
                raise RunError(
                    f"no run is possible: {len(cards)} of {len(self._names)} silos take part, the quorum is {needed} ("
                    f"{reasons([*mismatch, *(f for f in refused if f not in mismatch)])})",
                    where=str(self._dir.path),
                    fix="mend the silos and try again",
                )
            with disk_errors(file):
                write_json(file, {"silos": {name: cards[name] for name in sorted(cards)}})
            if versions:
                self._dir.update_meta(versions=versions)
        self._index(cards)
        del cards
        release_freed()
        if not self.trainers:
            raise RunError("no silo holds a training row", fix="check the sources, the partition and the split")
        if idle := len(self._names) - len(self.trainers):
            self._silos.phase(
                f"{idle} of {len(self._names)} silos hold no training row or did not answer, and are not sampled"
            )

    def greet_again(self) -> None:
        """Between two rounds of organisations: let those take part that have come since, and ask those that are still
        missing, without waiting for them. (Simulated silos do not come late.)"""
        if not self._dir.meta.get("network"):
            return
        late: dict[str, Fields] = {}
        while not self._late.empty():
            reply = self._late.get()
            late[reply.silo] = reply.fields["card"]
        if late:
            file = self._dir.path / "data.json"
            cards = {**self._known_cards(file), **late}
            with disk_errors(file):
                write_json(file, {"silos": {name: cards[name] for name in sorted(cards)}})
            self._index(cards)
            self._silos.phase(f"joining now: {', '.join(sorted(late))}")
        if self._missing and (self._greeter is None or not self._greeter.is_alive()):
            self._greeter = threading.Thread(
                target=self._greet_late, args=[list(self._missing)], name="fedlm-greeter", daemon=True
            )
            self._greeter.start()

    def _greet_late(self, names: list[str]) -> None:
        for answer in self._ask(names):
            if isinstance(answer, Reply):
                self._late.put(answer)

    def _ask(self, names: list[str]) -> Iterator[Reply | Failure]:
        """Each silo's answer to `hello`; a good one has a data card and versions."""
        capacity, order = self._spec.capacity, {name: position for position, name in enumerate(self._names)}

        def asked(name: str) -> Fields:
            given = capacity.of(name, order[name]).given
            return {"protocol": PROTOCOL, **({"capacity": given} if given else {})}

        hello = (self._silos.request(name, "hello", -1, {}, asked(name)) for name in names)
        for answer in self._silos.engine.exchange(hello):
            try:
                if isinstance(answer, Reply):
                    parse_plan(check_card(answer.silo, answer.fields).get("plan"), self._recipe)
            except UpdateRefused as refusal:
                answer = Failure(answer.silo, FailureKind.BAD_UPDATE, refusal.what)
            yield answer

    def _index(self, cards: dict[str, Fields]) -> None:
        """Who can train and measure, of the silos with a card, and what each does of a round.

        Raises:
            UpdateRefused: a plan on a card is none.
        """
        plans = {name: parse_plan(card["plan"], self._recipe) for name, card in cards.items() if "plan" in card}
        alike = {plan: plan for plan in plans.values()}  # one object for all silos with the same
        self.plans = {name: alike[plan] for name, plan in plans.items()}
        rows = {name: cards[name]["rows"] for name in self._names if name in cards}
        self._missing = [name for name in self._names if name not in cards]
        self.training_rows = {name: counts["train"] for name, counts in rows.items() if counts["train"] > 0}
        self._sort_out()
        for role in ("validation", "test"):
            holders = {name: counts[role] for name, counts in rows.items() if counts[role] > 0}
            asked = min(len(holders), self._recipe.evaluation.silos or len(holders))
            if holders and (reason := not_summed(self._recipe, asked)):
                self._silos.phase(f"nothing is measured on {role} rows, which {len(holders)} silos have: {reason}")
                holders = {}
            self.measured_rows[role] = holders

    def rest(self, names: set[str]) -> None:
        """These silos are not sampled in this run: none of their rows is trained on.

        Raises:
            RunError: nobody is left.
        """
        self._idle = names
        self._sort_out()
        if not self.trainers:
            raise RunError("no silo is left to train: none of their rows was chosen", where="data.selection")

    def _sort_out(self) -> None:
        self.trainers = [name for name in self.training_rows if name not in self._idle]

    def _known_cards(self, file: Path) -> dict[str, Fields]:
        if not file.exists():
            return {}
        try:
            stored = read_json(file)["silos"]
            return {name: check_card(name, {"card": card, "versions": {}}) for name, card in stored.items()}
        except (ValueError, KeyError, TypeError, AttributeError, UpdateRefused):
            raise RunError(
                "data.json is damaged", where=str(file), fix="remove it: --resume then asks the silos again"
            ) from None
