"""A payload comes from outside: whatever is in it, the answer is an update of the right shapes, or a refusal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlm.errors import UpdateRefused
from fedlm.guards import indices
from fedlm.guards.base import LARGEST
from fedlm.messages import Tensors
from tests.guards.test_guards import KEY, LOSSY, chain, shapes_of, update, whole


@pytest.mark.parametrize("specs", LOSSY, ids=str)
def test_missing_extra_misshapen_and_mistyped_parts(specs: list[dict[str, Any]]) -> None:
    made, shapes = chain(*specs), shapes_of(update())
    payload = made.encode(update(), KEY)
    for name, part in payload.items():
        others = {n: p for n, p in payload.items() if n != name}
        for bad in (
            others,
            others | {name: part[:-1]},
            others | {name: torch.cat([part, part[:1]])},
            others | {name: part.view(1, -1)},
            others | {name: part.to(torch.float64)},
            others | {name: part.to_sparse()},
            payload | {"more": part},
            payload | {"0.weights": part},
            {},
        ):
            with pytest.raises(UpdateRefused, match="payload"):
                made.decode(bad, shapes, KEY)
    if not any("k" in spec for spec in specs):  # a fixed number of values does not depend on the update's size
        with pytest.raises(UpdateRefused, match="payload"):
            made.decode(payload, {**shapes, "more": torch.Size([6400])}, KEY)


EDGES = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1.0, 2.0, 65504.0, 2.0**109, 2.0**127, 3.4e38, 1e-45, 2.0**-24)


@st.composite
def hostile(draw: st.DrawFn, payload: Tensors) -> Tensors:
    """A payload with one to three parts changed: noise, edges of the number format, another type or size, or gone."""
    found: dict[str, Tensor] = dict(payload)
    for name in draw(st.lists(st.sampled_from(sorted(payload)), min_size=1, max_size=3, unique=True)):
        part = payload[name]
        kind = draw(st.sampled_from(("noise", "noise", "edge", "edge", "one edge", "bytes", "shape", "huge", "type")))
        seed = draw(st.integers(0, 2**16))
        edge = EDGES[seed % len(EDGES)]
        match kind:
            case "noise":
                noise = np.random.default_rng(seed).bytes(part.nbytes)
                part = torch.frombuffer(bytearray(noise), dtype=part.dtype)
            case "bytes":
                part = torch.full((part.nbytes,), seed % 256, dtype=torch.uint8).view(part.dtype)
            case "edge" if part.is_floating_point():
                part = torch.full(part.shape, edge).to(part.dtype)
            case "one edge" if part.is_floating_point():
                part = part.clone()
                part[seed % len(part)] = torch.tensor(edge).to(part.dtype)
            case "shape":
                part = part.repeat(1 + seed % 2)[seed % 3 :]
            case "huge":  # without memory of its own: what copies it runs out of it
                part = part[:1].expand(10**12)
            case "type":
                part = part.view(torch.uint8)[: len(part)]
        found[name] = part
    if not draw(st.integers(0, 20)):
        del found[draw(st.sampled_from(sorted(found)))]
    return found


@pytest.mark.parametrize("specs", LOSSY, ids=str)
def test_any_message_gives_a_finite_update_of_the_right_shapes_or_a_refusal(specs: list[dict[str, Any]]) -> None:
    made, shapes = chain(*specs), shapes_of(update())
    counts = {"accepted": 0, "refused": 0}

    @settings(max_examples=150, deadline=None)
    @given(payload=hostile(made.encode(update(), KEY)))
    def decoded(payload: Tensors) -> None:
        try:
            back = made.decode(payload, shapes, KEY)
        except UpdateRefused as refusal:
            counts["refused"] += 1
            assert "payload" in refusal.what and len(refusal.what) < 400
            return
        counts["accepted"] += 1
        assert shapes_of(back) == dict(sorted(shapes.items())) and torch.isfinite(whole(back)).all()

    decoded()
    assert counts["accepted"] and counts["refused"], counts


@pytest.mark.parametrize("specs", LOSSY, ids=str)
def test_values_that_are_not_finite_are_refused(specs: list[dict[str, Any]]) -> None:
    """Whichever part they are in; and products and codes that would overflow, though each part is finite."""
    made, shapes = chain(*specs), shapes_of(update())
    payload = made.encode(update(), KEY)
    for name, part in payload.items():
        if part.is_floating_point():
            for bad in (math.nan, math.inf, -math.inf):
                with pytest.raises(UpdateRefused, match=r"^the payload"):
                    made.decode({**payload, name: part.index_fill(0, torch.tensor(0), bad)}, shapes, KEY)
    if specs == [{"name": "lowrank", "rank": 2}]:
        with pytest.raises(UpdateRefused, match="stands for values that are not finite"):
            made.decode({"values": torch.full_like(payload["values"], 2.0**100)}, shapes, KEY)


@pytest.mark.parametrize(("name", "unused"), [("int8", -128), ("int4", 0xFF)])
def test_the_code_that_no_encoder_uses_stays_finite(name: str, unused: int) -> None:
    made, shapes = chain({"name": name}), {"x": torch.Size([640])}
    payload = made.encode({"x": torch.randn(640)}, KEY)
    largest = {"0.peak": torch.tensor([2 * LARGEST]), "0.codes": torch.full_like(payload["0.codes"], unused)}
    for scale, accepted in ((1.0, True), (1.001, False), (1.9999, False), (65504.0, False)):
        bad = payload | largest | {"0.scales": torch.full_like(payload["0.scales"], scale)}
        if accepted:
            assert torch.isfinite(made.decode(bad, shapes, KEY)["x"]).all()
        else:
            with pytest.raises(UpdateRefused, match="scales are not all between 0 and 1"):
                made.decode(bad, shapes, KEY)


def test_scales_and_peaks_are_bounded() -> None:
    made, tensors = chain({"name": "int4"}), {"x": torch.randn(640)}
    payload = made.encode(tensors, KEY)
    for value in (float("nan"), float("inf"), -0.5):
        scales = payload["0.scales"].clone()
        scales[3] = value
        with pytest.raises(UpdateRefused, match="scales"):
            made.decode({**payload, "0.scales": scales}, shapes_of(tensors), KEY)
    for name in ("int4", "fp16"):
        made = chain({"name": name})
        payload = made.encode(tensors, KEY)
        for value in (float("nan"), float("inf"), 0.0, -1.0, 3.0, 2.0**-120, 4 * LARGEST, 2.0**127):
            with pytest.raises(UpdateRefused, match="peak"):
                made.decode({**payload, "0.peak": torch.tensor([value])}, shapes_of(tensors), KEY)


def test_indices_round_trip() -> None:
    draw = torch.Generator().manual_seed(1)
    for k, d in ((1, 1), (1, 2), (3, 3), (1, 1000), (999, 1000), (10, 2**20), (500, 1001)):
        chosen = torch.randperm(d, generator=draw)[:k].sort().values
        packed = indices.pack(chosen, d)
        assert packed.dtype is torch.uint8 and len(packed) == indices.packed_size(k, d)
        assert torch.equal(indices.unpack(packed, k, d), chosen)
    edges = torch.tensor([0, 999])
    assert torch.equal(indices.unpack(indices.pack(edges, 1000), 2, 1000), edges)


def test_indices_that_repeat_decrease_or_lie_outside_are_refused() -> None:
    k, d = 4, 1000  # low bits: 7
    good = torch.tensor([5, 300, 301, 999])
    packed = indices.pack(good, d)
    split = -(-k * indices.low_bits(k, d) // 8)

    def changed(low: list[int], places: list[int]) -> Tensors:
        bits = torch.tensor([(value >> shift) & 1 for value in low for shift in range(6, -1, -1)], dtype=torch.uint8)
        field = torch.zeros(8 * (len(packed) - split), dtype=torch.uint8)
        field[places] = 1
        weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])
        bits = torch.cat([bits, torch.zeros(8 * split - len(bits), dtype=torch.uint8)])
        return {"x": (torch.cat([bits, field]).view(-1, 8) * weights).sum(1).to(torch.uint8)}

    honest = [int(i) & 127 for i in good], [(int(i) >> 7) + n for n, i in enumerate(good)]
    assert torch.equal(changed(*honest)["x"], packed)
    low, places = honest
    for bad in (
        (low, places[:-1]),  # three indices
        ([low[0], low[1], low[1], low[3]], places),  # the same one twice
        ([low[0], low[2], low[1], low[3]], places),  # a smaller one after a larger
        ([*low[:3], 127], places),  # 1023
    ):
        with pytest.raises(UpdateRefused, match="indices"):
            indices.unpack(changed(*bad)["x"], k, d)
