"""Tokens and whole sequences read out of one update: the span check of DAGER.

Petrov, Dimitrov, Baader, Müller, Vechev, "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS 2024. The
gradient of a projection W [out, d] that reads x_1, ..., x_T is sum_t g_t x_t^T: its rows lie in the span of the inputs.
While T < d few other vectors do, so a guessed input is checked by its distance to that span.

*Tokens.* What the first layer's attention reads is a function of the token alone in a decoder with rotary positions
(the norm of its embedding; rotations come after the projections), so every word of the vocabulary is checked at once.
*Order.* What the second layer's attention reads at a place depends on all tokens up to there and on their distances: a
beginning is prolonged by each recovered token in turn, and those prolongations stay whose vector lies in the second
layer's span. A token that passes alone begins a sequence. (One token repeated from the start on has the same vector
at every place, an average of equal values; such a run is followed as far as `RUN`, and never reported by itself.)

Queries, keys and values read the same inputs. Their gradients are stacked, which the paper does not do, because queries
miss what the others see: the first token's query has gradient 0 (it attends to itself alone, with weight 1). The last
token of a sequence is predicted and never read, and no span holds it.

LoRA: the gradient of A [r, d] is (alpha / r) B^T g x^T, so the same check works once B is not 0 (after a first round),
as long as the ranks of the stacked A's add up to as many as the inputs. An AdamW step is not a gradient: its
rows span everything, and the exact check fails; `nearest_tokens` may still name some from its strongest directions.

The attacker knows the model that the update began with. The check must be exact: it is for fp32 and one step of SGD.
Under noise it falls early, and that it fails is then no proof that all attacks do (Kalikman et al., "TIGER", 2026,
optimise the distance instead).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.privacy.clipping import clip
from fedlm.randomness import torch_generator
from fedlm.training.attention import causal_model, packed
from fedlm.training.forward import by_tokens, model_device
from fedlm.training.packing import pack
from fedlm.training.sequences import Encoded

TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding: products in fp32 leave about 1e-8 to 1e-7 of it, the
weakest token of a batch of 4 x 32 on SmolLM2-135M 1e-3."""
RUN = 4
"""Times that a sequence's first token may stand there before another one comes."""
THRESHOLD = 1e-3
"""Relative distance below which a vector lies in the span: on SmolLM2 true tokens are at 1e-6, others above 0.1."""


@dataclass(frozen=True)
class Recovered:
    """What one update told.

    Attributes:
        tokens: distinct tokens in the first span, ascending.
        sequences: each as far as it was read, so without its last token.
        ranks: of the two spans.
        complete: False where the search was cut at its limit.
    """

    tokens: list[int]
    sequences: list[list[int]]
    ranks: tuple[int, int]
    complete: bool = True


@dataclass(frozen=True)
class Score:
    """`correct` of the `named` things are among the `present` ones."""

    named: int
    correct: int
    present: int

    @property
    def recall(self) -> float:
        return self.correct / self.present if self.present else 0.0

    @property
    def precision(self) -> float:
        return self.correct / self.named if self.named else 0.0


def recover(
    model: nn.Module,
    update: Tensors,
    *,
    tolerance: float = TOLERANCE,
    noise: float = 0.0,
    threshold: float = THRESHOLD,
    longest: int = 512,
    widest: int = 256,
) -> Recovered:
    """The tokens and sequences of the batch that this update is a step of SGD on.

    Args:
        model: as it was broadcast, with its adapter; a decoder like Llama.
        update: gradients, or any multiple of them such as one step's change, by parameter name.
        tolerance, noise: see `row_space`.
        threshold: relative distance to a span, below which a vector is in it.
        longest: tokens at which a sequence is given up.
        widest: beginnings that are followed at a time; where more pass, the nearest stay and `complete` is False.

    Raises:
        ModelError: the update has no such layers, or the model cannot be packed (see `packed`).
    """
    spans = [row_space(attention_gradients(update, layer), tolerance, noise) for layer in (0, 1)]
    tokens = (token_distances(model, spans[0]) < threshold).nonzero()[:, 0].tolist()
    found: list[list[int]] = []
    beginnings: list[list[int]] = [[]]
    complete = True
    for _ in range(longest):
        owners: list[int] = []
        tries: list[list[int]] = []
        for i, beginning in enumerate(beginnings):
            full = len(beginning) >= RUN and _is_run(beginning)
            tries += [[*beginning, token] for token in tokens if not (full and token == beginning[0])]
            owners += [i] * (len(tries) - len(owners))
        if not tries:
            break
        away = distances(attention_inputs(model, tries, 1), spans[1])
        passed = [i for i in away.argsort().tolist() if float(away[i]) < threshold]
        complete, passed = complete and len(passed) <= widest, sorted(passed[:widest])
        prolonged = {owners[i] for i in passed if not _is_run(tries[i])}
        found += [b for i, b in enumerate(beginnings) if i not in prolonged and (len(b) == 1 or len(set(b)) > 1)]
        beginnings = [tries[i] for i in passed]
    else:
        complete, found = False, found + beginnings
    started = {ids[0] for ids in found if len(ids) > 1}
    found = [ids for ids in found if len(ids) > 1 or ids[0] not in started]
    return Recovered(tokens, found, (len(spans[0]), len(spans[1])), complete)


def _is_run(ids: Sequence[int]) -> bool:
    """Whether this is one token again and again, of which every layer says the same as of the token alone."""
    return len(ids) > 1 and len(set(ids)) == 1


def attention_gradients(update: Tensors, layer: int) -> list[Tensor]:
    """The gradients [out, d] of a layer's query, key and value projections, or [r, d] of their LoRA A's: all there are.

    Raises:
        ModelError: there are none.
    """
    name = re.compile(rf"(?:^|\.)layers\.{layer}\.self_attn\.[qkv]_proj\.(?:lora_A\.)?weight$")
    found = [update[n] for n in sorted(update) if name.search(n)]
    if not found:
        raise ModelError(
            f"the update holds no attention projections of layer {layer}, or only what a silo never trains",
            fix="the span check needs q_proj, k_proj or v_proj of a decoder's first two layers, or their LoRA A",
        )
    return found


def row_space(gradients: Sequence[Tensor], tolerance: float = TOLERANCE, noise: float = 0.0) -> Tensor:
    """An orthonormal basis [rank, d], fp64, of the stacked gradients' row space.

    Args:
        gradients: each [rows, d].
        tolerance: share of the largest singular value below which one is rounding.
        noise: standard deviation of noise that every entry is known to have. A matrix [m, d] of it has singular values
            up to about noise (sqrt m + sqrt d), and what is not above tells nothing.
    """
    stacked = torch.cat([g.detach().to("cpu", torch.float64) for g in gradients])
    _, singular, basis = torch.linalg.svd(stacked, full_matrices=False)
    floor = max(tolerance * float(singular[0]), noise * (len(stacked) ** 0.5 + stacked.shape[1] ** 0.5))
    kept: Tensor = basis[: int((singular > floor).sum())]
    return kept


def distances(vectors: Tensor, basis: Tensor) -> Tensor:
    """|x - P x| / |x| [n] of vectors [n, d], for P the projection onto the basis [rank, d]; 1 of a zero vector."""
    x = vectors.to(basis.dtype)
    rest = x - (x @ basis.T) @ basis
    norms = x.norm(dim=1)
    return torch.where(norms > 0, rest.norm(dim=1) / norms.clamp_min(torch.finfo(x.dtype).tiny), torch.ones_like(norms))


def token_distances(model: nn.Module, basis: Tensor) -> Tensor:
    """Distance [vocabulary] of what the first layer reads of each token to the first layer's span."""
    size = causal_model(model).get_input_embeddings().weight.shape[0]
    parts = (torch.arange(start, min(start + 4096, size)) for start in range(0, size, 4096))
    return torch.cat([distances(_first_inputs(model, part), basis) for part in parts])


class _Reached(Exception):
    """The layer that is looked at has been reached; what comes after it is not computed."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


@torch.no_grad()
def attention_inputs(
    model: nn.Module, sequences: Sequence[Sequence[int]], layer: int, batch_tokens: int = 65536
) -> Tensor:
    """What the attention of a layer reads at each sequence's last token [n, d], on the CPU.

    Beginnings that sequences share are computed once: neighbours should begin alike.
    """
    whole = [Encoded(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_)) for ids in sequences]
    found = []
    with packed(model):
        for run in by_tokens([len(ids) for ids in sequences], batch_tokens):
            batch = pack([whole[i] for i in run]).to(model_device(model))
            inputs = _inputs(
                model, layer, input_ids=batch.ids, position_ids=batch.positions, use_cache=False, packed=batch
            )
            found.append(inputs[0, batch.ends].cpu())
    return torch.cat(found)


@torch.no_grad()
def _first_inputs(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the first layer's attention reads of these tokens [n, d], each alone."""
    return _inputs(model, 0, input_ids=tokens[:, None].to(model_device(model)), use_cache=False)[:, 0].cpu()


def _inputs(model: nn.Module, layer: int, **arguments: Any) -> Tensor:
    inner, training = causal_model(model), model.training
    end = f"layers.{layer}.self_attn.q_proj"
    modules = [module for name, module in inner.named_modules() if name.endswith(end)]
    if len(modules) != 1:
        raise ModelError(f"{type(inner).__name__} has no {end}", fix="this attack is for decoders built like Llama")

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    handle = modules[0].register_forward_pre_hook(stop)
    model.eval()
    try:
        inner(**arguments)
    except _Reached as reached:
        return reached.inputs
    finally:
        handle.remove()
        model.train(training)
    raise ModelError(f"{type(inner).__name__} never used its {end}")


def read_tokens(sequences: Iterable[Sequence[int]]) -> set[int]:
    """The tokens that a model reads of these sequences: all but what stands last alone."""
    return {token for ids in sequences for token in ids[:-1]}


def score_tokens(named: Iterable[int], sequences: Iterable[Sequence[int]]) -> Score:
    """Of the distinct tokens of these sequences, last ones too, how many were named."""
    names, present = set(named), {token for ids in sequences for token in ids}
    return Score(len(names), len(names & present), len(present))


def score_sequences(found: Iterable[Sequence[int]], sequences: Iterable[Sequence[int]]) -> Score:
    """How many sequences were found exactly, but for their last token, which no gradient of a layer's inputs holds."""
    names, present = {tuple(ids) for ids in found}, {tuple(ids[:-1]) for ids in sequences}
    return Score(len(names), len(names & present), len(present))


def frequent_tokens(public: Iterable[Sequence[int]], count: int) -> list[int]:
    """The guess of one who has seen no update: the most frequent tokens of public text; of equals the lower ones."""
    tokens, times = np.unique(np.concatenate([np.asarray(ids) for ids in public]), return_counts=True)
    return [int(token) for token in tokens[np.lexsort((tokens, -times))[:count]]]


def nearest_tokens(model: nn.Module, update: Tensors, count: int, noise: float = 0.0) -> list[int]:
    """The `count` tokens nearest to the first layer's span: a guess under noise, where none lies in it.

    Args:
        noise: standard deviation of each entry's noise; a span above it is taken, or the strongest direction alone.
    """
    gradients = attention_gradients(update, 0)
    span = row_space(gradients, noise=noise)
    if not len(span):
        span = row_space(gradients)[:1]
    return [int(token) for token in token_distances(model, span).argsort(stable=True)[:count]]


def noised(update: Tensors, bound: float, multiplier: float, seed: int) -> tuple[Tensors, float]:
    """An update clipped to `bound` over all its values, with Gaussian noise of multiplier x bound on each; and that
    standard deviation. For a measurement: the noise is keyed by a public seed and protects nothing."""
    clipped, sigma = clip(update, bound).tensors, multiplier * bound
    return {
        name: value + sigma * torch.randn(value.shape, generator=torch_generator(seed, "attack noise", name))
        for name, value in clipped.items()
    }, sigma


def score_under_noise(
    model: nn.Module, update: Tensors, sequences: Sequence[Sequence[int]], bound: float, multiplier: float, seed: int
) -> Score:
    """Tokens named from a `noised` update by an attacker who knows the noise and how many distinct tokens there are:
    to be held against as many `frequent_tokens`."""
    private, sigma = noised(update, bound, multiplier, seed)
    count = score_tokens([], sequences).present
    return score_tokens(nearest_tokens(model, private, count, sigma), sequences)


def summed(updates: Sequence[Tensors]) -> Tensors:
    """What a coordinator sees of several silos behind secure aggregation."""
    return {name: sum((u[name] for u in updates[1:]), updates[0][name].clone()) for name in updates[0]}


def attribute_by_updates(model: nn.Module, updates: Sequence[Tensors], tokens: Sequence[int]) -> list[int]:
    """Whose each token is, to one who sees every silo's update by itself: the silo to whose span it is nearest."""
    away = torch.stack([token_distances(model, row_space(attention_gradients(u, 0))) for u in updates])
    return [int(silo) for silo in away[:, list(tokens)].argmin(0)]


def attribute_by_texts(known: Sequence[Iterable[Sequence[int]]], size: int, tokens: Sequence[int]) -> list[int]:
    """Whose each token is, to one who sees a sum alone and knows texts like each silo's: where it is likeliest.

    Args:
        known: sequences like those of each silo; add-one smoothing serves for tokens that they lack.
        size: of the vocabulary.
    """
    counts = np.stack([np.bincount(np.concatenate([np.asarray(ids) for ids in k]), minlength=size) for k in known]) + 1
    share = counts / counts.sum(axis=1, keepdims=True)
    return [int(silo) for silo in share[:, list(tokens)].argmax(axis=0)]


def score_attribution(guesses: Sequence[int], tokens: Sequence[int], silos: Sequence[Iterable[Sequence[int]]]) -> Score:
    """Of the tokens that one silo alone has, how many were given to it: among n silos a blind guess gets 1/n.

    Args:
        silos: the sequences of each.
    """
    own = [{token for ids in silo for token in ids} for silo in silos]
    owners = {token: [i for i, have in enumerate(own) if token in have] for token in tokens}
    sole = [(guess, owners[t][0]) for guess, t in zip(guesses, tokens, strict=True) if len(owners[t]) == 1]
    return Score(len(sole), sum(guess == owner for guess, owner in sole), len(sole))
