"""The neighbour graph, and degrees and thresholds that keep the paper's conditions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import hypergeom

from fedlm.errors import RunError
from fedlm.privacy.secagg.graph import Design, Risk, check_design, choose, core, neighbours, ring_parts
from tests.privacy.secagg.parties import names


@pytest.mark.parametrize(("n", "degree"), [(3, 2), (5, 2), (5, 4), (20, 6), (20, 18), (20, 19), (61, 24)])
def test_regular_symmetric_and_connected(n: int, degree: int) -> None:
    graph = neighbours(names(n), degree, b"seed")
    assert all(len(near) == degree and silo not in near for silo, near in graph.items())
    assert all(silo in graph[other] for silo, near in graph.items() for other in near)
    assert ring_parts(graph, list(names(n))) == 1


def test_the_seed_and_the_names_alone_decide() -> None:
    silos = names(20)
    assert neighbours(silos, 4, b"a") == neighbours(silos[::-1], 4, b"a") != neighbours(silos, 4, b"b")


def test_the_order_is_uniform() -> None:
    """How often each pair of seven silos are neighbours of degree 2, over 3,000 seeds: chi-square of 20 degrees."""
    counts = dict.fromkeys(itertools.combinations(names(7), 2), 0)
    for seed in range(3000):
        graph = neighbours(names(7), 2, seed.to_bytes(4, "big"))
        for pair in counts:
            counts[pair] += pair[1] in graph[pair[0]]
    found = np.array(list(counts.values()))
    assert ((found - 1000.0) ** 2 / 1000).sum() < 60  # as wide as 1 in 10^5, neighbours on a ring being dependent


@pytest.mark.parametrize("degree", [0, 1, 3, 5, 20])
def test_no_such_graph(degree: int) -> None:
    with pytest.raises(RunError, match="ring of 20 silos"):
        neighbours(names(20), degree, b"")


def test_harary_graphs_stay_connected_without_any_degree_minus_one() -> None:
    """Harary (1962): connectivity equals the degree. No 3 of 9 silos with degree 4 part the rest; some 4 do."""
    graph = neighbours(names(9), 4, b"x")
    left = [ring_parts(graph, [s for s in names(9) if s not in gone]) for gone in itertools.combinations(names(9), 3)]
    assert set(left) == {1}
    assert any(
        ring_parts(graph, [s for s in names(9) if s not in gone]) > 1 for gone in itertools.combinations(names(9), 4)
    )


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("n", [50, 100, 200, 1000])
@pytest.mark.parametrize(("dropout", "corruption"), [(0.05, 0.05), (0.1, 0.1), (0.1, 0.0)])
def test_the_conditions_hold_with_scipys_hypergeometric(
    n: int, dropout: float, corruption: float, malicious: bool
) -> None:
    risk = Risk(dropout, corruption, malicious=malicious)
    k, t = (design := choose(n, risk)).degree, design.threshold
    corrupt, gone = (math.ceil(round(rate * n, 6)) for rate in (corruption, dropout))
    if malicious:
        assert k == n - 1, "a malicious coordinator chooses the seed of a sparse graph"
    if k == n - 1:
        assert corrupt < t <= n - gone
        assert not malicious or (2 * t > n + corrupt and 3 * t > 2 * n)
        return
    near = hypergeom(n - 1, corrupt, k)
    assert n * near.sf(t - 1) <= 2.0**-41
    assert n * hypergeom(n - 1, n - 1 - gone, k).cdf(t - 1) <= 2.0**-20
    apart = math.log2(n * (n - k - 1) / 2) + sum(math.log2(max(corrupt + gone - i, 0) or 1e-300) for i in range(k))
    assert apart - sum(math.log2(n - i) for i in range(k)) <= -41
    check_design(n, design, risk)


def test_the_smallest_degree_is_taken() -> None:
    """No smaller even degree has any threshold, with SciPy's quantiles."""
    n, risk = 1000, Risk(0.05, 0.05)
    k = choose(n, risk).degree
    for smaller in range(2, k, 2):
        low = next(t for t in range(smaller + 2) if n * hypergeom(n - 1, 50, smaller).sf(t - 1) <= 2.0**-41)
        lost = next(m for m in range(smaller + 1) if n * hypergeom(n - 1, 50, smaller).sf(m) <= 2.0**-20)
        parts = n * (n - smaller - 1) / 2 * math.perm(100, smaller) / math.perm(n, smaller)
        assert max(2, low) > smaller - lost or parts > 2.0**-41
    assert k < 60


def test_the_bound_on_falling_apart_is_above_exact_counts() -> None:
    """Ring of 12 with degree 4 and 5 gone: of all 792 ways, no more are apart than the union bound says."""
    graph = neighbours(names(12), 4, b"y")
    apart = sum(
        ring_parts(graph, [s for s in names(12) if s not in gone]) > 1 for gone in itertools.combinations(names(12), 5)
    )
    bound = 12 * 7 / 2 * math.perm(5, 4) / math.perm(12, 4)
    assert 0 < apart / math.comb(12, 5) <= bound < 2 * apart / math.comb(12, 5)


def test_few_silos_get_the_complete_graph() -> None:
    assert choose(3, Risk(0.0, 0.0)) == Design(2, 2)
    assert choose(5, Risk(0.2, 0.2)) == Design(4, 3)
    assert choose(10, Risk(0.2, 0.2, malicious=True)) == Design(9, 7)
    assert choose(3, Risk(0.0, 0.1, malicious=True)) == Design(2, 3)
    assert choose(32, Risk(0.05, 0.05)).degree == 31 and choose(33, Risk(0.05, 0.05)).degree < 32


def test_rates_are_taken_as_written() -> None:
    """0.07 x 100 is 7.000000000000001 in floating point; 7 silos may be corrupt. Parts of a silo are a whole one."""
    check_design(100, Design(99, 8), Risk(0.0, 0.07))
    for rate, least in ((0.07, 8), (0.0601, 8), (0.29, 30)):
        with pytest.raises(RunError, match=f"from {least}"):
            check_design(100, Design(99, least - 1), Risk(0.0, rate))


@pytest.mark.parametrize(
    ("n", "risk", "says"),
    [
        (2, Risk(0, 0), "3 to"),
        (10, Risk(0.5, 0.5), "two honest"),
        (10, Risk(0.4, 0.1, malicious=True), "cannot aggregate safely"),
        (10, Risk(0.3, 0.4, malicious=True), "cannot aggregate safely"),
        (10, Risk(-0.1, 0), "dropout rate"),
        (10, Risk(0, float("nan")), "corruption rate"),
        (10, Risk(0, 0, security=0), "bits"),
    ],
)
def test_no_safe_design(n: int, risk: Risk, says: str) -> None:
    with pytest.raises(RunError, match=says):
        choose(n, risk)


@pytest.mark.parametrize(
    ("design", "malicious", "says"),
    [
        (Design(99, 10), False, "from 11"),
        (Design(99, 66), True, "from 67"),
        (Design(4, 3), False, "connected"),
        (Design(33, 20), False, "no ring"),
        (Design(60, 62), False, "not safe"),
    ],
)
def test_designs_that_are_not_safe(design: Design, malicious: bool, says: str) -> None:
    with pytest.raises(RunError, match=says):
        check_design(100, design, Risk(0.1, 0.1, malicious=malicious))


def test_a_malicious_coordinator_leaves_the_complete_graph() -> None:
    risk = Risk(0.1, 0.1, malicious=True)
    assert choose(100, risk) == Design(99, 67)
    with pytest.raises(RunError, match="only the complete graph"):
        check_design(100, Design(98, 90), risk)


def test_core_leaves_out_who_could_not_be_unmasked() -> None:
    graph = neighbours(names(9), 2, b"x")
    ring = [names(9)[0]]
    while len(ring) < 9:
        ring.append(min(other for other in graph[ring[-1]] if other not in ring))
    assert core(graph, ring, 3) == set(ring)
    assert core(graph, ring[1:], 3) == frozenset()
    assert core(graph, ring[1:], 2) == set(ring[1:])
    assert core(graph, [*ring[1:3], ring[5]], 2) == set(ring[1:3])


def test_two_lists_cannot_both_reach_a_quorum() -> None:
    """As many honest silos as there are, each signs one list; corrupt ones (fewer than a third) sign both."""
    for n in range(3, 200):
        corrupt = (n - 1) // 3
        design = choose(n, Risk(0.0, max(corrupt - 0.5, 0) / n, malicious=True))
        assert 2 * design.threshold > n + corrupt
