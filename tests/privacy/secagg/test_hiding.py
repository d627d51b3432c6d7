"""A masked vector tells nothing, and below the threshold nothing can be taken off it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fedlm.privacy.secagg import Encoding, encode, keys
from fedlm.privacy.secagg.masks import add_mask, subtract_mask
from fedlm.privacy.secagg.message import Message, Words
from fedlm.privacy.secagg.packing import unpack
from fedlm.privacy.secagg.parameters import Parameters
from fedlm.privacy.secagg.shamir import recover
from tests.privacy.secagg.parties import Federation, names, parameters, with_array

LENGTH = 200_000
ENCODING = Encoding(scale=0.1, bits=10, largest_weight=4, silos=4)


def plain() -> dict[str, Words]:
    """What real updates look like: small values around 0, far from uniform in the ring."""
    random = np.random.default_rng(0)
    return {s: encode(random.normal(0, 0.02, LENGTH - 1), 3, ENCODING, random)[0] for s in names(4)}


def of() -> Parameters:
    return parameters(4, threshold=3, length=LENGTH, ring_bits=ENCODING.ring_bits)


def uniform(values: Words) -> float:
    """p-value of chi-square over all 16,384 elements of the ring, 12 of each expected."""
    return float(stats.chisquare(np.bincount(values, minlength=2**ENCODING.ring_bits)).pvalue)


def related(values: Words, source: Words) -> float:
    """p-value of no linear correlation."""
    return float(stats.pearsonr(values.astype(float), source.astype(float)).pvalue)


def test_a_masked_vector_is_uniform_and_unrelated_to_the_plain_one() -> None:
    """Each p-value is below 1e-6 once in a million; without the masks all are 0."""
    inputs = plain()
    federation = Federation(of(), inputs=inputs).phases("train")
    for silo, reply in federation.replies["train"].items():
        masked = unpack(reply.arrays["masked"], LENGTH, ENCODING.ring_bits)
        assert uniform(masked) > 1e-6 and related(masked, inputs[silo]) > 1e-6
        for bit in (1, 2**4, 2**11):  # each bit by itself, too
            assert stats.binomtest(int(np.count_nonzero(masked & bit)), LENGTH).pvalue > 1e-6
        assert uniform(inputs[silo]) == 0 and related(inputs[silo], inputs[silo]) == 0
        leaking = masked.copy()  # the tests have power: one unmasked element in twenty, or in two, is seen
        leaking[::20] = inputs[silo][::20]
        assert uniform(leaking) < 1e-6
        leaking[::2] = inputs[silo][::2]
        assert related(leaking, inputs[silo]) < 1e-6


def test_pairwise_masks_alone_and_self_mask_alone_both_hide() -> None:
    """Once a share of either secret may be given out the other mask must hide by itself."""
    inputs = plain()
    federation = Federation(of(), inputs=inputs).phases("train")
    state, p = federation.state("silo-01"), federation.parameters
    masked = unpack(federation.replies["train"]["silo-01"].arrays["masked"], LENGTH, p.ring_bits)
    without_self = masked.copy()
    subtract_mask(without_self, keys.self_mask_key(p, state.seed, "silo-01"))
    without_pairs = (masked - without_self + inputs["silo-01"]) % np.uint32(2**p.ring_bits)
    for each in (without_self % np.uint32(2**p.ring_bits), without_pairs):
        assert uniform(each) > 1e-6 and related(each, inputs["silo-01"]) > 1e-6
        assert not np.array_equal(each, inputs["silo-01"])


def test_two_attempts_have_unrelated_masks() -> None:
    inputs = plain()
    first, second = (
        unpack(Federation(of(), inputs=inputs).phases("train").replies["train"]["silo-01"].arrays["masked"], LENGTH, 14)
        for _ in range(2)
    )
    assert uniform((first - second) % np.uint32(2 ** of().ring_bits)) > 1e-6


@pytest.mark.parametrize("threshold", [2, 3, 4])
def test_coalitions_below_the_threshold_cannot_reconstruct(threshold: int) -> None:
    """Every set of silos that gives the coordinator all it holds: with the threshold both secrets of a silo come out,
    with one fewer neither, whatever the threshold is taken to be."""
    federation = Federation(parameters(5, threshold=threshold)).phases("train")
    target = federation.state("silo-04")
    secrets = [int.from_bytes(secret, "big") for secret in (target.seed, target.mask)]
    held = {s: federation.state(s).held["silo-04"] for s in names(4)}
    place = federation.parameters.places
    for kind, secret in enumerate(secrets):
        for coalition in combinations(names(4), threshold):
            shares = [(place[s], held[s][kind]) for s in coalition]
            assert recover(shares, threshold) == secret
            assert all(recover(shares[:-1], fewer) != secret for fewer in range(1, threshold))


def test_a_vector_that_comes_too_late_stays_hidden() -> None:
    """Of a silo that counts as dropped out only mask keys were given out: with all pairwise masks off, its self mask
    still hides it."""
    p, silo = parameters(5, threshold=3, length=5000, ring_bits=8), "silo-02"
    late: list[Message] = []

    def withhold(phase: str, sender: str, reply: Message) -> Message:
        if (phase, sender) != ("train", silo):
            return reply
        late.append(reply)
        return with_array(reply, "masked", reply.arrays["masked"][:-1])

    inputs = {s: np.zeros(5000, np.uint32) for s in p.silos}
    federation = Federation(p, alter=withhold, inputs=inputs)
    assert silo not in federation.run().survivors
    for reply in federation.replies["unmask"].values():
        assert silo in reply.fields["dropped"] and silo not in reply.fields["survived"]
    shares = [
        (p.places[s], int.from_bytes(reply.arrays["key"][reply.fields["dropped"].index(silo)].tobytes(), "big"))
        for s, reply in federation.replies["unmask"].items()
    ]
    private = keys.loaded(recover(shares, 3).to_bytes(32, "big"))
    found = unpack(late[0].arrays["masked"], 5000, 8)
    for peer in p.among(silo, p.silos):
        public = federation.replies["keys"][peer].arrays["mask"].tobytes()
        key = keys.mask_key(p, private, public, silo, peer)
        (subtract_mask if silo < peer else add_mask)(found, key)
    found %= np.uint32(256)
    assert stats.chisquare(np.bincount(found, minlength=256)).pvalue > 1e-6
    subtract_mask(found, keys.self_mask_key(p, federation.state(silo).seed, silo))
    assert not (found % np.uint32(256)).any()  # that was all there was left
