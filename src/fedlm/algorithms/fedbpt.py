"""FedBPT: a prompt found by evolution, from forward passes alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Algorithm, LocalRule, Outcome, Place, Session, Step
from fedlm.algorithms.stored import Stored
from fedlm.errors import TrainingError
from fedlm.messages import Tensors
from fedlm.randomness import numpy_generator
from fedlm.recipe.schema import AlgorithmSpec
from fedlm.training.batches import batches, steps_per_round
from fedlm.training.loop import TrainResult, check_length
from fedlm.training.sequences import Encoded, Example
from fedlm.training.zeroth import mean_loss, measuring

Z = "prompt_encoder.z"
"""The mean of the search distribution: it is the prompt."""
STDS, SIGMA = "fedbpt.stds", "fedbpt.sigma"
"""The distribution N(z, sigma^2 diag(stds^2)): [d], and [1]."""
MEAN, TOLD = "fedbpt.mean", "fedbpt.told"
"""An update: where the silo's search ended [d]; its fitness there, and log sum_t sigma_t^2 over its
steps, of which every value makes sense [2]."""
PATHS, COUNT = "fedbpt.paths", "fedbpt.count"
"""The server's evolution paths, p_c and p_sigma, fp64 [2, d]; server steps so far, int64 [1]."""

Vector = NDArray[np.float64]


class FedBPT(Algorithm):
    """CMA-ES in the silos and at the server, over z of a prompt p0 + A z (Sun et al., ICML 2024).

    Silos start a CMA-ES at the server's distribution N(z, sigma^2 C). For every step they draw `population` candidates
    and measure each by forward passes on one batch; lower is fitter. What leaves a silo is where the mean of its search
    is after the round's steps, the fitness there, and the sum of its squared step sizes. To the server these means are
    the candidates of one step of a CMA-ES of its own, whose weights go by their ranks, and whose step size is that of a
    mean which walked through the silos' steps: sigma_g^2 = mean_i sum_t sigma_it^2 / mu, with mu parents in a silo.
    The silos' step size then changes by the factor by which the server's did.

    Against overfitting a candidate is judged by L(x) / L(x'), where in x' each token that is no target was replaced by
    a random one with probability `perturb`: what is good without reading the text is worth nothing.

    Three things differ from the paper. C is diagonal (Ros and Hansen, PPSN 2008): with d = 500 and these populations a
    full C learns less than 1 % in a hundred rounds, and it would be the largest part of what travels. Every step has a
    batch of its own in place of all rows, and the fitness that the server ranks is measured on all batches of the
    round. A single update is taken as it is, since there is nothing to rank.
    """

    update_dtypes = (torch.float32,)

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        z = first()[Z]
        return {Z: z, STDS: torch.ones_like(z), SIGMA: torch.tensor([self.spec.sigma])}

    def init_state(self, parameters: Tensors) -> Tensors:
        return {
            PATHS: torch.zeros(2, len(parameters[Z]), dtype=torch.float64),
            COUNT: torch.zeros(1, dtype=torch.int64),
        }

    def evaluated(self, parameters: Tensors, state: Tensors) -> Tensors:
        return {Z: parameters[Z]}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Search(received, silo_state, place, self.spec)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return {MEAN: parameters[Z].shape, TOLD: torch.Size([2])}

    def accumulator(self, spool: Path) -> Accumulator:
        return Stored(spool, summed=False)

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        assert isinstance(accumulator, Stored)
        accumulator.keep(update, weight, place)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Stored)
        means, told = ([u.double().numpy() for u in updates_of(accumulator, name)] for name in (MEAN, TOLD))
        count = len(means)
        if count == 1:
            return parameters | {Z: torch.from_numpy(means[0]).float()}, state
        fitness, walked = np.array(told).T
        sigma_g = math.sqrt(np.exp(walked.clip(-50, 50)).sum() / count / (self.spec.population // 2))
        es = strategy(
            parameters[Z].double().numpy(),
            sigma_g,
            parameters[STDS].double().numpy(),
            count,
            numpy_generator(0, "fedbpt server", step.round),
            parents=count,
            paths=(state[PATHS].numpy(), int(state[COUNT])),
        )
        es.ask()  # tell wants it; what counts are the silos' means
        es.tell(means, list(fitness))
        moved = {
            Z: torch.from_numpy(es.mean.copy()).float(),
            STDS: torch.from_numpy(np.array(es.sigma_vec.scaling)).float(),
            SIGMA: (parameters[SIGMA].double() * (es.sigma / sigma_g)).float(),
        }
        paths = torch.from_numpy(np.stack([es.pc, es.adapt_sigma.ps]))
        return moved, {PATHS: paths, COUNT: torch.tensor([int(state[COUNT]) + 1])}


class Search(LocalRule):
    """FedBPT in the silo."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec) -> None:
        super().__init__(received, silo_state, place)
        self.spec = spec

    def start(self) -> Tensors:
        return {Z: self.received[Z]}

    @torch.no_grad()
    def run(self, session: Session) -> Outcome:
        place, data, training = self.place, session.tokens, session.recipe.training
        check_length(session.model, training.max_length)
        z = session.put(self.start())[Z]
        es = strategy(
            self.received[Z].double().numpy(),
            float(self.received[SIGMA]),
            self.received[STDS].double().numpy(),
            self.spec.population,
            self._generator("candidates"),
        )
        objective, began = session.objective(), time.perf_counter()
        result = TrainResult(0, 0, 0, 0, 0.0, [], 0.0, {})
        noise = self._generator("perturbation")
        vocabulary = len(session.model.get_input_embeddings().weight)  # type: ignore[operator]
        seen: list[tuple[list[Example], list[Example]]] = []
        squares = 0.0

        def loss(x: Vector, examples: list[Example]) -> float:
            z.copy_(torch.from_numpy(x))
            mean, _ = mean_loss(objective, objective.begin(examples), training)
            if not math.isfinite(mean):
                raise TrainingError(f"the loss became {mean}", where=f"silo {place.silo}", fix="lower `sigma`")
            return mean

        def fitness(x: Vector, pairs: Sequence[tuple[list[Example], list[Example]]]) -> tuple[float, float]:
            """What is ranked, and the plain loss."""
            plain = sum(loss(x, examples) for examples, _ in pairs) / len(pairs)
            if self.spec.perturb == 0:
                return plain, plain
            return plain / (sum(loss(x, changed) for _, changed in pairs) / len(pairs)), plain

        steps = steps_per_round(training, len(data))
        with measuring(session.model, training):
            for step, chosen in enumerate(batches(training, data.lengths, (place.seed, place.silo), place.round)):
                if session.should_stop():
                    break
                examples = [data[i] for i in chosen]
                seen.append((examples, perturbed(examples, self.spec.perturb, vocabulary, noise)))
                squares += es.sigma**2
                candidates = es.ask()
                found = [fitness(x, seen[-1:]) for x in candidates]
                es.tell(candidates, [fit for fit, _ in found])
                result.steps += 1
                result.examples += len(examples)
                result.tokens += sum(len(e) for e in examples)
                result.target_tokens += sum(e.targets for e in examples)
                result.losses.append(float(np.mean([plain for _, plain in found])))
                result.seconds = time.perf_counter() - began
                event = {"kind": "step", "round": place.round, "silo": place.silo, "step": step, "steps": steps}
                rate = result.tokens / result.seconds
                session.observe({**event, "loss": result.losses[-1], "tokens_per_second": rate})
            ended, result.loss = fitness(es.mean, seen) if seen else (math.inf, 0.0)
        result.loss_count = float(result.target_tokens)
        result.figures = {}
        result.seconds = time.perf_counter() - began
        mean = torch.from_numpy(es.mean.copy()).float()
        return Outcome(result, {MEAN: mean, TOLD: torch.tensor([ended, math.log(squares)])}, {})

    def _generator(self, purpose: str) -> np.random.Generator:
        return numpy_generator(self.place.seed, "fedbpt", purpose, self.place.silo, self.place.round)


def updates_of(accumulator: Stored, name: str) -> list[Tensor]:
    """A tensor of every update, in the order in which they were folded."""
    return [update[name] for _, update in accumulator.read([name])]


def strategy(
    mean: Vector,
    sigma: float,
    stds: Vector,
    population: int,
    draws: np.random.Generator,
    *,
    parents: int | None = None,
    paths: tuple[Vector, int] | None = None,
) -> Any:
    """A `cma.CMAEvolutionStrategy` with N(mean, sigma^2 diag(stds^2)), whose every draw is from `draws`.

    Args:
        parents: how many of the population move the mean; the best half by default.
        paths: p_c and p_sigma [2, d], and after how many steps: goes on exactly as the strategy that had them.
    """
    import cma
    from cma.sigma_adaptation import CMAAdaptSigmaCSA
    from cma.utilities.utils import ElapsedWCTime

    es = cma.CMAEvolutionStrategy(
        mean,
        sigma,
        {
            "popsize": population,
            "CMA_mu": parents,
            "CMA_diagonal": True,
            "CMA_stds": stds,
            "AdaptSigma": CMAAdaptSigmaCSA,  # above 300 dimensions cma would take one that needs its own candidates
            "randn": lambda count, size: draws.standard_normal((count, size)),
            "seed": np.nan,  # numpy's own generator stays untouched
            "verbose": -9,
        },
    )
    if paths is not None and paths[1]:
        es.pc, es.adapt_sigma.ps = paths[0].copy()
        es.countiter, es.mean_old, es.timer = paths[1], es.mean.copy(), ElapsedWCTime()
    return es


def perturbed(examples: Sequence[Example], rate: float, vocabulary: int, draws: np.random.Generator) -> list[Example]:
    """The examples with each token that is no target replaced by a random one with this probability."""

    def changed(sequence: Encoded) -> Encoded:
        where = (draws.random(len(sequence)) < rate) & ~sequence.loss
        ids = np.where(where, draws.integers(vocabulary, size=len(sequence)), sequence.ids)
        return Encoded(ids.astype(np.int32), sequence.loss, sequence.cut)

    return [Example(tuple(map(changed, e.sequences)), e.facts) for e in examples]
