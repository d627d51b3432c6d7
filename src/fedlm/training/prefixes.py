"""A soft prompt in packed rows: virtual tokens before every sequence; a prefix's keys and values at their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fedlm.models.soft_prompts import SoftPromptModel
from fedlm.training.packing import Packed
from fedlm.training.sequences import Encoded


@dataclass(frozen=True)
class Prefix:
    """What the virtual tokens of a packed row are, in every layer, to those that see them."""

    places: Tensor
    """int64 [R]: rows of the packed batch that are virtual tokens."""
    values: Tensor
    """[layers, 2, R, kv heads, head size]: keys (as rotated) and values."""

    def into(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """k and v [T, kv heads, head size] with those of the prefix at its places."""
        keys, values = self.values[layer].to(k.dtype)
        return k.index_put((self.places,), keys), v.index_put((self.places,), values)


def with_prompt(model: nn.Module, sequences: Sequence[Encoded]) -> Sequence[Encoded]:
    """The sequences as the model reads them: with its virtual tokens, none of which is a target, before each."""
    if not isinstance(model, SoftPromptModel) or model.off:
        return sequences
    virtual = model.virtual_ids().numpy().astype(np.int32)
    before = np.zeros(len(virtual), np.bool_)
    return [Encoded(np.concatenate([virtual, s.ids]), np.concatenate([before, s.loss]), s.cut) for s in sequences]


def prefix_of(model: nn.Module, batch: Packed) -> Prefix | None:
    """The prefix at its places in this batch; None where the model has none."""
    if not isinstance(model, SoftPromptModel) or model.off or model.spec.kind != "prefix":
        return None
    virtual = batch.ids[0] - model.vocabulary
    places = (virtual >= 0).nonzero()[:, 0]
    return Prefix(places, model.key_values()[:, :, virtual[places]])
