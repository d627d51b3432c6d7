"""FedEx-LoRA: A and B are averaged, and what their product misses goes into the frozen weight."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fedlm.algorithms.base import Accumulator, Step
from fedlm.algorithms.fedit import FedIT
from fedlm.algorithms.lora import Trained, factors_of
from fedlm.algorithms.lowrank import Matrix, Term, add_up, side_by_side
from fedlm.algorithms.merged import dense_from, merged
from fedlm.algorithms.stored import Stored
from fedlm.messages import Tensors


class FedExLoRA(FedIT):
    """A = sum p_i A_i, B = sum p_i B_i, W <- W + s (sum p_i B_i A_i - B A) (Singhal et al., ACL 2025).

    The silos' next model is W + s B A = W_before + s sum p_i B_i A_i: aggregation is exact. The residual is the
    covariance of the factors, which is written here without a difference of large terms and with k - 1 terms for k
    silos (the paper's has rank (k + 1) r):

        sum_i p_i B_i A_i - B A = sum_{i > 1} p_i (B_i - B) (A_i - A_1),   since sum_i p_i (B_i - B) = 0

    It stays beside W as fp32 factors of rank (k - 1) r, or as a dense matrix where that is smaller (see `merged`): the
    way down grows in every round; `recompress` cuts it. The paper weights silos alike; here p_i are the recipe's.
    """

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Stored)
        trained = Trained(self, (parameters, state), accumulator, step.round)
        stepped, state = super().server_step(parameters, accumulator, state, step)

        def residuals() -> Iterator[tuple[str, Matrix]]:
            for layer, shape in trained.layers.items():
                yield layer, add_up(centred(layer), *shape, limit=dense_from(*shape))

        def centred(layer: str) -> Iterator[Term]:
            _, b = factors_of(layer)
            first: Tensor | None = None
            for silos, b_n, a_n in trained.silos(layer):
                rest = 0 if first is not None else 1
                first = a_n[0].clone() if first is None else first
                if len(silos) == rest:
                    continue
                c = trained.shares(layer, silos[rest:]) * self.adapter.scale(len(first))
                factors = side_by_side(b_n[rest:] - stepped[b], a_n[rest:] - first)
                yield Term(c.repeat_interleave(len(first)), *factors)

        return merged(stepped, residuals(), str(step.round), self.spec.recompress), state
