"""Task arithmetic and TIES against PEFT's own merging of task vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.ties import trimmed
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec

SHAPES = {"x.lora_B.weight": (7, 3), "x.lora_A.weight": (3, 11), "y.lora_A.weight": (40,)}


def vectors(silos: int, seed: int = 0) -> list[Tensors]:
    """Updates of very different sizes, tensor by tensor and silo by silo, with exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(silos):
        update = {n: torch.randn(s, generator=generator) * 10.0 ** (j - 1) for j, (n, s) in enumerate(SHAPES.items())}
        made.append({n: (i + 1) * u * (torch.rand(u.shape, generator=generator) > 0.2) for n, u in update.items()})
    return made


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def merged(spec: AlgorithmSpec, updates: list[Tensors]) -> torch.Tensor:
    """theta after the step, less theta."""
    algorithm = get_algorithm(spec)
    theta = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    accumulator = algorithm.accumulator(Path())
    for i, update in enumerate(updates):
        # in any order of names and any layout
        algorithm.fold(accumulator, dict(reversed(update.items())) if i % 2 else update, 1.0, Place())
    stepped, _ = algorithm.server_step(theta, accumulator, {}, Step(0, 9))
    return flat(stepped) - flat(theta)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 0.999])
@pytest.mark.parametrize("silos", [1, 2, 5])
def test_ties_is_pefts(silos: int, density: float) -> None:
    """PEFT trims each tensor by itself; the paper, and fedlm, the whole vector: so PEFT gets the whole as one."""
    from peft.utils.merge_utils import ties

    updates = vectors(silos)
    theirs = ties([flat(u) for u in updates], torch.ones(silos), density)
    ours = merged(AlgorithmSpec(name="ties", density=density), updates)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    assert theirs.abs().max() > 1
    half = merged(AlgorithmSpec(name="ties", density=density, server_lr=0.5), updates)
    torch.testing.assert_close(half, theirs / 2, rtol=1e-5, atol=2e-6)


def test_ties_takes_no_mean_over_those_who_disagree() -> None:
    """By hand: 4 and 2 outvote -5, which a mean would not leave alone; -3 outvotes 1; 0 counts for nobody."""
    generator = get_algorithm(AlgorithmSpec(name="ties", density=1.0))
    accumulator = generator.accumulator(Path())
    for row in ([4.0, 1.0, 0.0], [2.0, 0.0, 0.0], [-5.0, -3.0, 0.0]):
        generator.fold(accumulator, {"w": torch.tensor(row)}, 1.0, Place())
    stepped, _ = generator.server_step({"w": torch.zeros(3)}, accumulator, {}, Step(0, 3))
    assert torch.equal(stepped["w"], torch.tensor([3.0, -3.0, 0.0]))


def test_trimming_keeps_the_largest_share() -> None:
    u = torch.tensor([3.0, -5.0, 0.1, 4.0, -0.2])
    assert torch.equal(trimmed(u, 0.4), torch.tensor([0.0, -5.0, 0.0, 4.0, 0.0]))
    assert torch.equal(trimmed(u, 0.01), torch.tensor([0.0, -5.0, 0.0, 0.0, 0.0]))
    assert torch.equal(trimmed(u, 1.0), u)


@pytest.mark.parametrize("silos, rate", [(1, 1.0), (3, None), (5, 0.7)])
def test_task_arithmetic_is_pefts(silos: int, rate: float | None) -> None:
    from peft.utils.merge_utils import task_arithmetic

    updates = vectors(silos, seed=1)
    theirs = task_arithmetic([flat(u) for u in updates], torch.full((silos,), 0.3 if rate is None else rate))
    ours = merged(AlgorithmSpec(name="task-arithmetic", server_lr=rate), updates)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
