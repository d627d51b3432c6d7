"""A round of training whose updates the coordinator sees only in sum (`fedlm.federation.aggregation`).

What is known of a round afterwards is who is in the sum, its mean and the mean training loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlm.algorithms.base import Accumulator, Place
from fedlm.federation.aggregation import Note, Vectors, aggregate
from fedlm.federation.folding import FoldResult
from fedlm.federation.records import Traffic
from fedlm.federation.silo.trained import CLIP
from fedlm.guards import REST, shared_key
from fedlm.guards.base import parted, size_of
from fedlm.guards.mask import BESIDE, encoding, shown
from fedlm.guards.noised import NoisedEncoding, shown_count
from fedlm.messages import Failure, FailureKind, Fields, Request, Tensors
from fedlm.privacy.accounting import spent
from fedlm.privacy.mechanisms import times
from fedlm.recipe.privacy import withheld

if TYPE_CHECKING:
    from fedlm.federation.conversations import Conversations


def train_masked(
    silos: Conversations,
    number: int,
    sampled: list[str],
    broadcast: Tensors,
    parameters: Tensors,
    accepted: dict[str, int],
    accumulator: Accumulator,
    traffic: Traffic,
    clip: float | None,
) -> FoldResult:
    """Let silos train and add up what they send, in which none can be told apart.

    Args:
        sampled: silos asked, in canonical order.
        broadcast: what travels to be trained.
        parameters: the global model, which says what an update must look like.
        accepted: by silo, the last round whose update was aggregated.
        accumulator: receives the weighted mean, as one update of all their weight.
        traffic: receives the bytes.
        clip: where the rounds before have moved it to; of the first round it is the recipe's.

    Raises:
        RunError: too few silos are left to unmask the sum, or it is impossible as one.
        PrivacyError: no noise keeps the recipe's budget, or the count within the clip spends all of it.
    """
    recipe = silos.recipe
    moves = recipe.privacy is not None and recipe.privacy.adaptive is not None
    if moves and number == 0:
        assert recipe.privacy is not None
        clip = recipe.privacy.clip
    failures: dict[str, Failure] = {
        name: Failure(name, FailureKind.REFUSED, "it trains a part of the adapter alone, and a sum needs all of it")
        for name in sampled
        if silos.plan(name).partial
    }
    note = Note(silos.dir.path / "masks.json", f"round {number}", number)
    cohort = tuple(name for name in note.survivors or sampled if name not in failures)
    place = Place(cohort[0] if cohort else "", number, silos.spec.rounds, recipe.seed, silos.rank(sampled[0]))
    shapes = dict(sorted(silos.shapes(parameters, place).items()))
    left = silos.chain.layouts(shapes)[-1] if silos.chain is not None else shapes
    length = size_of(left) + BESIDE
    how = encoding(recipe, len(cohort), length, clip)

    def asked(silo: str, masks: Fields) -> Request:
        fields = {
            "round": number,
            "rounds": silos.spec.rounds,
            "accepted": accepted.get(silo, -1),
            "silos": len(sampled),  # the same in every attempt, or a silo would train again
            **({CLIP: clip} if moves else {}),
        }
        return silos.request(silo, "train", number, broadcast, {**fields, **masks})

    vectors = Vectors("train", number, length, how.ring_bits, how.fields)
    summed = aggregate(silos, note, cohort, vectors, asked, failures, traffic)
    total = summed.total
    means, loss, weights = shown(total.values, len(total.survivors), how)
    if silos.chain is None:
        update = parted(means, shapes)
    else:
        update = silos.chain.decode({REST: means}, shapes, shared_key(recipe.seed, number))
    accumulator.add_mean(update, float(weights), len(total.survivors))
    result = FoldResult(list(sampled), list(total.survivors), [failures[name] for name in sorted(failures)])
    result.fields = {name: dict(summed.bytes_of[name]) for name in total.survivors}
    if isinstance(how, NoisedEncoding):  # as every silo accounts for it; and no loss is told beside noised values
        assert recipe.privacy is not None
        result.figures["epsilon"] = spent([times(how.mechanism, number + 1)], recipe.privacy.delta).epsilon
        if how.adaptive is not None and how.clip is not None:  # from the noised count, which costs nothing more
            count = shown_count(total.values, len(total.survivors), how)
            result.figures |= {CLIP: how.clip, "within_clip": count / len(total.survivors) + 0.5}
            result.clip = how.adaptive.step(how.clip, count, len(total.survivors))
    elif not withheld(recipe):
        result.loss = loss
    if total.liars:
        result.figures["wrong_shares"] = total.liars
    for failure in result.failures:
        silos.failed(number, failure)
    return result
