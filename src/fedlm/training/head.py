"""The last matrix product and the cross entropy, in pieces: the logits of many targets never exist at once.

2,048 targets over a vocabulary of 49,152 are 400 MB of fp32 logits, three times over with their gradient.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Targets whose logits exist at once."""

STORED = 1 << 23
"""A trained head's logits are kept for the backward pass up to so many, and computed twice beyond. The bits are the
same; with a small vocabulary it saves time, with a large one it would cost gigabytes."""

_plain: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def head_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [M, n], targets [M] -> negative log-likelihoods [M], fp32."""
    weight: Any = head.weight
    trained = any(p.requires_grad for p in head.parameters())
    if torch.is_grad_enabled() and hidden.requires_grad and not trained and getattr(head, "bias", None) is None:
        return _FrozenHead.apply(hidden, weight, targets)  # type: ignore[no-any-return,no-untyped-call]
    twice = torch.is_grad_enabled() and len(targets) * len(weight) > STORED
    parts = [
        checkpoint(_nll, head, h, t, use_reentrant=False) if twice else _nll(head, h, t)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)  # type: ignore[no-untyped-call]
    ]
    return torch.cat(parts)


def _nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """With z = h W', nll = logsumexp(z) - z_target:  dh = dnll (softmax(z) - onehot) W, kept from the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(targets), CHUNK):
            piece = slice(start, start + CHUNK)
            logp = torch.log_softmax((hidden[piece].to(weight.dtype) @ weight.t()).float(), -1)
            wanted = targets[piece, None]
            nll[piece] = -logp.gather(1, wanted)[:, 0]
            p = logp.exp_().scatter_add_(1, wanted, torch.full_like(nll[piece], -1.0)[:, None])
            gradient[piece] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, dnll: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * dnll[:, None]).to(gradient.dtype), None, None


@torch.no_grad()
def plain_head(model: Any) -> bool:
    """Whether the model's logits are its output matrix times its last hidden state, by a probe, once per model object.

    Some families scale or cap their logits; those go through their own forward.
    """
    if model not in _plain:
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight
        ids = torch.arange(4, device=embedding.device)[None] % len(embedding)
        if head is None or model.base_model is model:
            _plain[model] = False
        else:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            _plain[model] = torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)
    return _plain[model]
