"""What an accountant must know of a release: whose data is protected, against which neighbour, under which noise.

A mechanism is plain data: frozen, comparable and JSON, so that a ledger can keep it for years. Costs are computed from
it in `fedlm.privacy.accounting`.

**Bound** is everywhere the largest L2 norm of what *one unit* puts into a sum. A noise multiplier is the noise's
standard deviation over that bound, never over a sensitivity: the adjacency says how far a unit moves the sum, once the
bound (it comes, goes or becomes zero) or twice (it becomes another).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from fedlm.errors import PrivacyError

Unit = Literal["example", "user", "silo"]
"""Whose data is protected as a whole: one row, all rows of a person, all rows of an organisation."""

Adjacency = Literal["add-or-remove", "zero-out", "replace"]
"""Neighbouring data: with or without a unit; its contribution set to zero (everything else, the number of units
included, being public: Kairouz et al., "Practical and Private (Deep) Learning without Sampling or Shuffling", 2021,
definition 1.1); or replaced by any other."""

Noise = Literal["discrete-gaussian", "skellam"]


@dataclass(frozen=True)
class Everyone:
    """Every unit may be in every release.

    Also right, without amplification, for any sampling that others may know, as long as neighbours are sampled alike:
    always with zero-out and replace; with add-or-remove only where units are sampled independently.
    """


@dataclass(frozen=True)
class Poisson:
    """Each unit is in a release independently of all others.

    Args:
        rate: the probability, in (0, 1].
        secret: nobody who sees the release can learn who was sampled. Sampling makes privacy better only if so.
    """

    rate: float
    secret: bool

    def __post_init__(self) -> None:
        _check("sampling rate", self.rate, 0 < self.rate <= 1, "above 0 and at most 1")


@dataclass(frozen=True)
class FixedSize:
    """So many units of all, uniformly without replacement.

    Args:
        size: units in a release, 1 to population.
        population: all units.
        secret: as in `Poisson`.
    """

    size: int
    population: int
    secret: bool

    def __post_init__(self) -> None:
        _check("population", self.population, self.population >= 1, "at least 1")
        _check("sample", self.size, 1 <= self.size <= self.population, "1 up to the population")


Sampling = Everyone | Poisson | FixedSize


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise on a sum of bounded contributions, `count` times; each time may depend on what was released
    before.

    Args:
        noise_multiplier: standard deviation over bound; None while it is to be found (`fedlm.privacy.calibration`).
        sampling: who is in a release.
        count: releases (steps, rounds), at least 1.
    """

    unit: Unit
    adjacency: Adjacency
    noise_multiplier: float | None
    sampling: Sampling = Everyone()
    count: int = 1

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(frozen=True)
class DistributedNoise:
    """Every silo rounds its bounded vector to a grid and adds integer noise; only the sum of all is seen.

    All lengths are in steps of the grid.

    Args:
        noise: of each silo: discrete Gaussian (Kairouz, Liu, Steinke, ICML 2021) or Skellam (Agarwal, Kairouz, Liu,
            NeurIPS 2021).
        noise_multiplier: scale of the noise of `survivors` silos together, over the bound. For the discrete Gaussian
            scale is the parameter sigma, the standard deviation of a continuous one.
        bound: of the vector's L2 norm before rounding.
        dimension: numbers in a vector.
        survivors: the fewest silos whose noise is in a sum and that keep it to themselves: neither lost on the way nor
            in league with whoever looks. More of them only add noise that does not depend on data.
        retry: beta of the conditional randomised rounding (`fedlm.privacy.rounding`): rounding is repeated until
            the norm is below a bound which a trial misses with at most this probability. 0: rounded once, with the
            worst case as bound. None: vectors are whole numbers already.
        count: releases, at least 1.
    """

    unit: Unit
    adjacency: Adjacency
    noise: Noise
    noise_multiplier: float | None
    bound: float
    dimension: int
    survivors: int
    retry: float | None = math.exp(-0.5)
    count: int = 1

    def __post_init__(self) -> None:
        _check_common(self)
        if self.noise not in get_args(Noise):
            raise PrivacyError(f"noise '{self.noise}' is none of {', '.join(get_args(Noise))}")
        if self.adjacency == "add-or-remove":
            raise PrivacyError(
                "distributed noise has no guarantee under add-or-remove: a silo that leaves takes its noise along",
                fix="use zero-out or replace, where the number of silos is public",
            )
        _check("bound", self.bound, math.isfinite(self.bound) and self.bound > 0, "above 0 and finite")
        _check("dimension", self.dimension, self.dimension >= 1, "at least 1")
        _check("survivors", self.survivors, self.survivors >= 1, "at least 1")
        if self.retry is not None:
            _check("retry", self.retry, 0 <= self.retry < 1, "0 up to below 1")

    def silo_scale(self) -> float:
        """Scale of each silo's own noise, in steps of the grid: discrete Gaussian's sigma, Skellam's standard
        deviation."""
        return noise_multiplier(self) * self.bound / math.sqrt(self.survivors)


Mechanism = Gaussian | DistributedNoise

_SAMPLINGS: dict[str, type[Everyone] | type[Poisson] | type[FixedSize]] = {
    "everyone": Everyone,
    "poisson": Poisson,
    "fixed-size": FixedSize,
}
_MECHANISMS: dict[str, type[Gaussian] | type[DistributedNoise]] = {
    "gaussian": Gaussian,
    "distributed-noise": DistributedNoise,
}


def noise_multiplier(mechanism: Mechanism) -> float:
    """Raises PrivacyError: it is not known yet."""
    if mechanism.noise_multiplier is None:
        raise PrivacyError("the mechanism has no noise multiplier yet", fix="calibrate it to a budget")
    return mechanism.noise_multiplier


def times(mechanism: Mechanism, count: int) -> Mechanism:
    """The same, `count` times."""
    return dataclasses.replace(mechanism, count=count)


def to_json(mechanism: Mechanism) -> dict[str, Any]:
    """Plain JSON; `from_json` gives an equal mechanism."""
    found = {"kind": _kind(mechanism, _MECHANISMS), **dataclasses.asdict(mechanism)}
    if isinstance(mechanism, Gaussian):
        found["sampling"] = {"kind": _kind(mechanism.sampling, _SAMPLINGS), **found["sampling"]}
    return found


def from_json(value: Any) -> Mechanism:
    """Raises PrivacyError: not what `to_json` gives."""
    fields = dict(_fields(value, _MECHANISMS, "mechanism"))
    kind = _MECHANISMS[fields.pop("kind")]
    if kind is Gaussian:
        sampling = dict(_fields(fields.get("sampling"), _SAMPLINGS, "sampling"))
        fields["sampling"] = _made(_SAMPLINGS[sampling.pop("kind")], sampling)
    return cast(Mechanism, _made(kind, fields))


def describe(mechanism: Mechanism) -> str:
    """In a few words, for messages."""
    repeated = "once" if mechanism.count == 1 else f"{mechanism.count} times"
    size = "noise to be found" if mechanism.noise_multiplier is None else f"noise {mechanism.noise_multiplier:.4g}"
    if isinstance(mechanism, DistributedNoise):
        return f"{mechanism.noise} {size} of {mechanism.survivors} silos together, {repeated}"
    match mechanism.sampling:
        case Poisson(rate=rate):
            sampled = f", sampled at {rate:.4g}"
        case FixedSize(size=chosen, population=population):
            sampled = f", {chosen} of {population} sampled"
        case _:
            sampled = ""
    return f"gaussian {size}{sampled}, {repeated}"


def _check_common(mechanism: Mechanism) -> None:
    for name, known in (("unit", get_args(Unit)), ("adjacency", get_args(Adjacency))):
        if getattr(mechanism, name) not in known:
            raise PrivacyError(f"{name} '{getattr(mechanism, name)}' is none of {', '.join(known)}")
    _check("count", mechanism.count, mechanism.count >= 1, "at least 1")
    noise = mechanism.noise_multiplier
    if noise is not None:
        _check("noise multiplier", noise, math.isfinite(noise) and noise > 0, "above 0 and finite")


def _check(name: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise PrivacyError(f"{name} is {value}; it must be {rule}")


def _kind(value: object, known: dict[str, Any]) -> str:
    return next(name for name, kind in known.items() if type(value) is kind)


def _fields(value: Any, known: dict[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("kind") not in known:
        raise PrivacyError(f"no {what}: expected an object with kind {' or '.join(known)}")
    return value


_TYPES = {"float": (int, float), "int": (int,), "bool": (bool,), "None": (type(None),)}


def _made(kind: type, values: dict[str, Any]) -> Any:
    """An instance, if names and types are exactly the fields'."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    if set(values) != set(fields):
        raise PrivacyError(f"{kind.__name__}: fields {sorted(values)} instead of {sorted(fields)}")
    for name, annotation in fields.items():
        allowed = tuple(
            t for part in annotation.split(" | ") for t in _TYPES.get(part, (str, Everyone, Poisson, FixedSize))
        )
        if not isinstance(values[name], allowed) or (isinstance(values[name], bool) and bool not in allowed):
            raise PrivacyError(f"{kind.__name__}: {name} is {type(values[name]).__name__}, expected {annotation}")
    return kind(**values)
