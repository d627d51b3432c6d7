"""Who holds which rows in a simulation. Every row is dealt exactly once; every draw is keyed by the run's seed.

Rows are dealt role by role (training, validation, test) with the same proportions, so that a silo's held-out rows look
like its training rows and no silo is left without training rows by an unlucky split.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.errors import DataError
from fedlm.randomness import numpy_generator
from fedlm.recipe.schema import PartitionSpec

Ints = npt.NDArray[np.int64]
_DRAWS = 10
"""Fresh draws of a skewed partition before rows are moved from the largest silos to those below min_rows."""


def deal(dataset: Any, spec: PartitionSpec, seed: int, roles: Ints | None = None) -> dict[str, Ints]:
    """Deal rows to silos.

    Args:
        dataset: anything whose ["label"], ["domain"], ["group"] give one str per row (a Dataset of examples).
        spec: how.
        seed: the run's seed.
        roles: int per row; 0 = training (default: all 0). Each role is dealt alike; min_rows counts training rows.

    Returns:
        Sorted row indices per silo, silos sorted by name. Rows are missing only where a natural partition leaves small
        groups out.

    Raises:
        DataError: the rows cannot be dealt so that every silo has `min_rows` training rows.
    """
    n = len(dataset)
    roles = np.zeros(n, np.int64) if roles is None else roles
    names, owner = _DEALERS[spec.kind](dataset, spec, seed, roles)
    have = np.bincount(owner[(roles == 0) & (owner >= 0)], minlength=len(names))
    short = [name for name, rows in zip(names, have, strict=True) if rows < spec.min_rows]
    if short:
        least = names[int(np.argmin(have))]
        raise DataError(
            f"{len(short)} of {len(names)} silos would hold fewer training rows than min_rows: {spec.min_rows}; "
            f"silo '{least}' holds {have.min()} of {int((roles == 0).sum())}",
            where="data.partition",
            fix="use fewer silos, a larger alpha, more rows, or a smaller min_rows",
        )
    order = np.argsort(owner, kind="stable").astype(np.int64)
    order = order[owner[order] >= 0]
    parts = np.split(order, np.cumsum(np.bincount(owner[owner >= 0], minlength=len(names)))[:-1])
    return dict(sorted(zip(names, parts, strict=True)))


def _numbered(n: int) -> list[str]:
    return [f"silo-{i:0{max(4, len(str(n - 1)))}d}" for i in range(n)]


def _codes(dataset: Any, column: str) -> tuple[list[str], Ints]:
    values, codes = np.unique(np.asarray(dataset[column][:], dtype=object).astype(str), return_inverse=True)
    return [str(v) for v in values], codes.astype(np.int64)


def _labels(dataset: Any, spec: PartitionSpec) -> Ints:
    values, codes = _codes(dataset, "group" if spec.by else "label")
    if values == [""]:
        raise DataError(
            f"a '{spec.kind}' partition needs a label per row, and these rows have none",
            where="data.partition",
            fix="set columns.label in the sources, or partition.by",
        )
    return codes


def _shares(owner: Ints, rows: Ints, proportions: npt.NDArray[np.float64]) -> None:
    """Give consecutive runs of `rows` to the silos in these proportions; whole numbers by rounding the running sum."""
    ends = np.rint(np.cumsum(proportions) / proportions.sum() * len(rows)).astype(np.int64)
    ends[-1] = len(rows)
    owner[rows] = np.repeat(np.arange(len(proportions)), np.diff(ends, prepend=0))


def _enough(roles: Ints, silos: int, spec: PartitionSpec) -> None:
    rows = int((roles == 0).sum())
    possible = rows // spec.min_rows
    if possible < silos:
        raise DataError(
            f"{rows} training rows cannot give each of {silos} silos min_rows: {spec.min_rows}; "
            + (f"at most {possible} silos are possible" if possible else "they are too few for any silo"),
            where="data.partition",
            fix=("use fewer silos, more rows," if possible else "use more rows") + " or a smaller min_rows",
        )


def _iid(dataset: Any, spec: PartitionSpec, seed: int, roles: Ints) -> tuple[list[str], Ints]:
    del dataset
    silos = spec.silos or 1
    _enough(roles, silos, spec)
    owner = np.empty(len(roles), np.int64)
    for role in np.unique(roles):
        rng = numpy_generator(seed, "partition", "iid", int(role))
        rows = rng.permutation(np.flatnonzero(roles == role))
        owner[rows] = rng.permutation(silos)[np.arange(len(rows)) % silos]
    return _numbered(silos), owner


def _dirichlet(dataset: Any, spec: PartitionSpec, seed: int, roles: Ints) -> tuple[list[str], Ints]:
    """Per label, proportions over the silos ~ Dir(alpha) (Hsu, Qi and Brown, 2019, arXiv:1909.06335)."""
    labels, silos = _labels(dataset, spec), spec.silos or 1
    _enough(roles, silos, spec)
    owner = np.empty(len(roles), np.int64)
    for draw in range(_DRAWS):
        rng = numpy_generator(seed, "partition", "dirichlet", draw)
        for label in range(labels.max() + 1):
            proportions = rng.dirichlet(np.full(silos, spec.alpha))
            for role in np.unique(roles):
                _shares(owner, rng.permutation(np.flatnonzero((labels == label) & (roles == role))), proportions)
        if np.bincount(owner[roles == 0], minlength=silos).min() >= spec.min_rows:
            break
    _repair(owner, roles, silos, spec.min_rows, rng)
    return _numbered(silos), owner


def _quantity(dataset: Any, spec: PartitionSpec, seed: int, roles: Ints) -> tuple[list[str], Ints]:
    """Sizes ~ Dir(alpha), labels alike (Li et al., ICDE 2022, 'quantity skew')."""
    del dataset
    silos = spec.silos or 1
    _enough(roles, silos, spec)
    owner = np.empty(len(roles), np.int64)
    for draw in range(_DRAWS):
        rng = numpy_generator(seed, "partition", "quantity", draw)
        proportions = rng.dirichlet(np.full(silos, spec.alpha))
        for role in np.unique(roles):
            _shares(owner, rng.permutation(np.flatnonzero(roles == role)), proportions)
        if np.bincount(owner[roles == 0], minlength=silos).min() >= spec.min_rows:
            break
    _repair(owner, roles, silos, spec.min_rows, rng)
    return _numbered(silos), owner


def _repair(owner: Ints, roles: Ints, silos: int, least: int, rng: np.random.Generator) -> None:
    """Move single training rows from the largest silo to those below `least`. Ends, since there are rows enough."""
    have = np.bincount(owner[roles == 0], minlength=silos)
    if have.min() >= least:
        return
    train = rng.permutation(np.flatnonzero(roles == 0))
    train = train[np.argsort(owner[train], kind="stable")]
    held = [part.tolist() for part in np.split(train, np.cumsum(have)[:-1])]
    largest = [(-len(rows), silo) for silo, rows in enumerate(held)]
    heapq.heapify(largest)
    for silo in np.flatnonzero(have < least).tolist():
        for _ in range(least - len(held[silo])):
            _, giver = heapq.heappop(largest)
            owner[held[giver].pop()] = silo
            heapq.heappush(largest, (-len(held[giver]), giver))


def _sharded(dataset: Any, spec: PartitionSpec, seed: int, roles: Ints) -> tuple[list[str], Ints]:
    """Sort by label, cut into silos x shards_per_silo shards, deal them (McMahan et al., AISTATS 2017)."""
    labels, silos = _labels(dataset, spec), spec.silos or 1
    _enough(roles, silos, spec)
    count = silos * spec.shards_per_silo
    rng = numpy_generator(seed, "partition", "shards")
    holder = rng.permutation(count) // spec.shards_per_silo
    owner = np.empty(len(roles), np.int64)
    for role in np.unique(roles):
        rows = rng.permutation(np.flatnonzero(roles == role))
        rows = rows[np.argsort(labels[rows], kind="stable")]
        owner[rows] = holder[np.arange(len(rows)) * count // max(1, len(rows))]
    return _numbered(silos), owner


def _counts_by_itself(spec: PartitionSpec) -> None:
    if spec.silos is not None:
        raise DataError(
            f"`silos` does not apply to a {spec.kind} partition, which counts by itself",
            where="data.partition",
            fix="use max_silos to keep the largest groups only" if spec.kind == "natural" else "leave it out",
        )


def _natural(dataset: Any, spec: PartitionSpec, seed: int, roles: Ints) -> tuple[list[str], Ints]:
    """A silo per value of `by`; groups with fewer than min_rows training rows are left out."""
    del seed
    values, codes = _codes(dataset, "group")
    _counts_by_itself(spec)
    have = np.bincount(codes[roles == 0], minlength=len(values))
    kept = sorted(np.flatnonzero(have >= spec.min_rows).tolist(), key=lambda c: (-int(have[c]), values[c]))
    kept = sorted(kept[: spec.max_silos])
    if not kept:
        raise DataError(
            f"none of the {len(values)} groups by '{spec.by}' has min_rows: {spec.min_rows} training rows; "
            f"the largest has {have.max(initial=0)}",
            where="data.partition",
            fix="choose another column or pattern, or a smaller min_rows",
        )
    silo_of = np.full(len(values), -1, np.int64)
    silo_of[kept] = np.arange(len(kept))
    return slugs([values[c] for c in kept]), silo_of[codes]


def _domains(dataset: Any, spec: PartitionSpec, seed: int, roles: Ints) -> tuple[list[str], Ints]:
    """A silo per source."""
    del seed, roles
    _counts_by_itself(spec)
    values, codes = _codes(dataset, "domain")
    return slugs(values), codes


def slugs(values: list[str]) -> list[str]:
    """Distinct silo names for distinct values: letters, digits, '.', '_' and '-', at most 64 characters."""
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "-", v).strip("-._")[:64] or "silo" for v in values]
    folded = [p.casefold() for p in plain]
    times = Counter(folded)  # folders are named after silos, and some disks ignore case
    return [
        p if times[f] == 1 else f"{p[:55]}-{hashlib.sha256(v.encode()).hexdigest()[:8]}"
        for p, f, v in zip(plain, folded, values, strict=True)
    ]


_DEALERS: dict[str, Callable[[Any, PartitionSpec, int, Ints], tuple[list[str], Ints]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "quantity": _quantity,
    "shards": _sharded,
    "natural": _natural,
    "domain": _domains,
}
