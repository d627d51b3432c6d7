"""The streaming fold: the same bits for every order of arrival, bounded memory, refusals that do not stop the round."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Accumulator, Place, weight_of
from fedlm.errors import RunError, UpdateRefused
from fedlm.federation.folding import FoldResult, Verdict, fold_in_order
from fedlm.federation.updates import check_update
from fedlm.messages import Failure, FailureKind, Reply, Tensors
from fedlm.recipe.schema import AlgorithmSpec

SPEC = AlgorithmSpec(weights="examples")
SHAPES = {"a": torch.Size([3, 5]), "b": torch.Size([7])}
NAMES = [f"silo-{i:04d}" for i in range(6)]


def reply(name: str, dtype: torch.dtype = torch.float32) -> Reply:
    """Of sizes so unlike that every order of summing gives other bits."""
    i = int(name[-4:])
    generator = torch.Generator().manual_seed(i)
    tensors = {k: (torch.randn(s, generator=generator) * 10.0 ** (i % 4)).to(dtype) for k, s in SHAPES.items()}
    return Reply(name, "train", "run", 0, tensors=tensors, fields={"rows": i + 1})


def check(arrival: Reply) -> Verdict:
    weight = weight_of(SPEC, arrival.fields)
    check_update(arrival.silo, arrival.tensors, SHAPES, weight, max_weight=1e6)
    return Verdict(weight, Place(arrival.silo))


def fold(arrivals: Iterable[Reply | Failure], spool: Path, **options) -> tuple[FoldResult, Tensors]:
    algorithm = get_algorithm(SPEC)
    accumulator = algorithm.accumulator(spool)
    result = fold_in_order(algorithm, accumulator, NAMES, iter(arrivals), spool, check, **options)
    assert accumulator.count == len(result.replied)
    assert accumulator.weight == sum(result.weights.values())
    assert not list(spool.glob("*")) if spool.exists() else True
    return result, accumulator.total


def same_bits(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(one[k].view(torch.int32), other[k].view(torch.int32)) for k in SHAPES)


def in_order_sum(names: list[str]) -> Tensors:
    accumulator = get_algorithm(SPEC).accumulator(Path())
    for name in names:
        accumulator.add(reply(name).tensors, int(name[-4:]) + 1.0)
    return accumulator.total


@pytest.mark.parametrize("held_bytes", [0, 200, 10**9], ids=["all on disk", "some on disk", "all in memory"])
def test_every_order_of_arrival_gives_the_same_bits(tmp_path: Path, held_bytes: int) -> None:
    expected = in_order_sum(NAMES)
    orders = list(itertools.permutations(NAMES))
    assert not same_bits(in_order_sum(NAMES[::-1]), expected), "the data must show the order"
    for order in [orders[0], orders[-1], *random.Random(0).sample(orders, 40)]:
        result, total = fold(map(reply, order), tmp_path / "spool", held_bytes=held_bytes)
        assert same_bits(total, expected)
        assert result.replied == NAMES and not result.failures and not result.absent
        assert result.weights == {name: i + 1.0 for i, name in enumerate(NAMES)}
        assert result.fields[NAMES[2]] == {"rows": 3}


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(NAMES), failing=st.sets(st.sampled_from(NAMES)), silent=st.sets(st.sampled_from(NAMES)))
def test_failures_and_silence_leave_the_others_sum(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], failing: set[str], silent: set[str]
) -> None:
    failing -= silent
    arrivals = [
        Failure(n, FailureKind.TIMED_OUT, "late") if n in failing else reply(n) for n in order if n not in silent
    ]
    result, total = fold(arrivals, tmp_path_factory.mktemp("spool"), held_bytes=200)
    left = [n for n in NAMES if n not in failing | silent]
    assert result.replied == left
    assert [f.silo for f in result.failures] == sorted(failing)
    assert result.absent == sorted(silent)
    assert same_bits(total, in_order_sum(left)) if left else not total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_waiting_on_disk_keeps_other_dtypes_too(tmp_path: Path, dtype: torch.dtype) -> None:
    _, on_time = fold((reply(n, dtype) for n in NAMES), tmp_path)
    _, early = fold((reply(n, dtype) for n in reversed(NAMES)), tmp_path, held_bytes=0)
    assert same_bits(on_time, early)


def test_views_of_one_buffer_can_wait_on_disk(tmp_path: Path) -> None:
    arrivals = []
    for name in reversed(NAMES):
        made = reply(name)
        buffer = torch.cat([made.tensors[k].flatten() for k in SHAPES])
        pieces = buffer.split([s.numel() for s in SHAPES.values()])
        views = {k: p.view(s) for (k, s), p in zip(SHAPES.items(), pieces, strict=True)}
        arrivals.append(Reply(name, "train", "run", 0, tensors=views, fields=made.fields))
    _, total = fold(arrivals, tmp_path, held_bytes=0)
    assert same_bits(total, in_order_sum(NAMES))


def test_a_refused_update_is_a_failure_and_the_round_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    replies = {name: reply(name) for name in NAMES}
    replies[NAMES[1]].tensors["b"][3] = torch.nan
    replies[NAMES[4]].fields["rows"] = 10**9
    del replies[NAMES[5]].fields["rows"]
    result, total = fold(replies.values(), tmp_path)
    good = [NAMES[0], NAMES[2], NAMES[3]]
    assert result.replied == good and list(result.fields) == good
    assert same_bits(total, in_order_sum(good))
    assert [(f.silo, f.kind) for f in result.failures] == [(NAMES[i], FailureKind.BAD_UPDATE) for i in (1, 4, 5)]
    assert "'b'" in result.failures[0].reason and "weight" in result.failures[1].reason
    assert all(NAMES[i] in caplog.text for i in (1, 4, 5)), "each refusal is logged with the silo's name"


def test_enough_good_updates_end_the_round_and_a_bad_one_does_not_count(tmp_path: Path) -> None:
    order = [NAMES[5], NAMES[0], NAMES[3], NAMES[1], NAMES[2]]
    replies = [reply(name) for name in order]
    replies[1].tensors["a"].fill_(torch.inf)
    pulled = []

    def arrivals() -> Iterator[Reply]:
        for r in replies:
            pulled.append(r.silo)
            yield r

    result, total = fold(arrivals(), tmp_path, enough=3)
    assert pulled == order[:4], "nobody is waited for once there are enough"
    assert result.replied == [NAMES[1], NAMES[3], NAMES[5]]
    assert result.absent == [NAMES[2], NAMES[4]] and [f.silo for f in result.failures] == [NAMES[0]]
    assert same_bits(total, in_order_sum(result.replied))


@pytest.mark.parametrize("strange, said", [(NAMES[0], "twice"), ("silo-0099", "unasked")])
def test_an_engine_that_breaks_its_promise_is_an_error(tmp_path: Path, strange: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        fold([reply(NAMES[0]), reply(NAMES[5]), reply(strange)], tmp_path, held_bytes=0)
    assert not list(tmp_path.glob("*"))


def test_a_spool_that_cannot_be_written_is_an_error_with_a_fix(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunError, match=r"Fix: .*resume"):
        fold_in_order(
            get_algorithm(SPEC),
            get_algorithm(SPEC).accumulator(Path()),
            NAMES,
            iter([reply(NAMES[3])]),
            blocked / "spool",
            check,
            held_bytes=0,
        )


def test_a_check_that_breaks_stops_the_round_and_leaves_no_files(tmp_path: Path) -> None:
    def broken(arrival: Reply) -> Verdict:
        if arrival.silo == NAMES[2]:
            raise ValueError("a fault of ours, not of the silo")
        return 1.0

    arrivals = iter([reply(NAMES[5]), reply(NAMES[4]), reply(NAMES[2])])
    algorithm = get_algorithm(SPEC)
    with pytest.raises(ValueError, match="ours"):
        fold_in_order(algorithm, algorithm.accumulator(Path()), NAMES, arrivals, tmp_path, broken, held_bytes=0)
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("reverse", [False, True])
def test_few_updates_are_alive_at_once(tmp_path: Path, reverse: bool) -> None:
    """Counts live updates: never more than the budget holds, the one that arrives and the one being folded."""
    names = [f"silo-{i:04d}" for i in range(60)]
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def arrivals() -> Iterator[Reply]:
        nonlocal most
        for name in reversed(names) if reverse else names:
            made = reply(name)
            alive.add(made.tensors["a"])
            most = max(most, len(alive))
            yield made
            del made

    algorithm = get_algorithm(SPEC)
    size = 22 * 4
    result = fold_in_order(
        algorithm, algorithm.accumulator(Path()), names, arrivals(), tmp_path, check, held_bytes=3 * size
    )
    assert len(result.replied) == 60
    assert most <= (4 if reverse else 1), most


PEAK = """
    import resource, sys, torch
    from pathlib import Path
    from fedlm.algorithms import get_algorithm
    from fedlm.algorithms.base import Accumulator, Place, weight_of
    from fedlm.federation.folding import Verdict, fold_in_order
    from fedlm.messages import Reply
    from fedlm.recipe.schema import AlgorithmSpec

    names = [f"silo-{i:04d}" for i in range(int(sys.argv[1]))]
    algorithm = get_algorithm(AlgorithmSpec(weights="equal"))
    arrivals = (
        Reply(n, "train", "r", 0, tensors={"w": torch.full((2_000_000,), float(n[-4:]))}) for n in reversed(names)
    )
    accumulator = algorithm.accumulator(Path())
    check = lambda r: Verdict(1.0, Place())
    fold_in_order(algorithm, accumulator, names, arrivals, Path(sys.argv[2]), check, held_bytes=2**24)
    assert accumulator.count == len(names)
    assert accumulator.total["w"][0] == sum(range(len(names)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_silos(tmp_path: Path) -> None:
    """8 MB updates, the worst order of arrival: 20 silos and 80 (480 MB more) peak alike."""
    peaks = []
    for silos in (20, 80):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PEAK), str(silos), str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 60, f"MiB: {peaks}"


def test_refusals_raised_by_folding_itself_are_not_swallowed(tmp_path: Path) -> None:
    """Half-folded sums must never look like a good round."""

    class Refusing(Accumulator):
        def add(self, update: Mapping[str, torch.Tensor], weight: float) -> None:  # noqa: ARG002
            raise UpdateRefused("half of it is in the sum")

    with pytest.raises(UpdateRefused):
        fold_in_order(get_algorithm(SPEC), Refusing(), NAMES, iter([reply(NAMES[0])]), tmp_path, check)
