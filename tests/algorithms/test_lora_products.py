"""FLoRA, FedEx-LoRA, FlexLoRA: the methods that need the silos' products, with equal and with mixed ranks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlm.algorithms.base import Step
from fedlm.algorithms.lora import layers_of
from fedlm.algorithms.merged import DENSE, dense_from
from fedlm.models.deltas import is_delta, pieces_of
from tests.algorithms.layer_silos import SHAPES, LayerFederation, effective

EQUAL, MIXED = (4, 4, 4), (4, 2, 3, 1)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name, ranks", [("flora", EQUAL), ("flora", MIXED), ("fedex-lora", EQUAL)])
def test_nothing_is_lost_over_rounds_whatever_the_ranks(
    name: str, ranks: tuple[int, ...], rslora: bool, tmp_path: Path
) -> None:
    federation = LayerFederation(name, ranks, tmp_path, rslora=rslora)
    for _ in range(6):
        federation.round()
        for rank in set(ranks):
            assert federation.error(rank) < 1e-6
        assert federation.figures["aggregation_error"] < 1e-6
        assert federation.figures.get("error_by_rank", {}).keys() == {str(r) for r in set(ranks) if len(set(ranks)) > 1}


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "rolora", "fedsvd"])
def test_what_a_long_run_loses_as_its_rounds_get_smaller(name: str, tmp_path: Path) -> None:
    """A cosine rate down to 0. Relative to a round's change FLoRA loses what its sum loses in fp32, and no fp32 matrix
    is nearer to the exact sum; the other methods' mean is all of the adapter, and they lose nothing."""
    federation, worst = LayerFederation(name, EQUAL, tmp_path), 0.0
    for round_ in range(60):
        federation.lr = 0.025 * (1 + math.cos(math.pi * round_ / 60))
        federation.round()
        error, least = federation.error(4), 0.0
        if name == "flora":
            missed = sum(float((exact.float().double() - exact).square().sum()) for exact in federation.mean().values())
            change = sum(float(change.square().sum()) for change in federation.mean(federation.changes).values())
            least = (missed / change) ** 0.5
        assert error < 1.1 * least + 2e-7
        assert federation.figures["aggregation_error"] == pytest.approx(error, rel=0.05, abs=1e-7)
        worst = max(worst, error)
    assert worst > 1e-4 if name == "flora" else worst < 2e-7


def test_factors_become_one_dense_matrix_when_that_is_smaller(tmp_path: Path) -> None:
    federation = LayerFederation("flora", EQUAL, tmp_path)
    limits = {layer: dense_from(*shape) for layer, shape in SHAPES.items()}
    assert limits == {"a": 12, "b": 10}
    federation.ranks = (2, 2, 2)
    seen: dict[str, torch.Tensor] = {}
    for round_ in range(4):
        federation.round()
        pieces = pieces_of(federation.theta)
        for layer, limit in limits.items():
            rank = 6 * (round_ + 1)
            assert set(pieces[layer]) == ({str(r) for r in range(round_ + 1)} if rank < limit else {DENSE})
        for name, value in federation.theta.items():
            assert DENSE in name or torch.equal(seen.setdefault(name, value), value), "earlier pieces keep their bits"
        assert federation.figures["deltas"] == {
            "pieces": sum(len(p) for p in pieces.values()),
            "bytes": sum(v.nbytes for n, v in federation.theta.items() if is_delta(n)),
            "rank": max(6 * (round_ + 1) if 6 * (round_ + 1) < limit else 0 for limit in limits.values()),
            "dense_layers": sum(6 * (round_ + 1) >= limit for limit in limits.values()),
        }
        assert federation.error(2) < 1e-6 and federation.figures["aggregation_error"] < 1e-6
    bytes_dense = 4 * sum(d_out * d_in for d_out, d_in in SHAPES.values())
    assert federation.figures["deltas"]["bytes"] == bytes_dense, "it grows no further"


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_recompression_cuts_the_deltas_and_its_error_is_reported(name: str, tmp_path: Path) -> None:
    federation = LayerFederation(name, EQUAL, tmp_path, options={"recompress": 5})
    for _ in range(4):
        federation.round()
        ranks = {
            layer: sum(len(p[1]) for p in pieces.values()) for layer, pieces in pieces_of(federation.theta).items()
        }
        assert ranks == {"a": 5, "b": 5}
        assert federation.error(4) > 1e-3
        assert federation.figures["aggregation_error"] == pytest.approx(federation.error(4), rel=1e-5)
    assert federation.figures["deltas"]["rank"] == 5 and federation.figures["deltas"]["pieces"] == 2


def test_recompression_keeps_the_best_part_of_all_that_was_merged(tmp_path: Path) -> None:
    federation = LayerFederation("flora", EQUAL, tmp_path, options={"recompress": 5})
    federation.round()
    federation.round()
    whole, kept = federation.mean(), effective(federation.loaded(4), federation.adapter)
    for layer in SHAPES:
        tail = np.linalg.svd(whole[layer].numpy(), compute_uv=False)[5:]
        missed = float((kept[layer] - whole[layer]).norm())
        assert missed == pytest.approx(float(np.sqrt((tail**2).sum())), rel=1e-4)


def test_a_rank_that_is_large_enough_loses_nothing(tmp_path: Path) -> None:
    for recompress in (9, 100):  # a matrix of 12 ranks is no larger dense
        federation = LayerFederation("fedex-lora", EQUAL, tmp_path, options={"recompress": recompress})
        federation.round()
        assert federation.error(4) < 1e-6
    federation.round()
    assert federation.error(4) < 1e-6 and federation.figures["deltas"]["dense_layers"] == 2


def test_flora_begins_every_round_with_its_own_fresh_adapter(tmp_path: Path) -> None:
    federation = LayerFederation("flora", (4, 4, 2), tmp_path)
    first = federation.loaded(4)
    drawn = [first["a.lora_A.weight"]]
    for _ in range(3):
        federation.round()
        assert all(is_delta(name) for name in federation.theta), "the global model is what was merged"
        large, small = federation.loaded(4), federation.loaded(2)
        for layer, (d_out, d_in) in SHAPES.items():
            a, b = large[f"{layer}.lora_A.weight"], large[f"{layer}.lora_B.weight"]
            assert a.shape == (4, d_in) and b.shape == (d_out, 4) and not b.any()
            assert float(a.abs().max()) <= d_in**-0.5 and float(a.std()) == pytest.approx((3 * d_in) ** -0.5, rel=0.2)
            assert small[f"{layer}.lora_A.weight"].shape == (2, d_in)
        drawn.append(large["a.lora_A.weight"])
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])
    assert layers_of(federation.theta) == SHAPES


def test_flora_merges_the_stack_of_the_papers_symbols(tmp_path: Path) -> None:
    """Round 0: A = [p_i s_i A_i], B = [B_i], from the updates themselves."""
    federation = LayerFederation("flora", (2, 3, 1), tmp_path, rank=3)
    start = federation.loaded(3)
    federation.round()
    a, b = federation.theta["a.delta_A.0"], federation.theta["a.delta_B.0"]
    row = 0
    for i, rank in enumerate((2, 3, 1)):
        a_i = start["a.lora_A.weight"][:rank] + federation.updates[i]["a.lora_A.weight"]
        b_i = federation.updates[i]["a.lora_B.weight"]
        stack = b[:, row : row + rank] @ a[row : row + rank]
        torch.testing.assert_close(stack, federation.weights[i] / 8 * 10 / rank * b_i @ a_i, rtol=1e-4, atol=1e-6)
        row += rank
    assert row == len(a)


def test_fedex_is_fedits_factors_and_the_residual_of_the_paper(tmp_path: Path) -> None:
    fedex, fedit = LayerFederation("fedex-lora", EQUAL, tmp_path), LayerFederation("fedit", EQUAL, tmp_path)
    fedex.round()
    fedit.round()
    assert all(torch.equal(fedex.theta[name], value) for name, value in fedit.theta.items())
    assert fedit.figures["aggregation_error"] == pytest.approx(fedit.error(4), rel=1e-5)
    assert fedit.error(4) > 0.05 > 1e-6 > fedex.error(4)
    changes, averaged = fedex.mean(fedex.changes), effective(fedit.theta, fedit.adapter)
    for layer, pieces in pieces_of(fedex.theta).items():
        ((b, a),) = pieces.values()
        assert len(a) == 2 * 4, "(k - 1) r"
        residual = changes[layer] - averaged[layer]
        torch.testing.assert_close(b.double() @ a.double(), residual, rtol=0, atol=1e-6 * float(changes[layer].norm()))


def test_fedex_with_one_silo_adds_nothing(tmp_path: Path) -> None:
    federation = LayerFederation("fedex-lora", (4,), tmp_path)
    for _ in range(3):
        federation.round()
        assert not pieces_of(federation.theta) and federation.error(4) < 1e-6


@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
@pytest.mark.parametrize("rslora", [False, True])
def test_flexlora_gives_every_rank_its_best_part_of_the_mean(
    ranks: tuple[int, ...], rslora: bool, tmp_path: Path
) -> None:
    federation = LayerFederation("flexlora", ranks, tmp_path, rslora=rslora)
    for _ in range(4):
        federation.round()
        tails, whole = dict.fromkeys(ranks, 0.0), 0.0
        for change in federation.mean().values():
            s = np.linalg.svd(change.numpy(), compute_uv=False)
            whole += float((s**2).sum())
            for rank in tails:
                tails[rank] += float((s[rank:] ** 2).sum())
        for rank, tail in tails.items():
            assert federation.error(rank) == pytest.approx((tail / whole) ** 0.5, rel=1e-4)
        if len(tails) > 1:
            assert federation.figures["error_by_rank"] == {
                str(rank): pytest.approx(federation.error(rank), rel=1e-4) for rank in tails
            }
        assert federation.figures["aggregation_error"] == pytest.approx(federation.error(4), rel=1e-4)
        for name, value in federation.theta.items():
            if ".lora_A." in name:
                torch.testing.assert_close(value @ value.t(), torch.eye(4), rtol=0, atol=1e-5)


def test_a_randomised_svd_costs_at_most_one_percent_of_the_error(tmp_path: Path) -> None:
    federation = LayerFederation("flexlora", (4,) * 6, tmp_path, options={"svd": "randomised"})
    for _ in range(3):
        federation.round()
        tail = whole = 0.0
        for change in federation.mean().values():
            s = np.linalg.svd(change.numpy(), compute_uv=False)
            tail, whole = tail + float((s[4:] ** 2).sum()), whole + float((s**2).sum())
        assert (tail / whole) ** 0.5 * 0.9999 <= federation.error(4) <= 1.01 * (tail / whole) ** 0.5


def test_a_small_mean_leaves_the_rest_of_the_adapter_trainable(tmp_path: Path) -> None:
    """Only silos of rank 1 take part: the other rows of A are orthonormal directions, with B = 0, and later silos of
    rank 4 train all of them."""
    federation = LayerFederation("flexlora", (1, 4), tmp_path)
    federation.round([0])
    a, b = federation.theta["a.lora_A.weight"], federation.theta["a.lora_B.weight"]
    torch.testing.assert_close(a @ a.t(), torch.eye(4), rtol=0, atol=1e-5)
    assert b[:, 0].any() and not b[:, 1:].any()
    assert federation.error(1) < 1e-6
    federation.round([1])
    assert federation.updates[1]["a.lora_B.weight"].abs().amax(0).min() > 0.01
    assert np.linalg.matrix_rank(federation.trained[1]["a"].numpy(), tol=1e-4) == 4
    assert federation.error(4) < 1e-6, "one silo of the adapter's rank loses nothing"


def test_what_no_silo_trained_stays(tmp_path: Path) -> None:
    for name in ("flora", "fedex-lora", "flexlora"):
        federation = LayerFederation(name, EQUAL, tmp_path)
        before, accumulator = dict(federation.theta), federation.algorithm.accumulator(tmp_path)
        federation.round()
        for i, update in federation.updates.items():
            place = federation.places[i]
            part = {n: v for n, v in update.items() if n.startswith("a.")}
            federation.algorithm.fold(accumulator, part, federation.weights[i], place)
        after, _ = federation.algorithm.server_step(before, accumulator, {}, Step(0, 3))
        untouched = {n for n in before if n.startswith("b.")}
        assert untouched and all(torch.equal(after[n], before[n]) for n in untouched)
        assert not any(n.startswith("b.") for n in after.keys() - untouched)
        assert all(torch.equal(after[n], v) for n, v in federation.theta.items() if n.startswith("a."))
