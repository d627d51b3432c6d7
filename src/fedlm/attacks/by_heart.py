"""A model that is made to know a few rows by heart: what attacks on models must succeed against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlm.messages import Event, Observe, Tensors
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.loop import Window, train
from fedlm.training.sequences import Encoded

if TYPE_CHECKING:
    from fedlm.federation.silo.workbench import Workbench

STEPS, ENOUGH = 200, 0.05
"""Steps at most, and the training loss (nats) below which no further one is taken."""
RATES = {"lora": 3e-3, "lora-sb": 1e-2, "ia3": 1e-2, "full": 3e-4}
PROMPT_RATE = 3e-2
"""Learning rates by kind of adapter; a soft prompt's."""
KNOWN = 0.5
"""A training loss above which it is tried once more, at ten times the rate: small models need that."""


def learn_by_heart(
    bench: Workbench, tensors: Tensors, rows: Sequence[Encoded], seed: int, observe: Observe | None = None
) -> float:
    """Train the adapter that has these values on all of these rows at once; it stands on the bench afterwards.

    Returns:
        The loss of the last step, in nats per target token.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    rate = RATES.get(bench.recipe.adapter.kind, PROMPT_RATE)
    loss = _trained(bench, tensors, rows, seed, rate, observe)
    return loss if loss < KNOWN else _trained(bench, tensors, rows, seed, 10 * rate, observe)


def _trained(
    bench: Workbench, tensors: Tensors, rows: Sequence[Encoded], seed: int, rate: float, observe: Observe | None
) -> float:
    parameters = bench.put(tensors, whole=True)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    last = float("inf")

    def note(event: Event) -> None:
        nonlocal last
        last = float(event.get("loss", last))
        if observe is not None:
            observe(event)

    spec = TrainingSpec(
        lr=rate,
        schedule="constant",
        steps=STEPS,
        batch_size=len(rows),
        max_length=bench.recipe.training.max_length,
        packing=bench.recipe.training.packing,
    )
    train(
        bench.model,
        parameters,
        TokenSet.of(rows),
        spec,
        Window(0, 1),
        generator_key=(seed, "by heart"),
        rule=None,
        observe=note,
        silo="by heart",
        should_stop=lambda: last < ENOUGH,
    )
    bench.model.eval()
    return last
