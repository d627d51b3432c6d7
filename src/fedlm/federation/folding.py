"""Fold updates into one sum as they arrive, in an order that does not depend on arrival.

Float sums depend on the order of their terms, so replies are folded in canonical silo order. A reply that comes before
its turn waits: in memory while the early ones together stay within a budget, else on disk. So the coordinator's memory
depends neither on the number of silos nor on the order in which they answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Algorithm, Place
from fedlm.errors import RunError, UpdateRefused
from fedlm.messages import Failure, FailureKind, Fields, Reply, Tensors

log = logging.getLogger("fedlm.federation")

HELD_BYTES = 64 * 2**20
"""Early updates are kept in memory up to this many bytes together; further ones wait on disk."""


@dataclass(frozen=True)
class Verdict:
    """What a good update counts for, and where it was made."""

    weight: float
    place: Place


@dataclass
class FoldResult:
    """What became of every silo of the round; lists are in canonical order."""

    asked: list[str] = field(default_factory=list)
    replied: list[str] = field(default_factory=list)
    """Silos whose update is in the sum."""
    failures: list[Failure] = field(default_factory=list)
    """Silos that failed, or whose update was refused."""
    absent: list[str] = field(default_factory=list)
    """Silos from which nothing had come when enough had been folded or the arrivals ended."""
    fields: dict[str, Fields] = field(default_factory=dict)
    """The replies' fields of the silos in `replied`."""
    weights: dict[str, float] = field(default_factory=dict)
    """What each silo in `replied` counted for."""
    figures: Fields = field(default_factory=dict)
    """More about the round for rounds.jsonl."""
    loss: float | None = None
    """Mean training loss, where the replies do not say their own."""
    clip: float | None = None
    """Of the next round, where it moves by a count that silos noised."""


def fold_in_order(
    algorithm: Algorithm,
    accumulator: Accumulator,
    order: Sequence[str],
    arrivals: Iterator[Reply | Failure],
    spool: Path,
    check: Callable[[Reply], Verdict],
    *,
    enough: int | None = None,
    held_bytes: int = HELD_BYTES,
) -> FoldResult:
    """Fold replies into the accumulator in the order of `order`, whatever order they arrive in.

    Args:
        algorithm: does the folding.
        accumulator: the sum; changed in place.
        order: the silos that were asked, in canonical order.
        arrivals: one reply or failure per silo at most, in any order.
        spool: a folder for early updates; emptied of them at the end.
        check: what a good update counts for; raises UpdateRefused for any other, which becomes a failure of that silo
            while the round goes on. Called on arrival, so a refused update is never stored.
        enough: stop once this many updates were accepted (over-sampling).
        held_bytes: bytes of early updates that may wait in memory instead of on disk.

    Raises:
        RunError: the engine delivered a silo twice or one that was not asked, or the spool cannot be written.
    """
    waiting = Waiting(spool, held_bytes)
    result = FoldResult(list(order))
    turn = {silo: position for position, silo in enumerate(order)}
    settled: dict[str, Failure | Verdict] = {}  # what is known of each silo
    next_turn = accepted = 0

    def fold_ready(stop_at_gap: bool) -> None:
        """Fold from the next turn on: up to the first silo still awaited, or past the gaps once all has arrived."""
        nonlocal next_turn
        while next_turn < len(order):
            silo = order[next_turn]
            verdict = settled.get(silo)
            if verdict is None:
                if stop_at_gap:
                    return
                result.absent.append(silo)
            elif isinstance(verdict, Failure):
                result.failures.append(verdict)
            else:
                algorithm.fold(accumulator, waiting.take(silo), verdict.weight, verdict.place)
                result.replied.append(silo)
                result.weights[silo] = verdict.weight
            next_turn += 1

    try:
        while enough is None or accepted < enough:
            arrival = next(arrivals, None)
            if arrival is None:
                break
            silo = arrival.silo
            if silo not in turn or silo in settled:
                raise RunError(f"the engine delivered '{silo}' {'twice' if silo in turn else 'unasked'}")
            settled[silo] = judge(arrival, check)
            if isinstance(arrival, Reply) and not isinstance(settled[silo], Failure):
                result.fields[silo] = arrival.fields
                waiting.put(silo, turn[silo], arrival.tensors, ready=turn[silo] == next_turn)
                accepted += 1
            del arrival  # its tensors are folded, waiting or refused: hold them no longer while the next one is awaited
            fold_ready(stop_at_gap=True)
        fold_ready(stop_at_gap=False)
    finally:
        waiting.clear()
    return result


def judge(arrival: Reply | Failure, check: Callable[[Reply], Verdict]) -> Failure | Verdict:
    """What a good update counts for, else the failure."""
    if isinstance(arrival, Failure):
        return arrival
    try:
        return check(arrival)
    except UpdateRefused as refusal:
        log.warning("refused the update of %s: %s", arrival.silo, refusal.what)
        return Failure(arrival.silo, FailureKind.BAD_UPDATE, refusal.what)


class Waiting:
    """Updates whose turn has not come: a bounded number of bytes in memory, the rest as safetensors files."""

    def __init__(self, spool: Path, held_bytes: int = HELD_BYTES) -> None:
        self.spool, self.room = spool, held_bytes
        self.held: dict[str, Mapping[str, Tensor]] = {}
        self.files: dict[str, Path] = {}

    def put(self, silo: str, position: int, tensors: Mapping[str, Tensor], *, ready: bool) -> None:
        """Store an update; one whose turn has come is taken right away and stays in memory whatever its size.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        size = _in_memory(tensors)
        if ready or size <= self.room:
            self.held[silo] = tensors
            self.room -= size
            return
        path = self.spool / f"early-{position:06d}.safetensors"
        try:
            self.spool.mkdir(parents=True, exist_ok=True)
            # Not flushed to disk: after a crash the round is asked again, so the file need not survive one.
            safetensors.torch.save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)
        except (OSError, safetensors.SafetensorError) as error:
            raise RunError(
                f"early updates cannot wait on disk ({error})",
                where=str(self.spool),
                fix="free space there and continue with --resume",
            ) from error
        self.files[silo] = path

    def take(self, silo: str) -> Mapping[str, Tensor]:
        if silo in self.held:
            tensors = self.held.pop(silo)
            self.room += _in_memory(tensors)
            return tensors
        path = self.files.pop(silo)
        stored: Tensors = safetensors.torch.load_file(path)
        path.unlink()
        return stored

    def drop(self, silo: str) -> None:
        """Forget one, if there is one."""
        if silo in self.files:
            self.files.pop(silo).unlink()
        elif silo in self.held:
            self.room += _in_memory(self.held.pop(silo))

    def clear(self) -> None:
        for path in self.files.values():
            path.unlink(missing_ok=True)
        self.held.clear()
        self.files.clear()


def _in_memory(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that an update holds in memory: none where it lies in a file anyway."""
    return sum(tensor.nbytes for tensor in tensors.values()) if isinstance(tensors, dict) else 0
