"""Requests to all silos of a run that trains nothing, with retries and a quorum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from fedlm.errors import RunError, UpdateRefused, nearest
from fedlm.federation.figures import check_card
from fedlm.federation.records import reasons
from fedlm.federation.sampling import quorum
from fedlm.federation.silo.door import PROTOCOL
from fedlm.messages import Engine, Failure, FailureKind, Fields, Reply, Request, Tensors
from fedlm.recipe.schema import Recipe

T = TypeVar("T")

AGAIN = (FailureKind.UNREACHABLE, FailureKind.TIMED_OUT)
"""What another try may mend."""


class Asking:
    """The exchanges of one run.

    Attributes:
        names: silos that take part.
        rows: by silo, its rows by role.
        bytes_up: received from silos since `spent` was called. bytes_down: sent to them.
        failures: of the last question, by silo.
    """

    def __init__(self, engine: Engine, recipe: Recipe, run: str, silos: Sequence[str] | None) -> None:
        self._engine, self._recipe, self._run = engine, recipe, run
        known = engine.silos()
        for name in silos or ():
            if name not in known:
                raise RunError(f"there is no silo '{name}'", where="--silo", fix=nearest(name, known))
        self.names = sorted(known if silos is None else set(silos))
        self.rows: dict[str, dict[str, int]] = {}
        self.bytes_up = self.bytes_down = 0
        self.failures: dict[str, str] = {}

    def greet(self) -> None:
        """Ask every silo to take part; those that do not, or have no training rows, are not asked again.

        Raises:
            RunError: fewer do than the quorum.
        """

        def card(reply: Reply) -> dict[str, int]:
            rows: dict[str, int] = check_card(reply.silo, reply.fields)["rows"]
            return rows

        cards = self.ask("hello", -1, {}, {"protocol": PROTOCOL}, card)
        self.rows = {name: rows for name, rows in cards.items() if rows["train"]}
        self.names = sorted(self.rows)
        if not self.names:
            raise RunError("no silo has training rows")

    def ask(
        self,
        verb: str,
        round_: int,
        tensors: Tensors,
        fields: Fields,
        take: Callable[[Reply], T],
        names: Sequence[str] | None = None,
    ) -> dict[str, T]:
        """What `take` makes of each silo's reply, in canonical order.

        Args:
            take: raises UpdateRefused for a reply that cannot be used.
            names: whom to ask; all by default.

        Raises:
            RunError: fewer silos than the quorum answer well.
        """
        asked = self.names if names is None else list(names)
        found: dict[str, T] = {}
        failed: dict[str, Failure] = {}
        left = asked
        for attempt in range(1 + self._recipe.federation.retries):
            requests = (Request(name, verb, self._run, round_, attempt, tensors, fields) for name in left)
            for answer in self._engine.exchange(requests, self._recipe.federation.deadline):
                if isinstance(answer, Reply):
                    self.bytes_up += int(answer.fields.get("sent_bytes", 0))
                    self.bytes_down += int(answer.fields.get("received_bytes", 0))
                    try:
                        found[answer.silo] = take(answer)
                        failed.pop(answer.silo, None)
                        continue
                    except UpdateRefused as refusal:
                        answer = Failure(answer.silo, FailureKind.BAD_UPDATE, refusal.what)
                failed[answer.silo] = answer
            again = [name for name, failure in failed.items() if failure.kind in AGAIN]
            if not again or attempt == self._recipe.federation.retries:
                break
            left = sorted(again)
        self.failures = {name: reasons([failed[name]]) for name in sorted(failed)}
        needed = quorum(self._recipe.federation, len(asked))
        if len(found) < needed:
            raise RunError(
                f"only {len(found)} of {len(asked)} silos answered '{verb}', the quorum is {needed}: "
                f"{reasons(list(failed.values()))}",
                fix=f"mend the silos (their policies must allow the verb '{verb}') and give the same command with "
                "--resume, or lower federation.quorum",
            )
        return {name: found[name] for name in sorted(found)}

    def spent(self) -> dict[str, int]:
        """Bytes since this was asked last."""
        up, down, self.bytes_up, self.bytes_down = self.bytes_up, self.bytes_down, 0, 0
        return {"bytes_up": up, "bytes_down": down}
