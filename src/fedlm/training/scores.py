"""What a model says of whole sequences: a head's outputs on each one's last token, the logits of a few tokens, or the
mean of its states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from fedlm.models.heads import head_of
from fedlm.training.attention import causal_model, packed
from fedlm.training.forward import by_tokens, drops, model_device, padded_logits, precision, target_logits
from fedlm.training.packing import pack
from fedlm.training.prefixes import with_prompt
from fedlm.training.sequences import Encoded


def whole(ids: list[int], tokenizer: Any, max_length: int) -> Encoded | None:
    """A sequence without target tokens, cut to `max_length`, for a head; None where nothing is left.

    Padding tokens at its end go: transformers' sequence classification reads the last token that is not padding, which
    where a model pads with its end-of-turn token is the one before that.
    """
    kept = ids[:max_length]
    while kept and kept[-1] == tokenizer.pad_token_id:
        kept = kept[:-1]
    if not kept:
        return None
    return Encoded(np.asarray(kept, np.int32), np.zeros(len(kept), np.bool_), cut=len(ids) > max_length)


def sequence_scores(model: nn.Module, sequences: Sequence[Encoded], *, packing: bool = True) -> Tensor:
    """The head's outputs [sequences, outputs], fp32, differentiable. With packing, call inside `attention.packed`.

    Raises:
        ModelError: the model has no head.
    """
    head = head_of(model)
    with precision(model):
        hidden = _packed(model, sequences) if packing else _padded(model, sequences)
    if head.weight.dtype != torch.float32:
        return linear(hidden.float(), head.weight.float())
    scores: Tensor = head(hidden.float())  # as a module, so that who watches layers sees it
    return scores


def _packed(model: nn.Module, sequences: Sequence[Encoded]) -> Tensor:
    """Hidden states [sequences, d] of last tokens from one packed row."""
    batch = pack(sequences, share=not drops(model)).to(model_device(model))
    inner = causal_model(model)
    out = inner.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, packed=batch)
    return out.last_hidden_state[0][batch.ends]  # type: ignore[no-any-return]


def _padded(model: nn.Module, sequences: Sequence[Encoded]) -> Tensor:
    """The same from an ordinary padded batch; for models that cannot be packed."""
    device, longest = model_device(model), max(len(s) for s in sequences)
    ids, real = np.zeros((len(sequences), longest), np.int64), np.zeros((len(sequences), longest), np.int64)
    for i, s in enumerate(sequences):
        ids[i, : len(s)], real[i, : len(s)] = s.ids, 1
    inner = causal_model(model)
    out = inner.base_model(
        input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(real).to(device), use_cache=False
    )
    last = torch.tensor([len(s) - 1 for s in sequences], device=device)
    return out.last_hidden_state[torch.arange(len(sequences), device=device), last]  # type: ignore[no-any-return]


@torch.no_grad()
def scores_of(
    model: nn.Module, sequences: Sequence[Encoded], batch_tokens: int, *, packing: bool = True
) -> NDArray[np.float64]:
    """The head's outputs [sequences, outputs], measured: sequences that begin alike should be neighbours.

    Args:
        batch_tokens: tokens per forward pass.
    """
    return _measured(
        model,
        sequences,
        batch_tokens,
        head_of(model).out_features,
        packing,
        lambda run: sequence_scores(model, run, packing=packing),
    )


def _measured(
    model: nn.Module,
    sequences: Sequence[Encoded],
    batch_tokens: int,
    width: int,
    packing: bool,
    ask: Callable[[list[Encoded]], Tensor],
) -> NDArray[np.float64]:
    """What `ask` says of each sequence [sequences, width], in evaluation mode, forward pass by forward pass."""
    training, found = model.training, np.zeros((len(sequences), width))
    model.eval()
    try:
        with packed(model) if packing else nullcontext():
            for run in by_tokens([len(s) for s in sequences], batch_tokens):
                found[run] = ask([sequences[i] for i in run]).double().cpu().numpy()
    finally:
        model.train(training)
    return found


def choice_logits(model: nn.Module, sequences: Sequence[Encoded], tokens: list[int], *, packing: bool = True) -> Tensor:
    """The logits [sequences, tokens] of these tokens in the place of each sequence's one target, fp32, differentiable.
    With packing, call inside `attention.packed`."""
    with precision(model):
        if packing:
            batch = pack(with_prompt(model, sequences), share=not drops(model)).to(model_device(model))
            logits = target_logits(model, batch)
        else:
            logits, _ = padded_logits(model, sequences)
    return logits[:, tokens].float()


@torch.no_grad()
def choices_of(
    model: nn.Module, sequences: Sequence[Encoded], tokens: list[int], batch_tokens: int, *, packing: bool = True
) -> NDArray[np.float64]:
    """`choice_logits`, measured; arguments as `scores_of`."""

    def ask(run: list[Encoded]) -> Tensor:
        return choice_logits(model, run, tokens, packing=packing)

    return _measured(model, sequences, batch_tokens, len(tokens), packing, ask)


@torch.no_grad()
def mean_states(model: nn.Module, sequences: Sequence[Sequence[int]], batch_tokens: int) -> NDArray[np.float64]:
    """The mean of each sequence's last hidden states [sequences, width], in evaluation mode; 0 of an empty one.

    Args:
        sequences: token ids.
        batch_tokens: tokens per forward pass.
    """
    device, training, inner = model_device(model), model.training, causal_model(model)
    found = np.zeros((len(sequences), inner.get_output_embeddings().weight.shape[1]))
    real = [i for i, ids in enumerate(sequences) if len(ids)]
    model.eval()
    try:
        with precision(model):
            for run in by_tokens([len(sequences[i]) for i in real], batch_tokens):
                rows = [real[i] for i in run]
                longest = max(len(sequences[i]) for i in rows)
                whole, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
                for row, i in enumerate(rows):
                    n = len(sequences[i])
                    whole[row, :n], mask[row, :n] = torch.tensor(np.asarray(sequences[i], np.int64)), 1
                # The body gives no logits, and keeps no layer's states but the last's.
                out = inner.base_model(input_ids=whole.to(device), attention_mask=mask.to(device), use_cache=False)
                states = out.last_hidden_state.double().cpu()
                found[rows] = ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()
    finally:
        model.train(training)
    return found
