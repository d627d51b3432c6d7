"""Text from the model, token by token: one prefill, then one forward pass per token on the key-value cache.

Sampling draws from a generator of its own, so the same seed gives the same text and no other draw is moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlm.errors import ModelError
from fedlm.models.load import render
from fedlm.models.soft_prompts import virtual_tokens
from fedlm.randomness import torch_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most this many.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: nucleus sampling (Holtzman et al., ICLR 2020): the smallest set of tokens with this much probability.
        seed: of the draws, used only at temperature > 0.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ModelError("max_new_tokens must be at least 1, temperature at least 0, and top_p in (0, 1]")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """Token ids of plain text to continue, or of messages with the assistant's turn opened."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    # the template writes all special tokens itself
    return list(tokenizer(render(tokenizer, prompt, add_generation_prompt=True), add_special_tokens=False)["input_ids"])


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text: the generation config's and the tokenizer's."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, list | tuple) else {configured}
    return {int(i) for i in ids | {tokenizer.eos_token_id} if i is not None}


def stream(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict[str, str]], sampling: Sampling
) -> Iterator[str]:
    """Yield the generated text in pieces as soon as they are whole characters.

    Raises:
        ModelError: the prompt is empty, or leaves no room in the model's context.
    """
    ids = encode_prompt(tokenizer, prompt)
    shown, generated = "", list[int]()
    for token in _tokens(model, ids, sampling, stop_ids(model, tokenizer)):
        generated.append(token)
        text = tokenizer.decode(generated, skip_special_tokens=True)
        # A character's bytes may span tokens; the replacement mark at the end says that the rest is still to come.
        if not text.endswith("\ufffd") and text.startswith(shown) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(generated, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest


@torch.inference_mode()
def _tokens(model: nn.Module, prompt: list[int], sampling: Sampling, stop: set[int]) -> Iterator[int]:
    context = int(getattr(model.config, "max_position_embeddings", 0)) or None
    if context is not None:
        context -= virtual_tokens(model)
    if not prompt:
        raise ModelError("the prompt is empty")
    if context is not None and len(prompt) >= context:
        raise ModelError(
            f"the prompt has {len(prompt)} tokens, and the model's context is {context}",
            fix="shorten it, or start a new conversation with /reset",
        )
    generator = torch_generator(sampling.seed, "generate")
    device = next(model.parameters()).device
    room = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(prompt))
    ids, cache = torch.tensor([prompt], device=device), None
    for _ in range(room):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = choose(output.logits[0, -1].float().cpu(), sampling, generator)
        if token in stop:
            return
        yield token
        ids, cache = torch.tensor([[token]], device=device), output.past_key_values


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits [vocabulary], fp32 on the CPU."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # keep a token if the mass before it is still short of top_p: always at least the first
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))
