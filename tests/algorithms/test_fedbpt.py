"""FedBPT on quadratics in closed form, its strategy against the cma library's own run, and on a real tiny model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.fedbpt import COUNT, MEAN, PATHS, SIGMA, STDS, TOLD, Z, perturbed, strategy
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec, TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.sequences import Example
from tests.federation.conftest import Tiny
from tests.training.helpers import sequence

from .observed import federate, final

D = 12


class Bowl:
    """A session whose loss is |z - b|^2 / 2 + 1, whatever the examples."""

    def __init__(self, b: Tensor, place: Place, steps: int) -> None:
        self.b, self.place, self.z = b, place, nn.Parameter(torch.zeros(len(b)))
        self.recipe: Any = SimpleNamespace(training=TrainingSpec(steps=steps, batch_size=2, packing=False))
        self.model: Any = nn.Embedding(50, 2)
        self.model.config = SimpleNamespace()
        self.model.get_input_embeddings = lambda: self.model
        self.tokens = TokenSet.of([sequence((i, 8)) for i in range(10)])
        self.asked = 0

    def put(self, tensors: Tensors) -> dict[str, nn.Parameter]:
        self.z.data.copy_(tensors[Z])
        return {Z: self.z}

    def objective(self) -> Any:
        return self

    def begin(self, examples: list[Example]) -> list[Example]:
        return examples

    def terms(self, part: list[Example]) -> tuple[Tensor, float]:  # noqa: ARG002
        assert not torch.is_grad_enabled()
        self.asked += 1
        return ((self.z - self.b).square().sum() / 2 + 1)[None], 1.0

    def should_stop(self) -> bool:
        return False

    def observe(self, event: Any) -> None:  # noqa: ARG002
        return


def rounds(
    silos: list[Tensor], spec: AlgorithmSpec, count: int, steps: int = 6
) -> tuple[Tensors, list[dict[str, Any]]]:
    algorithm = get_algorithm(spec)
    theta = algorithm.initial(lambda: {Z: torch.zeros(D)})
    state, seen = algorithm.init_state(theta), []
    for number in range(count):
        accumulator, sent = algorithm.accumulator(Path()), []
        for i, b in enumerate(silos):
            place = Place(f"silo-{i}", number, count)
            outcome = algorithm.local(algorithm.broadcast(theta, state, number), {}, place).run(Bowl(b, place, steps))
            assert {n: v.shape for n, v in outcome.update.items()} == algorithm.expected_update(theta, place)
            algorithm.fold(accumulator, outcome.update, 1.0, place)
            sent.append(outcome.update)
        before = theta
        theta, state = algorithm.server_step(theta, accumulator, state, Step(number, len(silos)))
        seen.append({"before": before, "after": theta, "state": state, "sent": sent})
    return theta, seen


def test_it_goes_to_the_minimum_of_the_mean_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(D, generator=generator)
    silos = [centre + 0.2 * torch.randn(D, generator=generator) for _ in range(4)]
    middle = torch.stack(silos).mean(0)
    theta, _ = rounds(silos, AlgorithmSpec(name="fedbpt", population=10, sigma=0.5, perturb=0), 25)
    assert (theta[Z] - middle).square().sum() < 0.02 * middle.square().sum()
    assert 0 < float(theta[SIGMA]) < 0.5


def test_the_servers_mean_is_the_recombination_by_rank() -> None:
    """w_i proportional to ln(m + 1/2) - ln i over all m means, the fittest first (Hansen, 2016)."""
    silos = [torch.full((D,), x) for x in (0.1, -0.1, 0.2)]
    _, (first, *_) = rounds(silos, AlgorithmSpec(name="fedbpt", population=8, sigma=0.5, perturb=0), 1)
    order = sorted(first["sent"], key=lambda update: float(update[TOLD][0]))
    raw = torch.log(torch.tensor(3.5)) - torch.log(torch.arange(1.0, 4.0))
    expected = sum(w * update[MEAN] for w, update in zip(raw / raw.sum(), order, strict=True))
    torch.testing.assert_close(first["after"][Z], expected, atol=1e-6, rtol=0)
    assert int(first["state"][COUNT]) == 1
    assert first["state"][PATHS].abs().sum() > 0
    assert not torch.equal(first["after"][STDS], first["before"][STDS])


def test_steps_grow_where_silos_agree_and_shrink_where_they_do_not() -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="fedbpt", population=8))
    theta = algorithm.initial(lambda: {Z: torch.zeros(D)})
    sigmas = []
    walk = float(np.log(6.0))  # six steps of size 1
    for moves in ([4.0, 4.0], [4.0, -4.0]):
        accumulator = algorithm.accumulator(Path())
        for i, move in enumerate(moves):
            mean = torch.zeros(D)
            mean[:4] = move
            algorithm.fold(accumulator, {MEAN: mean, TOLD: torch.tensor([float(i), walk])}, 1.0, Place(f"s{i}"))
        after, _ = algorithm.server_step(theta, accumulator, algorithm.init_state(theta), Step(0, 2))
        sigmas.append(float(after[SIGMA]))
    assert sigmas[0] > 1.01
    assert sigmas[1] < 0.99


def test_a_single_update_is_taken_as_it_is() -> None:
    theta, seen = rounds([torch.ones(D)], AlgorithmSpec(name="fedbpt", population=8, perturb=0), 2)
    assert torch.equal(theta[Z], seen[-1]["sent"][0][MEAN])
    assert torch.equal(theta[STDS], torch.ones(D))


def test_whatever_a_silo_says_of_its_steps_makes_a_finite_step() -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="fedbpt"))
    theta = algorithm.initial(lambda: {Z: torch.zeros(D)})
    for said in (-3e38, 3e38):
        accumulator = algorithm.accumulator(Path())
        for i in range(3):
            algorithm.fold(
                accumulator, {MEAN: torch.ones(D) * i, TOLD: torch.tensor([said, said])}, 1.0, Place(f"s{i}")
            )
        after, _ = algorithm.server_step(theta, accumulator, algorithm.init_state(theta), Step(0, 3))
        assert all(bool(t.isfinite().all()) for t in after.values())


@pytest.mark.parametrize("d", [5, 400])
def test_a_strategy_goes_on_exactly_from_its_tensors(d: int) -> None:
    """After 7 of 15 steps nothing is kept but numbers: mean, step size, deviations, paths, count; same bits."""
    whole_draws, draws = (np.random.Generator(np.random.Philox(1)) for _ in range(2))
    untouched = np.random.get_state()[1].copy()

    def go(es: Any, steps: int) -> Any:
        for _ in range(steps):
            candidates = es.ask()
            es.tell(candidates, [float(((x - 1) ** 2).sum()) for x in candidates])
        return es

    whole = go(strategy(np.zeros(d), 0.7, np.ones(d), 8, whole_draws), 15)
    half = go(strategy(np.zeros(d), 0.7, np.ones(d), 8, draws), 7)
    kept = (np.stack([half.pc, half.adapt_sigma.ps]), half.countiter)
    resumed = strategy(half.mean.copy(), half.sigma, np.array(half.sigma_vec.scaling), 8, draws, paths=kept)
    go(resumed, 8)
    assert np.array_equal(resumed.mean, whole.mean)
    assert resumed.sigma == whole.sigma
    assert np.array_equal(resumed.sigma_vec.scaling, whole.sigma_vec.scaling)
    assert np.array_equal(np.random.get_state()[1], untouched)


def test_perturbation_spares_targets() -> None:
    examples = [Example((sequence((i, 400), answer=50),)) for i in range(3)]
    changed, again = (perturbed(examples, 0.5, 512, np.random.Generator(np.random.Philox(0))) for _ in range(2))
    for one, other, same in zip(examples, changed, again, strict=True):
        (a,), (b,), (c,) = one.sequences, other.sequences, same.sequences
        assert np.array_equal(b.ids, c.ids)
        assert np.array_equal(a.ids[a.loss], b.ids[b.loss])
        assert np.mean(a.ids[~a.loss] != b.ids[~b.loss]) == pytest.approx(0.5, abs=0.1)
    (plain, *_) = perturbed(examples, 0.0, 512, np.random.Generator(np.random.Philox(0)))
    assert np.array_equal(plain.sequences[0].ids, examples[0].sequences[0].ids)


def test_perturbed_fitness_asks_twice_as_often() -> None:
    for perturb, times in ((0.0, 1), (0.5, 2)):
        spec = AlgorithmSpec(name="fedbpt", population=4, perturb=perturb)
        session = Bowl(torch.ones(D), Place("a", 0, 1), 3)
        algorithm = get_algorithm(spec)
        algorithm.local(algorithm.initial(lambda: {Z: torch.zeros(D)}), {}, session.place).run(session)
        assert session.asked == times * (3 * 4 + 3), "every candidate on its step's batch, the end on all batches"


def test_a_real_model_gets_better_and_2_kilobytes_leave_a_silo(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        "adapter={kind: prompt-projection, virtual_tokens: 8}",
        "federation.algorithm={name: fedbpt, population: 8, perturb: 0, sigma: 2.0}",
        "federation.rounds=3",
        "training.lr=5e-4",
        "training.steps=4",
    )
    engine, directory = federate(recipe, tiny.base, tmp_path / "run")
    losses = [line["validation"]["loss"] for line in directory.rounds()]
    assert losses[-1] < losses[0] - 0.02, losses
    update = next(iter(engine.updates[0].values()))
    assert sum(t.nbytes for t in update.values()) == 4 * 502
    assert sum(t.nbytes for t in engine.broadcasts[1].values()) == 4 * 1001
    assert all(p.grad is None for p in engine.bench.model.parameters())
    assert set(engine.tensors[1]) == {Z}
    assert final(directory).keys() == {Z, STDS, SIGMA}
    assert (tmp_path / "run" / "adapter" / "prompt_encoder.safetensors").is_file()
