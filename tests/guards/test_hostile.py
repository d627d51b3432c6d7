"""A payload comes from outside: whatever is in it, the answer is an update of the right shapes, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlm.errors import UpdateRefused
from fedlm.guards import indices
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


@pytest.mark.parametrize("specs", LOSSY, ids=str)
def test_any_bytes_give_an_update_of_the_right_shapes_or_a_refusal(specs: list[dict[str, Any]]) -> None:
    made, shapes = chain(*specs), shapes_of(update())
    payload = made.encode(update(), KEY)
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = {
            name: torch.randint(0, 256, (part.nbytes,), dtype=torch.uint8, generator=draw).view(part.dtype)
            for name, part in payload.items()
        }
        for mixed in (noise, *({**payload, name: part} for name, part in noise.items())):
            try:
                back = made.decode(mixed, shapes, KEY)
            except UpdateRefused:
                continue
            assert shapes_of(back) == dict(sorted(shapes.items()))
            if {spec["name"] for spec in specs} & {"int8", "int4"} and len(specs) == 1:
                assert torch.isfinite(whole(back)).all()


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
        for value in (float("nan"), float("inf"), 0.0, -1.0, 3.0, 2.0**-120):
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
