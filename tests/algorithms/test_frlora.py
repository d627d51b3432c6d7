"""FRLoRA: the principal factors, and the weights that real silos work with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.models.adapters import attach, lora_layers
from fedlm.models.load import load_base
from fedlm.models.principal import principal_factors, principal_tensors
from tests.federation.conftest import Tiny

from .observed import distance, federate


@pytest.mark.parametrize("d_out, d_in, rank", [(20, 9, 4), (9, 20, 4), (12, 12, 12), (5, 8, 7)])
def test_principal_factors_are_the_truncated_svd(d_out: int, d_in: int, rank: int) -> None:
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    a, b = principal_factors(weight, rank, scale=2.5)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = min(rank, len(s))
    best = u[:, :kept] @ s[:kept].diag() @ vh[:kept]
    assert a.shape == (rank, d_in) and b.shape == (d_out, rank)
    torch.testing.assert_close(2.5 * b.double() @ a.double(), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(a[:kept].norm(dim=1).double(), (s[:kept] / 2.5).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(b[:, :kept].norm(dim=0), a[:kept].norm(dim=1), rtol=1e-5, atol=0)


def test_signs_do_not_depend_on_the_solver() -> None:
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    a, b = principal_factors(weight, 3, 1.0)
    turned, same = principal_factors(-weight, 3, 1.0)
    torch.testing.assert_close(a, turned, rtol=0, atol=1e-5)
    torch.testing.assert_close(b, -same, rtol=0, atol=1e-5)


def test_four_rounds_of_real_silos(tiny: Tiny, tmp_path: Path) -> None:
    """Unequal weights, AdamW, alpha != rank, one interruption. Every round starts at the principal factors, whose
    change is what training made of the weight; what silos load afterwards is W + sum of s (mean(B) mean(A) - B_0 A_0).
    """
    recipe = tiny.recipe("federation.algorithm.name=frlora", "training.lr=0.02", "adapter.rank=3", "adapter.alpha=5")
    engine, directory = federate(recipe, tiny.base, tmp_path / "run", interrupt=2)
    first, s = principal_tensors(recipe), 5 / 3
    names = {n.removesuffix(".lora_A.weight") for n in first if "lora_A" in n}
    change = {n: torch.zeros(1) for n in names}
    for number in range(4):
        weights, updates = engine.weights[number], engine.updates[number]
        assert len(set(weights.values())) > 1
        total = sum(weights.values())
        for n in names:
            a_0, b_0 = first[f"{n}.lora_A.weight"].double(), first[f"{n}.lora_B.weight"].double()
            a = a_0 + sum(weights[i] / total * updates[i][f"{n}.lora_A.weight"].double() for i in updates)
            b = b_0 + sum(weights[i] / total * updates[i][f"{n}.lora_B.weight"].double() for i in updates)
            # What a silo trained: its own change of the weight at the end of its round, from the principal factors.
            for i, update in updates.items():
                a_i, b_i = (x + update[f"{n}.lora_{f}.weight"].double() for x, f in ((a_0, "A"), (b_0, "B")))
                trained = change[n] + s * (b_i @ a_i - b_0 @ a_0)
                assert (engine.trained[number][i][n] - trained).norm() < 1e-5 * trained.norm() + 1e-6
            change[n] = change[n] + s * (b @ a - b_0 @ a_0)
        for loaded in engine.loaded[number].values():
            assert distance(loaded, change) < 1e-5
    assert min(c.norm() for c in change.values()) > 1e-3
    ranks = {torch.linalg.matrix_rank(c, rtol=1e-4).item() for c in change.values()}
    assert max(ranks) > 6, "the sum of four rounds has a rank that no single one can have"

    from fedlm.models.export import load_adapter

    kept = load_adapter(directory.path / "adapter", recipe.adapter)
    model = attach(load_base(recipe.model), recipe.adapter, recipe.seed)
    assert lora_layers(model).keys() == names
    from fedlm.models.adapters import set_tensors

    from .observed import effective

    set_tensors(model, kept, recipe.adapter)
    assert distance(effective(model), change) < 1e-5
