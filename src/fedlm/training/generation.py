"""Text from a model, many prompts at once: one pass over the prompts, then one token of each per forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlm.errors import ModelError
from fedlm.models.soft_prompts import virtual_tokens

Draw = Callable[[Tensor, Sequence[int]], Tensor]
"""The next tokens [n], from logits [n, vocabulary] (fp32, on the CPU), of the texts with these numbers."""


def context_length(model: Any) -> int:
    """Longest sequence the model reads, in tokens; a soft prompt before it takes some of the model's positions."""
    return int(model.config.max_position_embeddings) - virtual_tokens(model)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    batch_tokens: int,
    max_new_tokens: int,
    draw: Draw | None = None,
) -> list[str]:
    """Continuations of token-id prompts, without special tokens; the likeliest, or drawn. See `continuations`."""
    found = continuations(
        model, tokenizer, prompts, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens, draw=draw
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    batch_tokens: int,
    max_new_tokens: int,
    draw: Draw | None = None,
    each: int = 1,
) -> list[list[int]]:
    """Tokens that follow token-id prompts, up to and with one that ends a text; the likeliest, or drawn.

    Prompts of similar length go together, padded on the left so that every row's last token is its own; positions are
    counted from each row's first real token. Prompts that leave no room in the model's context lose their beginning.
    Sampling and penalties that a model's own generation settings may ask for are left out, so the text is reproducible.

    Args:
        model: in evaluation mode.
        batch_tokens: tokens of all texts that are written side by side, prompts included.
        each: texts for every prompt, which is read once; text c of prompt i has the number i * each + c.

    Raises:
        ModelError: no prompt has room before so many new tokens.
    """
    device = next(model.parameters()).device
    room = context_length(model) - max_new_tokens
    if room < 1:
        raise ModelError(
            f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of {room + max_new_tokens}",
            where="max_new_tokens",
        )
    stops = torch.tensor(_stop_tokens(model, tokenizer), dtype=torch.long, device=device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found: list[list[int]] = [[] for _ in range(len(prompts) * each)]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        longest = min(room, max(1, len(prompts[order[0]])))
        size = max(1, batch_tokens // ((longest + max_new_tokens) * each))
        batch, order = order[:size], order[size:]
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            kept = (prompts[index] or [pad])[-longest:]
            ids[row, longest - len(kept) :] = torch.tensor(kept)
            mask[row, longest - len(kept) :] = 1
        numbers = [index * each + c for index in batch for c in range(each)]
        written = _continued(model, ids.to(device), mask.to(device), stops, max_new_tokens, numbers, draw, each)
        for number, tokens in zip(numbers, written, strict=True):
            found[number] = tokens
    return found


def _continued(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    stops: Tensor,
    steps: int,
    numbers: Sequence[int],
    draw: Draw | None,
    each: int,
) -> list[list[int]]:
    """Up to `steps` tokens of each text after left-padded prompts [n, longest], `each` of them per prompt."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    done = torch.zeros(len(numbers), dtype=torch.bool, device=ids.device)
    written: list[list[int]] = [[] for _ in numbers]
    past: Any = None
    for step in range(steps):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past, logits = output.past_key_values, output.logits[:, -1]
        if step == 0 and each > 1:
            past.batch_repeat_interleave(each)
            logits, mask, positions = (t.repeat_interleave(each, 0) for t in (logits, mask, positions))
        open_rows = (~done).nonzero()[:, 0]
        token = torch.full((len(numbers),), int(stops[0]), device=ids.device)
        if draw is None:
            token[open_rows] = logits[open_rows].argmax(-1)
        else:
            rows = open_rows.tolist()
            token[open_rows] = draw(logits[open_rows].float().cpu(), [numbers[row] for row in rows]).to(ids.device)
        for row, value in zip(open_rows.tolist(), token[open_rows].tolist(), strict=True):
            written[row].append(value)
        done = done | torch.isin(token, stops)
        if bool(done.all()):
            break
        ids = token[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return written


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(token for token in stops if token is not None)
