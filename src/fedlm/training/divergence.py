"""How far a model's next-token distributions have moved from a reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fedlm.training.attention import packed
from fedlm.training.forward import by_tokens, model_device, precision, target_logits
from fedlm.training.packing import pack
from fedlm.training.prefixes import with_prompt
from fedlm.training.sequences import Encoded


@torch.no_grad()
def token_kl(
    model: nn.Module,
    sequences: Sequence[Encoded],
    reference: Callable[[], AbstractContextManager[None]],
    batch_tokens: int,
    *,
    packing: bool = True,
) -> tuple[float, float]:
    """KL(model || reference) in nats, summed over the positions of all targets, and their number.

    It is exact over the vocabulary at each position; positions are those of the given texts, not of the model's own.

    Args:
        reference: inside, the model is the reference.
        batch_tokens: tokens per forward pass.
    """
    total = count = 0.0
    for run in by_tokens([len(s) for s in sequences], batch_tokens if packing else 1):
        chosen = [sequences[i] for i in run]
        ours = _log_probabilities(model, chosen, packing)
        with reference():
            theirs = _log_probabilities(model, chosen, packing)
        total += float((ours.exp() * (ours - theirs)).sum(dtype=torch.float64))
        count += len(ours)
    return total, count


def _log_probabilities(model: nn.Module, sequences: Sequence[Encoded], packing: bool) -> Tensor:
    """[targets, vocabulary], fp32."""
    device = model_device(model)
    with packed(model) if packing else nullcontext(), precision(model):
        if packing:
            logits = target_logits(model, pack(with_prompt(model, sequences)).to(device))
        else:
            (one,) = sequences
            ids = torch.from_numpy(one.ids[:-1].astype("int64")).to(device)[None]
            keep = torch.from_numpy(one.loss[1:]).to(device)[None]
            out = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
            logits = out if out.ndim == 2 else out[keep]
    return torch.log_softmax(logits.float(), -1)
