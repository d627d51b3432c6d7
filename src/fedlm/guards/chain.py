"""Guards in a row, and error feedback over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import RunError, UpdateRefused
from fedlm.guards.base import Guard, Parts, Shapes, check_range, flat, magnitude, parted, size_of
from fedlm.messages import Tensors
from fedlm.randomness import numpy_generator

Key = tuple[int, *tuple[str | int, ...]]
"""The run's seed, and for what the chain draws: silo, round ..."""

REST = "values"
"""The part with the numbers that the last guard leaves, fp32."""


def update_key(seed: int, silo: str, round_: int, dispatch: int | None = None) -> Key:
    """The key of a silo's update; a `dispatch` tells the updates of one round apart in an asynchronous federation."""
    return (seed, silo, round_) if dispatch is None else (seed, silo, round_, dispatch)


def shared_key(seed: int, round_: int) -> Key:
    """The key of every silo's update where these are added up before they are decoded."""
    return (seed, "sum", round_)


class Chain:
    """An ordered chain of guards.

    A payload has the guards' parts, under '<position>.<part>', and what the last one leaves as 'values': a handful of
    flat tensors, since each tensor of a message costs some 80 bytes beside its numbers.

    Attributes:
        feedback: what it loses is to come back: `encode_with_feedback` is the way to use it.
    """

    def __init__(self, guards: Sequence[Guard], *, feedback: bool = False) -> None:
        self.guards, self.feedback = tuple(guards), feedback

    def encode(self, update: Mapping[str, Tensor], key: Key) -> Tensors:
        """The payload for an update.

        Raises:
            UpdateRefused: a tensor holds whole numbers, or values that are not finite or too large to be rounded, or a
                guard does not fit its size.
        """
        return self._encode(*flat(update), key)

    def encode_with_feedback(self, update: Mapping[str, Tensor], errors: Tensors, key: Key) -> tuple[Tensors, Tensors]:
        """The payload for an update with what was lost before, and what is lost now.

            p_t = u_t + e_t;  send C(p_t);  e_t+1 = p_t - C(p_t)

        (Seide et al., 2014; Karimireddy et al., ICML 2019, which calls it EF-SGD.) All that was ever lost is in e, so
        the sum of what was sent is the sum of the updates but for one e, which stays bounded where |p - C(p)| <=
        sqrt(1 - delta) |p|.

        Args:
            errors: e_t by name; tensors that are not part of this update wait. What was never sent before has none.

        Raises:
            UpdateRefused: as `encode`.
            RunError: an error is none that was kept of such an update.
        """
        values, shapes = flat(update)
        for name, error in errors.items():
            _check_error(name, error, shapes.get(name))
        for name, part in parted(values, shapes).items():
            if name in errors:
                part.add_(errors[name])
        check_range(values, "the update with what guards lost before")
        payload = self._encode(values, shapes, key)
        lost = values - self._decode(payload, shapes, key)
        return payload, {**errors, **parted(lost, shapes)}

    def decode(self, payload: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], key: Key) -> Tensors:
        """The update that a payload stands for: views of one fp32 buffer, in sorted order of their names.

        Args:
            payload: comes from outside; nothing of it is believed.
            shapes: of the update, as it must be.

        Raises:
            UpdateRefused: the payload is no encoding of such an update, or of values that are not finite.
        """
        ordered = {name: shapes[name] for name in sorted(shapes)}
        return parted(self._decode(payload, ordered, key), ordered)

    def layouts(self, shapes: Shapes) -> list[Shapes]:
        """What each guard works on, and at the end what the last one leaves.

        Raises:
            UpdateRefused: a guard does not fit numbers of these shapes.
        """
        found = [shapes]
        for guard in self.guards:
            found.append(guard.left(found[-1]))
        return found

    def _encode(self, values: Tensor, shapes: Shapes, key: Key) -> Tensors:
        payload: Tensors = {}
        for i, (guard, layout) in enumerate(zip(self.guards, self.layouts(shapes), strict=False)):
            values, parts = guard.encode(values, layout, _random(key, i))
            check_range(values, f"what '{guard.spec.name}' leaves of the update")
            payload |= {f"{i}.{name}": part for name, part in parts.items()}
        if len(values):
            payload[REST] = values
        return payload

    def _decode(self, payload: Mapping[str, Tensor], shapes: Shapes, key: Key) -> Tensor:
        layouts = self.layouts(shapes)
        self._check(payload, layouts)
        values = payload[REST].to(torch.float32) if REST in payload else torch.zeros(0)
        for i, guard in reversed(list(enumerate(self.guards))):
            parts = {name: payload[f"{i}.{name}"] for name in guard.parts(layouts[i])}
            values = guard.decode(values, parts, layouts[i], _random(key, i))
        if not math.isfinite(magnitude(values)):
            raise UpdateRefused("the payload stands for values that are not finite (NaN or infinity)")
        return values

    def parts(self, shapes: Mapping[str, torch.Size]) -> Parts:
        """The parts of the payload for an update of these shapes, with their types and lengths.

        Raises:
            UpdateRefused: a guard does not fit numbers of these shapes.
        """
        return self._parts(self.layouts({name: shapes[name] for name in sorted(shapes)}))

    def _parts(self, layouts: list[Shapes]) -> Parts:
        expected = {
            f"{i}.{name}": about
            for i, guard in enumerate(self.guards)
            for name, about in guard.parts(layouts[i]).items()
        }
        if rest := size_of(layouts[-1]):
            expected[REST] = (torch.float32, rest)
        return expected

    def _check(self, payload: Mapping[str, Tensor], layouts: list[Shapes]) -> None:
        """Exactly these parts, of exactly these types and lengths."""
        expected = self._parts(layouts)
        if payload.keys() != expected.keys():
            listed = ", ".join(repr(name[:40]) for name in sorted(payload)[:5])
            raise UpdateRefused(f"the payload has the parts {listed}, not {', '.join(map(repr, expected))}")
        for name, (dtype, length) in expected.items():
            part = payload[name]
            if part.dtype is not dtype or part.shape != (length,) or part.layout is not torch.strided:
                raise UpdateRefused(
                    f"the payload's '{name}' is {part.dtype} {list(part.shape)[:4]}, not {dtype} [{length}]"
                )


def _check_error(name: str, error: Tensor, shape: torch.Size | None) -> None:
    """Raises RunError: `encode_with_feedback` never kept this.

    Args:
        shape: the update's; None for a tensor that waits for a later one.
    """
    fault = ""
    if shape is not None and error.shape != shape:
        fault = f"has shape {list(error.shape)}, and the update's {list(shape)}"
    elif error.dtype is not torch.float32:
        fault = f"is {error.dtype}, not torch.float32"
    elif not math.isfinite(magnitude(error)):
        fault = "holds values that are not finite (NaN or infinity)"
    if fault:
        raise RunError(
            f"the error feedback kept of '{name}' {fault}", fix="restore the silo's state, or start a new run"
        )


def _random(key: Key, position: int) -> np.random.Generator:
    seed, *purpose = key
    return numpy_generator(seed, "guard", *purpose, position)
