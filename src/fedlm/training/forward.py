"""From sequences to negative log-likelihoods: logits only where there is a target, cross entropy in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlm.recipe.schema import TrainingSpec
from fedlm.training.attention import causal_model, packed
from fedlm.training.head import CHUNK, head_nll, plain_head
from fedlm.training.packing import Packed, pack
from fedlm.training.prefixes import prefix_of, with_prompt
from fedlm.training.sequences import Encoded


def target_nll(model: nn.Module, batch: Packed) -> Tensor:
    """Negative log-likelihood of each target [M], fp32, differentiable. Call inside `attention.packed(model)`."""
    inputs = _packed_inputs(model, batch)
    if len(batch.targets) > CHUNK and plain_head(inner := causal_model(model)):
        hidden = inner.base_model(**inputs).last_hidden_state[0]
        return head_nll(inner.get_output_embeddings(), hidden[batch.predictors], batch.targets)
    out = model(**inputs, logits_to_keep=batch.predictors)
    return cross_entropy(out.logits[0].float(), batch.targets, reduction="none")


def target_logits(model: nn.Module, batch: Packed) -> Tensor:
    """What the model gives every token in the place of each target [M, vocabulary]; else as `target_nll`."""
    logits: Tensor = model(**_packed_inputs(model, batch), logits_to_keep=batch.predictors).logits[0]
    return logits


def _packed_inputs(model: nn.Module, batch: Packed) -> dict[str, Any]:
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False, "packed": batch}
    if (prefix := prefix_of(model, batch)) is not None:
        inputs["prefix"] = prefix
    return inputs


def padded_nll(model: nn.Module, sequences: Sequence[Encoded]) -> Tensor:
    """The same from an ordinary padded batch [M], in the order of the sequences; for models that cannot be packed."""
    logits, targets = padded_logits(model, sequences)
    return cross_entropy(logits.float(), targets, reduction="none")


def padded_logits(model: nn.Module, sequences: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """`target_logits` from a padded batch, and the targets [M]."""
    device = model_device(model)
    longest = max(len(s) for s in sequences)
    ids = np.zeros((len(sequences), longest), np.int64)
    loss, real = np.zeros(ids.shape, np.bool_), np.zeros(ids.shape, np.int64)
    for i, s in enumerate(sequences):
        ids[i, : len(s)], loss[i, : len(s)], real[i, : len(s)] = s.ids, s.loss, 1
    keep, whole = torch.from_numpy(loss[:, 1:]).to(device), torch.from_numpy(ids).to(device)
    mask = torch.from_numpy(real[:, :-1]).to(device)
    # the last token of all is predicted and never read
    out = model(input_ids=whole[:, :-1], attention_mask=mask, use_cache=False, logits_to_keep=keep)
    logits = out.logits if out.logits.ndim == 2 else out.logits[keep]
    return logits, whole[:, 1:][keep]


def batch_nll(model: nn.Module, sequences: Sequence[Encoded], spec: TrainingSpec) -> Tensor:
    """Negative log-likelihood [M] of every target of one forward pass, in the order of the sequences."""
    with precision(model):
        if spec.packing:
            batch = pack(with_prompt(model, sequences), share=not drops(model))
            return target_nll(model, batch.to(model_device(model)))
        return padded_nll(model, sequences)


def drops(model: nn.Module) -> bool:
    """Whether dropout is on: then a shared beginning must not be computed once, or its examples would drop alike."""
    in_attention: Any = getattr(causal_model(model).config, "attention_dropout", 0.0)
    if model.training and in_attention:
        return True
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in model.modules())


def model_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def precision(model: nn.Module) -> AbstractContextManager[Any]:
    """bf16 autocast when the model is declared bf16, else nothing.

    Under autocast matrix products run in bf16 while trainable parameters, their gradients and the optimiser stay fp32.
    """
    device = model_device(model).type
    if causal_model(model).config.dtype == torch.bfloat16:
        return torch.autocast(device, dtype=torch.bfloat16)
    return nullcontext()


def by_tokens(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Cut indices, kept in order, into runs of at most `limit` tokens (a longer sequence makes a run of its own)."""
    run: list[int] = []
    size = 0
    for i, length in enumerate(lengths):
        if run and size + length > limit:
            yield run
            run, size = [], 0
        run.append(i)
        size += length
    if run:
        yield run


@torch.no_grad()
def sequence_nll(
    model: nn.Module, sequences: Sequence[Encoded], batch_tokens: int, *, packing: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum of the targets' NLL and number of targets, of each sequence.

    Sequences that begin alike (the choices of one question) should be neighbours: what they share is computed once.

    Args:
        batch_tokens: tokens per forward pass, shared ones counted for each sequence.
        packing: False for models that cannot be packed.
    """
    sums, counts = np.zeros(len(sequences)), np.array([s.targets for s in sequences], dtype=np.int64)
    device, training = model_device(model), model.training
    model.eval()
    try:
        with packed(model) if packing else nullcontext(), precision(model):
            for run in by_tokens([len(s) for s in sequences], batch_tokens):
                chosen = [sequences[i] for i in run]
                if not any(s.targets for s in chosen):
                    continue
                if packing:
                    batch = pack(with_prompt(model, chosen)).to(device)
                    nll, owners = target_nll(model, batch), batch.owners
                else:
                    nll = padded_nll(model, chosen)
                    owners = torch.from_numpy(np.repeat(np.arange(len(chosen)), [s.targets for s in chosen])).to(device)
                total = torch.zeros(len(chosen), dtype=torch.float64, device=device)
                sums[run] = total.index_add_(0, owners, nll.double()).cpu().numpy()
    finally:
        model.train(training)
    return sums, counts
