"""Each guard by itself: what comes back, how many bytes it took, and what it may claim of its error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlm.errors import UpdateRefused
from fedlm.federation import updates
from fedlm.federation.engines.wire import serialized_size
from fedlm.guards import CLASSES, Chain, get_chain
from fedlm.guards.base import LARGEST
from fedlm.guards.blockwise import rounded_up
from fedlm.guards.topk import largest
from fedlm.messages import Tensors
from fedlm.recipe.guards import GUARDS, MASK, GuardSpec

KEY = (7, "silo", 3)

LOSSY = [
    [{"name": "bf16"}],
    [{"name": "fp16"}],
    [{"name": "int8"}],
    [{"name": "int8", "block": 256}],
    [{"name": "int4"}],
    [{"name": "int4", "block": 100}],
    [{"name": "topk", "density": 0.05}],
    [{"name": "topk", "k": 17}],
    [{"name": "topk", "density": 0.7}],
    [{"name": "randk", "density": 0.05}],
    [{"name": "randk", "k": 799}],
    [{"name": "lowrank", "rank": 2}],
    [{"name": "topk", "density": 0.1}, {"name": "int4"}],
    [{"name": "lowrank", "rank": 2}, {"name": "randk", "density": 0.5}, {"name": "int8"}],
]


def chain(*specs: dict[str, Any], feedback: bool | None = None) -> Chain:
    made = get_chain([GuardSpec(**spec) for spec in specs], feedback=feedback)
    assert made is not None
    return made


def update(seed: int = 0, scale: float = 1e-3) -> Tensors:
    """Tensors of unequal sizes and magnitudes, an odd number of values in all."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"b.lora_B": (24, 8), "a.lora_A": (8, 40), "norm": (34,), "one": (), "layer.lora_A": (8, 40)}
    return {
        name: torch.randn(shape, generator=draw) * scale * 10.0**i for i, (name, shape) in enumerate(shapes.items())
    }


def shapes_of(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def whole(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def sent(made: Chain, tensors: Tensors, key: Any = KEY) -> Tensors:
    return made.decode(made.encode(tensors, key), shapes_of(tensors), key)


def test_every_guard_of_the_recipe_exists() -> None:
    assert CLASSES.keys() | {MASK} == GUARDS.keys()
    assert {spec["name"] for specs in LOSSY for spec in specs} == CLASSES.keys()


@pytest.mark.parametrize("specs", LOSSY, ids=str)
def test_what_comes_back_has_the_names_shapes_and_types_and_is_near(specs: list[dict[str, Any]]) -> None:
    made, tensors = chain(*specs), update()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    back = sent(made, tensors)
    assert list(back) == sorted(tensors) and shapes_of(back) == shapes_of(tensors)
    assert all(tensor.dtype is torch.float32 for tensor in back.values())
    assert all(torch.equal(tensors[name], before[name]) for name in tensors), "the update itself is not touched"
    assert torch.isfinite(whole(back)).all() and not torch.equal(whole(back), whole(tensors))
    again = sent(made, dict(reversed(tensors.items())))
    assert all(torch.equal(back[name], again[name]) for name in back), "the same whatever the order of the tensors"


@pytest.mark.parametrize(("name", "bound"), [("bf16", 2.0**-8), ("fp16", 2.0**-11), ("int8", 1 / 127), ("int4", 1 / 7)])
def test_rounding_errors_are_bounded(name: str, bound: float) -> None:
    """Casts: relative to the value. Blocks: relative to the block's largest (and fp16's 2^-11 of the scale)."""
    values = torch.randn(6400, generator=torch.Generator().manual_seed(1)) * 1e-5
    error = (sent(chain({"name": name}), {"x": values})["x"] - values).abs()
    if name in ("bf16", "fp16"):
        normal = values.abs() > values.abs().max() * 2**-13
        assert (error <= bound * values.abs())[normal].all()
        assert error.max() <= bound * values.abs().max()
    else:
        most = values.view(-1, 64).abs().amax(1, keepdim=True)
        assert (error.view(-1, 64) <= bound * (1 + 2**-10) * most).all()
        assert error.max() > 0.5 * bound * most.max(), "the bound is not loose by far"


@pytest.mark.parametrize(
    "specs", [[{"name": "int8"}], [{"name": "int4"}], [{"name": "randk", "density": 0.1}]], ids=str
)
def test_unbiased(specs: list[dict[str, Any]]) -> None:
    """The mean of n draws is within 5 standard errors of the input, for all values together and for each alone; the
    variance is what the docstrings say."""
    made, n = chain(*specs), 3000
    values = torch.randn(640, generator=torch.Generator().manual_seed(2)) * 1e-4
    draws = torch.stack([sent(made, {"x": values}, (7, "silo", i))["x"] for i in range(n)]).double()
    deviation = draws.std(0)
    off = (draws.mean(0) - values.double()) / (deviation / math.sqrt(n)).clamp(min=1e-12)
    varies = deviation > 1e-9
    assert varies.float().mean() > 0.9
    assert off[varies].abs().max() < 5, "each value"
    assert abs(float(off[varies].mean())) < 5 / math.sqrt(int(varies.sum())), "all together"
    squares = (draws - values.double()).square()
    if specs[0]["name"] == "randk":
        assert float(squares.sum(1).mean() / values.double().square().sum()) == pytest.approx(9.0, rel=0.1)
    else:
        levels = 127 if specs[0]["name"] == "int8" else 7
        step = values.view(-1, 64).abs().amax(1, keepdim=True).double() / levels
        assert (squares.mean(0).view(-1, 64) <= step.square() / 4 * 1.15).all()


def test_topk_is_biased_and_so_is_rounding_down() -> None:
    """The test of unbiasedness can fail."""
    values = torch.randn(640, generator=torch.Generator().manual_seed(2))
    assert abs(float((sent(chain({"name": "topk", "density": 0.1}), {"x": values})["x"] - values).abs().mean())) > 0.3


@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 5), (5, 5), (17, 64), (64, 4096), (1000, 1001), (50, 100_000)])
def test_topk_keeps_the_largest(k: int, d: int) -> None:
    values = torch.randn(d, generator=torch.Generator().manual_seed(d))
    back = sent(chain({"name": "topk", "k": k}), {"x": values})["x"]
    kept = back != 0
    assert int(kept.sum()) == k and torch.equal(back[kept], values[kept])
    assert d == k or values[kept].abs().min() > values[~kept].abs().max()
    assert torch.equal(largest(values, k), kept.nonzero().view(-1))


def test_of_equal_values_the_first_are_kept() -> None:
    assert largest(torch.tensor([1.0, -2.0, 2.0, 2.0, 0.0, -2.0]), 3).tolist() == [1, 2, 3]
    assert largest(torch.zeros(5), 2).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["topk", "randk", "lowrank"])
def test_contraction(name: str) -> None:
    """E |x - C(x)|^2 <= (1 - k/d) |x|^2, which error feedback asks for; with equality for randk."""
    values = torch.randn(40, 100, generator=torch.Generator().manual_seed(3))
    spec = {"name": name, **({"rank": 4} if name == "lowrank" else {"density": 0.1})}
    made = chain(spec, feedback=True)
    lost = [
        float((sent(made, {"x": values}, (0, i))["x"] - values).square().sum() / values.square().sum())
        for i in range(200)
    ]
    mean = sum(lost) / len(lost)
    assert mean <= 0.9 + 0.01 and max(lost) < 1
    if name == "randk":
        assert mean == pytest.approx(0.9, abs=0.005)
    if name == "lowrank":
        left = torch.linalg.svdvals(values)[4:].square().sum() / values.square().sum()
        assert float(left) <= mean <= 1.15 * float(left), "near the best of its rank"


def test_a_sketch_is_near_the_best_of_its_rank_where_the_spectrum_falls_slowly() -> None:
    """Singular values 1/i: without the power iteration 1.5 times the best error, with it 1.06."""
    draw, ratios = torch.Generator().manual_seed(0), []
    u, v = (torch.linalg.qr(torch.randn(n, 60, generator=draw)).Q for n in (80, 120))
    s = 1 / torch.arange(1, 61)
    values, best = u * s @ v.mT, float(s[4:].norm())
    for i in range(20):
        back = sent(chain({"name": "lowrank", "rank": 4}), {"x": values}, (0, i))["x"]
        ratios.append(float((back - values).norm()) / best)
    assert min(ratios) >= 1 - 1e-5 and sum(ratios) / len(ratios) < 1.12


def test_scales_are_rounded_up_and_no_further() -> None:
    """Else the largest value of a block would be cut, and its mean off."""
    shares = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) ** 8
    up = rounded_up(torch.cat([shares, torch.tensor([0.0, 1.0, 2.0**-24, 1e-9])])).float()
    assert (up[:20_000] >= shares).all() and (up[:20_000] > shares).any()
    below = (up[:20_000].half().view(torch.int16) - 1).view(torch.float16).float()
    assert (below < shares).all()
    assert up[20_000:].tolist() == [0.0, 1.0, 2.0**-24, 2.0**-24]


def test_a_matrix_of_the_sketchs_rank_comes_back_whole() -> None:
    draw = torch.Generator().manual_seed(4)
    tensors = {
        f"m{i}": torch.randn(30, 3, generator=draw) @ torch.randn(3, 50, generator=draw) * 1e-3 for i in range(5)
    } | {"v": torch.randn(7, generator=draw), "small": torch.randn(3, 3, generator=draw), "zero": torch.zeros(30, 50)}
    back = sent(chain({"name": "lowrank", "rank": 3}), tensors)
    for name, tensor in tensors.items():
        exact = name in ("v", "small")
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0 if exact else 1e-6 * float(tensor.abs().max()))


@pytest.mark.parametrize(
    ("specs", "parts", "expected"),
    [
        ([{"name": "bf16"}], 1, lambda d: 2 * d),
        ([{"name": "fp16"}], 2, lambda d: 2 * d + 4),
        ([{"name": "int8"}], 3, lambda d: d + 2 * math.ceil(d / 64) + 4),
        ([{"name": "int4"}], 3, lambda d: math.ceil(d / 2) + 2 * math.ceil(d / 64) + 4),
        ([{"name": "int4", "block": 128}], 3, lambda d: math.ceil(d / 2) + 2 * math.ceil(d / 128) + 4),
        ([{"name": "randk", "k": 100}], 1, lambda _: 400),
        ([{"name": "topk", "k": 100}], 2, lambda d: 400 + math.ceil(100 * 6 / 8) + math.ceil((100 + d // 64 + 1) / 8)),
    ],
)
def test_bytes(specs: list[dict[str, Any]], parts: int, expected: Any) -> None:
    """Of the numbers exactly; each part adds less than 90 bytes of header."""
    tensors = {"x": torch.randn(100, 99), "y": torch.randn(1)}
    payload = chain(*specs).encode(tensors, KEY)
    numbers = expected(9901)
    assert len(payload) == parts and sum(part.nbytes for part in payload.values()) == numbers
    assert numbers < serialized_size(payload) < numbers + 16 + 90 * parts


def test_ratios_of_a_lora_update() -> None:
    """int4 is 7.5 times smaller than fp32, and the best 1 % with their places are as small as theory allows."""
    tensors = {f"model.layers.{i}.self_attn.q_proj.lora_A.weight": torch.randn(16, 576) for i in range(60)}
    d, fp32 = 60 * 16 * 576, serialized_size(tensors)
    assert fp32 / serialized_size(chain({"name": "int4"}).encode(tensors, KEY)) > 7.5
    payload = chain({"name": "topk", "density": 0.01}).encode(tensors, KEY)
    k = round(0.01 * d)
    entropy = (math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)) / math.log(2)
    assert entropy <= payload["0.indices"].numel() * 8 < 1.08 * entropy


def test_extreme_magnitudes() -> None:
    """Zeros, the smallest floats and nearly the largest that guards take: finite, and blocks of zeros stay zero."""
    for scale in (0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e20, LARGEST / 2**10):  # random places multiply by d / k
        values = torch.linspace(-1, 1, 4096).view(32, 128) * scale
        for specs in LOSSY:
            back = sent(chain(*specs), {"x": values})["x"]
            assert torch.isfinite(back).all(), (specs, scale)
            assert scale or not back.any()


@pytest.mark.parametrize("specs", LOSSY, ids=str)
def test_values_that_are_too_large_are_refused_where_they_are_encoded(specs: list[dict[str, Any]]) -> None:
    """The largest floats would overflow a scale, a cast or a product. No mean of updates could hold them either."""
    assert updates.LARGEST < LARGEST
    told = r"^the update holds values up to \S+, and guards take none above 3.25e\+32. Fix: lower the learning rate"
    for most in (1.01 * LARGEST, 2.0**127, torch.finfo(torch.float32).max):
        values = {"x": torch.linspace(-1, 1, 4096).view(32, 128) * most}
        with pytest.raises(UpdateRefused, match=told):
            chain(*specs).encode(values, KEY)
        with pytest.raises(UpdateRefused, match=told):
            chain(*specs, feedback=True).encode_with_feedback(values, {}, KEY)


def test_what_a_guard_makes_too_large_is_refused_too() -> None:
    values = {"x": torch.full((4096,), LARGEST / 2)}
    with pytest.raises(UpdateRefused, match=r"^what 'randk' leaves of the update holds values up to "):
        chain({"name": "randk", "density": 0.1}).encode(values, KEY)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e32])
def test_a_sketch_is_as_near_at_every_scale(scale: float) -> None:
    """M M' M leaves fp32's range where M is far from 1."""
    draw = torch.Generator().manual_seed(5)
    m = torch.randn(40, 2, generator=draw) @ torch.randn(2, 100, generator=draw)
    m = m / m.abs().max() * scale
    torch.testing.assert_close(sent(chain({"name": "lowrank", "rank": 2}), {"x": m})["x"], m, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])
def test_the_smallest_value_that_survives(name: str, levels: int) -> None:
    """s 2^-17, with s no smaller than 2^-24 / L of the peak: a block beside it that lies below is lost, no other."""
    smallest, count = 2.0**-41 / levels, 64 * 2**14
    for share, survives in ((1.05 * smallest, True), (0.95 * smallest, False)):
        values = torch.cat([torch.full((64,), 0.75), torch.full((count,), share)])  # the peak is 1
        back = sent(chain({"name": name}), {"x": values})["x"][64:]
        assert bool(back.any()) is survives
        assert abs(float(back.double().mean()) - share) < 2.0**-24 / levels * (2.0**-16 + 5 * math.sqrt(2**-16 / count))


def test_integers_and_nan_are_refused() -> None:
    for specs in LOSSY:
        made = chain(*specs)
        with pytest.raises(UpdateRefused, match=r"'votes' is torch.uint8: only floating-point"):
            made.encode({"votes": torch.zeros(4096, dtype=torch.uint8)}, KEY)
        for bad in (math.nan, math.inf):
            with pytest.raises(UpdateRefused, match="not finite"):
                made.encode({"x": torch.tensor([[1.0, bad]]).repeat(2048, 1)}, KEY)


def test_k_beyond_the_size_is_refused() -> None:
    for name in ("topk", "randk"):
        with pytest.raises(UpdateRefused, match="k = 101 values cannot be kept of 100"):
            chain({"name": name, "k": 101}).encode({"x": torch.ones(100)}, KEY)


def test_draws_are_keyed() -> None:
    """By seed, purpose and place in the chain; repeated exactly."""
    tensors = {"x": torch.randn(4096)}
    for name in ("int4", "randk"):
        made = chain({"name": name})
        one = sent(made, tensors)["x"]
        assert torch.equal(sent(chain({"name": name}), tensors)["x"], one)
        for key in ((8, "silo", 3), (7, "other", 3), (7, "silo", 4)):
            assert not torch.equal(sent(made, tensors, key)["x"], one)


def test_other_precisions_are_widened() -> None:
    values = torch.randn(640)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = sent(chain({"name": "int8"}), {"x": values.to(dtype)})["x"]
        assert torch.equal(got, sent(chain({"name": "int8"}), {"x": values.to(dtype).float()})["x"])
