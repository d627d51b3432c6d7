"""An engine whose bad silos change what they send: everything else passes through it untouched.

Bad silos train as all others do, on rows of their own; what leaves them is `attack(round, broadcast, updates)` instead,
which sees all updates of the round. For simulations on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from fedlm.messages import Engine, Failure, Reply, Request, Stop, Tensors

Attack = Callable[[int, Tensors, dict[str, Tensors]], dict[str, Tensors]]
"""(round, broadcast model, every silo's update) -> what bad silos send instead."""


class BadSilos:
    """Wraps an engine; see above."""

    def __init__(self, engine: Engine, attack: Attack) -> None:
        self._engine, self._attack = engine, attack

    def silos(self) -> Sequence[str]:
        return self._engine.silos()

    def close(self) -> None:
        self._engine.close()

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        asked = list(requests)
        answers = self._engine.exchange(asked, deadline, stop)
        if not asked or asked[0].verb != "train":
            yield from answers
            return
        found = list(answers)
        updates = {answer.silo: dict(answer.tensors) for answer in found if isinstance(answer, Reply)}
        sent = self._attack(asked[0].round, asked[0].tensors, updates)
        for answer in found:
            bad = isinstance(answer, Reply) and answer.silo in sent
            yield replace(answer, tensors=sent[answer.silo]) if bad else answer
