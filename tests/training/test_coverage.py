"""Centres chosen for coverage, and public rows near them: against brute force, and against rows drawn at random."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedlm.randomness import numpy_generator
from fedlm.training.selection.coverage import (
    Points,
    centres_of,
    choose_centres,
    coverage,
    kmeans,
    nearest_public,
    units,
)

ZERO = np.zeros(8)


def topics(count: int, dimensions: int = 8) -> Points:
    return units(np.random.default_rng(0).normal(size=(count, dimensions)), np.zeros(dimensions))


def around(topic: Points, rows: int, generator: np.random.Generator) -> Points:
    return units(topic + generator.normal(0, 0.1, (rows, len(topic))), np.zeros(len(topic)))


def of(centres: dict[str, Points], chosen: dict[str, list[int]]) -> Points:
    return np.concatenate([centres[silo][numbers] for silo, numbers in chosen.items()])


def test_coverage_is_the_mean_of_the_best_cosine() -> None:
    domain = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert coverage(domain, np.array([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx((1.0 + 0.8 - 0.6) / 3)


def test_units_are_relative_to_the_middle() -> None:
    found = units(np.array([[3.0, 1.0], [1.0, 1.0], [1.0, -1.0]]), np.array([1.0, 1.0]))
    assert found.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]]


def test_kmeans_finds_groups_and_its_centres_are_their_means() -> None:
    generator = np.random.default_rng(1)
    places = topics(3)
    points = np.concatenate([around(place, 12, generator) for place in places])
    labels = kmeans(points, 3, numpy_generator(0, "test"))
    groups = [set(np.flatnonzero(labels == label).tolist()) for label in range(3)]
    assert sorted(map(min, groups)) == [0, 12, 24] and {len(group) for group in groups} == {12}
    found = centres_of(points, 3, 5, numpy_generator(0, "test"))
    means = units(np.stack([points[:12].mean(0), points[12:24].mean(0), points[24:].mean(0)]), ZERO)
    assert np.allclose(sorted(found.tolist()), sorted(means.tolist()), atol=1e-12)
    assert (centres_of(points, 3, 5, numpy_generator(0, "test")) == found).all()  # keyed


def test_no_centre_stands_for_fewer_rows_than_the_least() -> None:
    generator = np.random.default_rng(2)
    points = np.concatenate([around(place, rows, generator) for place, rows in zip(topics(2), (12, 2), strict=True)])
    found = centres_of(points, 2, 5, numpy_generator(0, "test"))
    assert len(found) == 1  # the group of two stays at home
    assert found[0] @ topics(2)[0] > 0.95
    assert centres_of(points[:4], 8, 5, numpy_generator(0, "test")).shape == (0, 8)
    assert len(centres_of(points[:9], 8, 5, numpy_generator(0, "test"))) == 1
    same = np.repeat(points[:1], 10, axis=0)
    assert len(centres_of(same, 2, 5, numpy_generator(0, "test"))) == 1


@pytest.mark.parametrize("seed", range(20))
def test_greedy_choice_against_the_best_there_is(seed: int) -> None:
    """One centre of each of four silos: at least half of the best gain is guaranteed; every single choice is the one
    that adds most."""
    generator = np.random.default_rng(seed)
    centres = {f"s{i}": units(generator.normal(size=(4, 8)), ZERO) for i in range(4)}
    everything = np.concatenate(list(centres.values()))
    chosen = choose_centres(centres, 1)
    assert all(len(numbers) == 1 for numbers in chosen.values())
    best = max(
        coverage(everything, np.stack([centres[s][n] for s, n in zip(centres, numbers, strict=True)]))
        for numbers in itertools.product(range(4), repeat=4)
    )
    reached = coverage(everything, of(centres, chosen))
    assert reached + 1 >= (best + 1) / 2 and reached > 0.85 * best  # gains count from -1, coverage by nothing
    first = max(range(16), key=lambda i: (coverage(everything, everything[i : i + 1]), -i))
    assert chosen[f"s{first // 4}"] == [first % 4]


def test_each_silo_gives_as_many_centres_as_it_has() -> None:
    centres = {"a": topics(5)[:1], "b": topics(5)[1:], "c": np.zeros((0, 8))}
    chosen = choose_centres(centres, 2)
    assert (chosen["a"], len(set(chosen["b"])), chosen["c"]) == ([0], 2, [])
    assert choose_centres({"c": np.zeros((0, 8))}, 2) == {"c": []}
    assert choose_centres(dict(reversed(centres.items())), 2) == chosen


def test_the_nearest_public_rows_shared_out_among_centres() -> None:
    public = units(np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0]]), np.zeros(2))
    centres = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert nearest_public(public, centres, 3).tolist() == [0, 1, 3]
    assert nearest_public(public, centres[:1], 4).tolist() == [0, 1, 2, 4]
    assert nearest_public(public, np.array([[1.0, 0.0], [1.0, 0.0]]), 3).tolist() == [0, 1, 2]  # no row twice


def test_coverage_rises_against_random_rows_and_uncoordinated_centres() -> None:
    """A domain of nine topics: six silos share three big ones and hold one small topic each. The public rows are of
    sixty topics, these nine among them. Over 10 federations, 30 public rows near chosen centres cover the domain better
    than 30 drawn at random, and than 30 near the centre of each silo's own largest group."""
    gains = []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        places = units(generator.normal(size=(60, 24)), np.zeros(24))
        domain = np.concatenate([around(place, 20, generator) for place in places[:9]])
        public = np.concatenate([around(place, 20, generator) for place in places])
        own = {}
        for i in range(6):
            shares = [around(places[t], 12 + t, generator) for t in range(3)] + [around(places[3 + i], 6, generator)]
            own[f"s{i}"] = np.concatenate(shares)
        centres = {s: centres_of(p, 4, 5, numpy_generator(seed, s)) for s, p in own.items()}
        held = np.concatenate(list(own.values()))

        def found(chosen: dict[str, list[int]]) -> Points:
            return np.concatenate([public[nearest_public(public, centres[s][n], 5)] for s, n in chosen.items()])  # noqa: B023

        one, three = (found(choose_centres(centres, each)) for each in (1, 3))
        largest = found({s: [int(np.argmax([(p @ c > 0.7).sum() for c in centres[s]]))] for s, p in own.items()})
        drawn = public[generator.permutation(len(public))[:30]]
        assert len(one) == len(three) == len(largest) == len(drawn)
        alone = [coverage(domain, rows) for rows in (one, three, drawn, largest)]
        with_own = [coverage(domain, np.concatenate([held, rows])) for rows in (one, three, drawn, largest)]
        gains.append(
            {
                "one centre, largest": alone[0] - alone[3],
                "one centre, random": alone[0] - alone[2],
                "three centres, random": alone[1] - alone[2],
                "three centres, random, own rows too": with_own[1] - with_own[2],
            }
        )
    least = {name: min(g[name] for g in gains) for name in gains[0]}
    assert least["one centre, largest"] > 0.1
    assert least["three centres, random"] > 0.1 and least["three centres, random, own rows too"] > 0.002
    assert np.mean([g["one centre, random"] for g in gains]) > 0.05  # in 7 of 10; random rows lie on more topics
