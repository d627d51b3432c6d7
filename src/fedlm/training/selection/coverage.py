"""Public rows that let all silos together cover a domain (after FedDCA: Wang et al., Findings of EMNLP 2025).

In the silo: k-means puts its rows into groups; their centres go to the coordinator. There: one centre after the other
is chosen so that the chosen ones cover all silos' centres best, `centres` of each silo. In the silo again: the public
rows nearest to its chosen centres are trained on beside its own.

Rows are described by `representatives.features`, here relative to the mean of the public rows, which everybody can
compute, and with unit length: the states of a language model share a large part that tells rows not apart. The
coverage of points D by points C is the mean over d in D of max over c in C of cos(d, c), the facility-location
function. It is monotone and submodular, so choosing greedily under a number per silo reaches at least half of the best
gain (Fisher, Nemhauser and Wolsey, 1978).

What differs: the paper describes rows by a text encoder, and its server retrieves public rows and sends them. Here the
model describes rows, and each silo retrieves for itself, so that two silos may take the same row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

MOST_STEPS = 100
"""Of k-means."""


def units(points: Points, middle: Points) -> Points:
    """Points relative to `middle`, with unit length; a point in the middle is zero."""
    moved = points - middle
    lengths: Points = np.linalg.norm(moved, axis=1, keepdims=True)
    found: Points = moved / np.where(lengths > 0, lengths, 1.0)
    return found


def coverage(domain: Points, chosen: Points) -> float:
    """Mean over the domain's points [n, d] of the largest cosine with a chosen point [m, d]; all of unit length."""
    return float((domain @ chosen.T).max(axis=1).mean())


def centres_of(points: Points, clusters: int, least: int, generator: np.random.Generator) -> Points:
    """The centres [groups, d], of unit length, of groups of at least `least` rows; none where there are fewer rows.

    Args:
        points: of unit length [n, d].
        clusters: the most groups.
        generator: draws where k-means begins.
    """
    count = min(clusters, len(points) // least)
    if not count:
        return np.zeros((0, points.shape[1]))
    labels = kmeans(points, count, generator)
    groups = [points[labels == label] for label in range(count)]
    means = [group.mean(axis=0) for group in groups if len(group) >= least] or [points.mean(axis=0)]
    found = units(np.stack(means), np.zeros(points.shape[1]))
    lengths: Points = np.linalg.norm(found, axis=1)
    return found[lengths > 0]


def kmeans(points: Points, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Each point's group, by Lloyd's steps from drawn rows that lie apart (k-means++: Arthur and Vassilvitskii, 2007).
    Written out because the order of sums, and so the last bit, must not depend on threads."""
    starts = [int(generator.integers(len(points)))]
    nearest = ((points - points[starts[0]]) ** 2).sum(axis=1)
    while len(starts) < count and nearest.sum() > 0:
        starts.append(int(generator.choice(len(points), p=nearest / nearest.sum())))
        nearest = np.minimum(nearest, ((points - points[starts[-1]]) ** 2).sum(axis=1))
    middles, labels = points[starts], np.full(len(points), -1)
    for _ in range(MOST_STEPS):
        distances = np.stack([((points - middle) ** 2).sum(axis=1) for middle in middles], axis=1)
        moved = distances.argmin(axis=1)
        if (moved == labels).all():
            break
        labels = moved
        for label in range(len(middles)):
            if (labels == label).any():
                middles[label] = points[labels == label].mean(axis=0)
    return labels.astype(np.int64)


def choose_centres(centres: Mapping[str, Points], each: int) -> dict[str, list[int]]:
    """By silo, the numbers of its chosen centres in the order of choice: always the one that adds most to the coverage
    of all silos' centres (of equals the first in the order of names), until each silo has `each` or all of its own."""
    owners = [(silo, number) for silo in sorted(centres) for number in range(len(centres[silo]))]
    chosen: dict[str, list[int]] = {silo: [] for silo in sorted(centres)}
    if not owners:
        return chosen
    points = np.concatenate([centres[silo] for silo in sorted(centres) if len(centres[silo])])
    alike = points @ points.T
    covered = np.full(len(points), -1.0)  # by nothing: the smallest cosine there is
    free = np.ones(len(points), bool)
    while free.any():
        gains = np.where(free, np.maximum(alike, covered[:, None]).sum(axis=0), -np.inf)
        best = int(np.argmax(gains))
        silo, number = owners[best]
        chosen[silo].append(number)
        covered = np.maximum(covered, alike[:, best])
        free[best] = False
        if len(chosen[silo]) == each:
            free &= np.array([owner != silo for owner, _ in owners])
    return chosen


def nearest_public(public: Points, centres: Points, rows: int) -> NDArray[np.int64]:
    """Sorted indices of the `rows` public points [n, d] nearest to the centres [k, d]: each centre takes its share in
    turn, of equals the first, and no point twice; the first centres take what does not divide."""
    taken = np.zeros(len(public), bool)
    for number, centre in enumerate(centres):
        share = rows // len(centres) + (number < rows % len(centres))
        order = np.argsort(-(public * centre).sum(axis=1), kind="stable")  # summed alike whatever the threads
        taken[order[~taken[order]][:share]] = True
    return np.flatnonzero(taken)
