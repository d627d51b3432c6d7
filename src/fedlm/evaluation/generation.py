"""Answers by generation: what the model writes, parsed into one of the choices; unparsable answers are counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedlm.errors import ModelError
from fedlm.evaluation.prompts import context_length, render_prompt

_LETTER_FIRST = re.compile(r"^\(?([A-Z])\)?(?=[.):,]|\s*$)")
# The letter is a capital, and nothing but a mark or the end follows it: "the answer is a mammal" names no letter.
_LETTER_NAMED = re.compile(r"(?i:\b(?:answer|choice|option)\b(?:\s+is)?)\s*:?\s*\(?([A-Z])\)?(?=[.):,]|\s*(?:\n|$))")


@dataclass(frozen=True)
class GenerationScores:
    """Per item: whether an answer could be read from the text, and whether it is the right one."""

    parsed: np.ndarray
    correct: np.ndarray


def score_generation(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    task_name: str,
    *,
    batch_tokens: int,
    max_new_tokens: int,
) -> GenerationScores:
    """Let the model answer every row (`question`, `choices`, `answer`) greedily and parse what it wrote."""
    items = [(str(row["question"]), list(row["choices"]), int(row["answer"])) for row in rows]
    prompts = []
    for question, _, _ in items:
        text, _, special = render_prompt(question, tokenizer, task_name)
        prompts.append(list(tokenizer.encode(text, add_special_tokens=special)))
    answers = generate_greedy(model, tokenizer, prompts, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens)
    chosen = [parse_answer(text, choices) for text, (_, choices, _) in zip(answers, items, strict=True)]
    return GenerationScores(
        parsed=np.array([c is not None for c in chosen], dtype=bool),
        correct=np.array([c == answer for c, (_, _, answer) in zip(chosen, items, strict=True)], dtype=bool),
    )


def generate_greedy(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *, batch_tokens: int, max_new_tokens: int
) -> list[str]:
    """The likeliest continuations, token by token, of token-id prompts: see `generate`."""
    return generate(model, tokenizer, prompts, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens)


Draw = Callable[[torch.Tensor, int], int]
"""The next token from logits [vocabulary], fp32 on the CPU, of the prompt with this index."""


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    batch_tokens: int,
    max_new_tokens: int,
    draw: Draw | None = None,
) -> list[str]:
    """Continuations of token-id prompts, without special tokens; the likeliest, or drawn.

    Prompts of similar length go together, padded on the left so that every row's last token is its own; positions are
    counted from each row's first real token. Prompts that leave no room in the model's context lose their beginning.
    Sampling and penalties that a model's own generation settings may ask for are left out, so the text is reproducible.
    """
    device = next(model.parameters()).device
    room = context_length(model) - max_new_tokens
    if room < 1:
        raise ModelError(
            f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of {room + max_new_tokens}",
            where="evaluation.max_new_tokens",
        )
    stops = torch.tensor(_stop_tokens(model, tokenizer), dtype=torch.long, device=device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        longest = min(room, max(1, len(prompts[order[0]])))
        size = max(1, batch_tokens // (longest + max_new_tokens))
        batch, order = order[:size], order[size:]
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            kept = (prompts[index] or [pad])[-longest:]
            ids[row, longest - len(kept) :] = torch.tensor(kept)
            mask[row, longest - len(kept) :] = 1
        written = _continued(model, ids.to(device), mask.to(device), stops, pad, max_new_tokens, batch, draw)
        for index, row_ids in zip(batch, written.tolist(), strict=True):
            texts[index] = tokenizer.decode(row_ids, skip_special_tokens=True)
    return texts


def _continued(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    stops: torch.Tensor,
    pad: int,
    steps: int,
    prompts: Sequence[int],
    draw: Draw | None,
) -> torch.Tensor:
    """Up to `steps` tokens [rows, <= steps] after left-padded ids [rows, n] of these prompts; `pad` after an end."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    written: list[torch.Tensor] = []
    past = None
    for _ in range(steps):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past = output.past_key_values
        logits = output.logits[:, -1]
        if draw is None:
            token = logits.argmax(-1)
        else:
            values, ended = logits.float().cpu(), done.tolist()
            drawn = [pad if ended[i] else draw(values[i], prompt) for i, prompt in enumerate(prompts)]
            token = torch.tensor(drawn, device=logits.device)
        token = token.masked_fill(done, pad)
        written.append(token)
        done = done | torch.isin(token, stops)
        if bool(done.all()):
            break
        ids = token[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(written, dim=1)


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(token for token in stops if token is not None)


def parse_answer(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that the text names, or None when it names none or several.

    In this order: the text is a choice; its first line is one; it begins with exactly one (the longest if they nest);
    it begins with a letter such as 'B', '(B)' or 'B.'; it says 'the answer is B'; it contains exactly one choice.

    >>> parse_answer("B) the bank", ["school", "hospital"])
    1
    """
    known = [_plain(choice) for choice in choices]
    whole, first = _plain(text), _plain(text.strip().split("\n", 1)[0])
    for candidate in (whole, first):
        if candidate and known.count(candidate) == 1:
            return known.index(candidate)
    begun = [i for i, k in enumerate(known) if k and re.match(re.escape(k) + r"(?!\w)", whole)]
    if begun:
        longest = max(len(known[i]) for i in begun)
        best = [i for i in begun if len(known[i]) == longest]
        return best[0] if len(best) == 1 else None
    letter = _LETTER_FIRST.match(text.strip()) or _LETTER_NAMED.search(text)
    if letter and (index := ord(letter.group(1)) - ord("A")) < len(choices):
        return index
    inside = [i for i, k in enumerate(known) if k and re.search(r"(?<!\w)" + re.escape(k) + r"(?!\w)", whole)]
    return inside[0] if len(inside) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,:;!?\"'`*()")
