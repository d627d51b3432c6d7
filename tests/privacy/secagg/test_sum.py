"""The coordinator's sum is exactly that of the silos whose masked vectors arrived, whoever drops out and when."""

from __future__ import annotations

import numpy as np
import pytest

from fedlm.errors import RunError
from fedlm.privacy.secagg import Coordinator, Encoding, decode, encode
from fedlm.privacy.secagg.message import digest
from tests.privacy.secagg.parties import PHASES, Federation, names, parameters, total, vectors

SURVIVE = {"keys": False, "shares": False, "train": False, "consistency": True, "unmask": True}
"""By phase from which on a silo is gone: whether its vector is in the sum."""


def check(federation: Federation) -> None:
    summed = federation.run()
    lost = {silo for phase, gone in federation.gone.items() if not SURVIVE[phase] for silo in gone}
    assert summed.survivors == tuple(sorted(set(federation.parameters.silos) - lost))
    expected = total(federation.inputs, summed.survivors) & np.uint32(2**federation.parameters.ring_bits - 1)
    np.testing.assert_array_equal(summed.values, expected)
    assert summed.liars == {} and federation.refused == {}


@pytest.mark.parametrize(
    ("n", "degree", "threshold", "malicious"),
    [(n, n - 1, t, malicious) for n, t in ((3, 3), (5, 4), (20, 14)) for malicious in (False, True)]
    + [(20, 12, 9, False)],
)
def test_everyone_stays(n: int, degree: int, threshold: int, malicious: bool) -> None:
    check(Federation(parameters(n, degree, threshold, malicious=malicious)))


@pytest.mark.parametrize("phase", ["keys", "shares", "train", "unmask"])
@pytest.mark.parametrize(
    ("n", "degree", "threshold", "gone"), [(3, 2, 2, 1), (5, 4, 3, 2), (5, 2, 2, 1), (20, 19, 14, 6), (20, 12, 5, 4)]
)
def test_silos_drop_out_in_one_phase(n: int, degree: int, threshold: int, gone: int, phase: str) -> None:
    absent = [names(n)[i * n // gone] for i in range(gone)]
    check(Federation(parameters(n, degree, threshold), gone={phase: absent}))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("n", "degree", "threshold", "gone"), [(5, 4, 4, 1), (20, 19, 14, 3)])
def test_silos_drop_out_beside_a_malicious_coordinator(
    n: int, degree: int, threshold: int, gone: int, phase: str
) -> None:
    absent = [names(n)[i * n // gone] for i in range(gone)]
    check(Federation(parameters(n, degree, threshold, malicious=True), gone={phase: absent}))


@pytest.mark.parametrize(
    ("degree", "malicious"), [(24, False), (59, True), pytest.param(59, False, marks=pytest.mark.slow)]
)
def test_sixty_silos_with_dropouts_in_every_phase(degree: int, malicious: bool) -> None:
    gone = {phase: names(60)[i::20] for i, phase in enumerate(PHASES)}
    threshold = 41 if malicious else (degree + 1) // 3
    check(Federation(parameters(60, degree, threshold, malicious=malicious, length=11), gone=gone))


@pytest.mark.parametrize("ring_bits", [2, 7, 16, 31, 32])
def test_every_ring_wraps_around(ring_bits: int) -> None:
    of = parameters(5, threshold=3, ring_bits=ring_bits, length=100)
    random = np.random.default_rng(1)
    inputs = {s: random.integers(0, 2**ring_bits, 100, dtype=np.uint32) for s in of.silos}
    check(Federation(of, inputs=inputs, gone={"train": names(5)[:1]}))


def test_a_vector_longer_than_a_block_of_the_mask() -> None:
    check(Federation(parameters(3, length=70_001), gone={"train": ["silo-01"]}))


def test_weights_are_summed_under_the_mask() -> None:
    """The decoded mean is the weighted mean within a step of the quantisation, the sum of the integers exact."""
    encoding = Encoding(scale=0.5, bits=16, largest_weight=100, silos=6)
    random = np.random.default_rng(0)
    values = {silo: random.uniform(-0.5, 0.5, 1000) for silo in names(6)}
    weights = dict(zip(names(6), (1, 100, 7, 50, 3, 99), strict=True))
    inputs = {s: encode(v, weights[s], encoding, random)[0] for s, v in values.items()}
    of = parameters(6, threshold=3, length=1001, ring_bits=encoding.ring_bits, agreed=encoding.fields)
    summed = Federation(of, inputs=inputs, gone={"train": ["silo-05"], "keys": ["silo-00"]}).run()
    mean, weight = decode(summed.values, len(summed.survivors), encoding)
    assert weight == 100 + 7 + 50 + 3
    expected = sum(weights[s] * values[s] for s in summed.survivors) / weight
    assert np.abs(mean - expected).max() < encoding.scale / encoding.levels
    assert np.array_equal(summed.values, total(inputs, summed.survivors))


def test_a_request_that_is_repeated_gets_the_same_answer() -> None:
    federation = Federation(parameters(5, threshold=4, malicious=True)).phases()
    for phase in PHASES:
        for silo, request in federation.requests[phase].items():
            before = federation.states[silo]
            assert digest(federation.answer(phase, silo, request)) == digest(federation.replies[phase][silo])
            assert federation.states[silo] == before


def test_a_coordinator_holds_one_vector_however_many_silos() -> None:
    """Peak bytes of taking in 40 masked vectors of 400 kB: less than three of them."""
    import tracemalloc

    of = parameters(3, length=100_000, ring_bits=32)
    many = {s: np.zeros(of.length, np.uint32) for s in of.silos}
    federation = Federation(of, inputs=many).phases("shares")
    requests = federation.coordinator.train_requests()
    replies = {silo: federation.answer("train", silo, request) for silo, request in requests.items()}
    tracemalloc.start()
    for silo, reply in replies.items():
        for _ in range(13):
            federation.coordinator.take_masked(silo, reply)
            federation.coordinator._masked.clear()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * of.length


def test_phases_come_in_order() -> None:
    of = parameters(3)
    with pytest.raises(RunError, match="in order"):
        Coordinator(of, Federation(of).silos["silo-00"].directory).train_requests()
    federation = Federation(of)
    federation.run()
    with pytest.raises(RunError, match="in order"):
        federation.coordinator.finish()


@pytest.mark.parametrize(
    ("phase", "named"), [("keys", "keys"), ("shares", "shares"), ("train", "train"), ("unmask", "unmask")]
)
def test_below_the_threshold_the_phase_is_named(phase: str, named: str) -> None:
    federation = Federation(parameters(5, threshold=4), gone={phase: names(5)[:2]})
    with pytest.raises(RunError, match=f"phase '{named}'"):
        federation.run()


def test_too_few_signatures_under_the_list() -> None:
    federation = Federation(parameters(5, threshold=4, malicious=True), gone={"consistency": names(5)[:2]})
    with pytest.raises(RunError, match="phase 'consistency'"):
        federation.run()


def test_silos_whose_secrets_too_few_hold_are_left_out() -> None:
    """With two neighbours each and a threshold of three, one that is gone takes its neighbours along."""
    of = parameters(9, 2, 3)
    lost = names(9)[4]
    federation = Federation(of, gone={"keys": [lost]})
    with pytest.raises(RunError, match="phase 'keys'"):  # the chain that is left has ends, and they go one by one
        federation.run()
    of = parameters(9, 4, 4)
    summed = (federation := Federation(of, gone={"keys": [lost]})).run()
    assert summed.survivors == tuple(s for s in of.silos if s != lost)
    np.testing.assert_array_equal(summed.values, total(vectors(of), summed.survivors))
