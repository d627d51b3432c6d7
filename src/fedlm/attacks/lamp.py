"""A sequence guessed from an update by matching its gradient: LAMP, and DLG before it.

Balunovic, Dimitrov, Jovanovic, Vechev, "LAMP: Extracting Text from Gradients with Language Model Priors", NeurIPS 2022.
Dummy embeddings x [T, d] are moved until the gradient that they give is the one that was seen. It needs no exact span,
so it reads updates of which DAGER says nothing: LoRA whose ranks add up to fewer than the tokens, or no first layers.

*Continuous phase.* Adam on L_rec(x) + alpha_reg L_reg(x). L_rec is the mean of 1 - cosine(gradient of x, gradient seen)
over layers; L_reg is the squared difference between the mean norm of x's rows and that of the vocabulary's embeddings,
which keeps x from growing. *Discrete phase*, every n_c steps: of n_d random reorderings of x (swap two, move one, move
some, move a beginning to the end) that one is taken which has the least L_rec + alpha_lm L_lm, if it is less than that
of x; L_lm is an auxiliary language model's log perplexity of the tokens nearest to x. x begins as the best of n_init
draws and ends as the tokens nearest by cosine. `DLG` (Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019) is
here the same search by the squared L2 distance, with nothing beside it.

The paper classifies, and knows the labels. Here the targets are the sequence's own next tokens, so they are read from
x too: the target at a place is softmax(cosine(x_next, vocabulary) / `TEMPERATURE`), which is near to one token when x
is. Of an update, the weights of linear layers are matched. Embeddings and the output head are left out, as in the
paper: they name their tokens by themselves.

The gradient of a linear layer is sum_t z_t h_t^T of its inputs h and its outputs' gradients z. L_rec needs only inner
products of such sums, so no gradient of x is ever written out, and several updates are attacked in one pass.

The attacker knows the model that an update began with, that it is of one sequence, and the number of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, log_softmax, normalize

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.models.adapters import trainable
from fedlm.randomness import torch_generator
from fedlm.training.attention import causal_model

TEMPERATURE = 0.05
"""Of a place's target: a neighbour of cosine 0.7, as tokens of a small model have, gets 1/400 beside its token."""


@dataclass(frozen=True)
class Rule:
    """How x is searched for.

    Attributes:
        distance: L_rec: 'cos' as above, or 'l2', the sum of squared differences.
        rate: Adam's, in standard deviations of the vocabulary's embeddings; it falls to 0 along half a cosine.
        alpha_reg, alpha_lm: weights of L_reg and L_lm.
        n_init: first draws.
        n_c: steps between discrete phases.
        n_d: reorderings in each; 0: there are none.
    """

    distance: Literal["cos", "l2"] = "cos"
    steps: int = 250
    rate: float = 0.5
    alpha_reg: float = 1.0
    alpha_lm: float = 0.02
    n_init: int = 4
    n_c: int = 50
    n_d: int = 20


LAMP = Rule()
DLG = Rule("l2", rate=0.1, alpha_reg=0.0, n_d=0)
"""At the better of two rates (0.1 and 0.5): without L_reg, x grows at the other."""


@dataclass(frozen=True)
class Guess:
    """Tokens [T], and L_rec of the embeddings that they are the nearest to."""

    tokens: list[int]
    loss: float


def reconstruct(
    model: nn.Module,
    gradients: Sequence[Tensors],
    length: int,
    rule: Rule = LAMP,
    *,
    language_model: nn.Module | None = None,
    seed: int = 0,
) -> list[Guess]:
    """For each update, the sequence whose gradient is found nearest to it.

    Args:
        model: as it was broadcast, with its adapter; it reads `inputs_embeds`.
        gradients: each of the mean next-token loss of one sequence, by parameter name. By cosine any positive multiple
            will do: of one step of SGD, the change with its sign turned.
        length: tokens of every sequence, at least 2.
        language_model: the auxiliary one, of the same vocabulary; default: the model.
        seed: draws first embeddings and reorderings; those of an update depend on which others are attacked with it.

    Raises:
        ModelError: fewer than 2 tokens, or updates that hold no linear layers that the model trains, that are unlike
            one another, misshapen or not finite.
    """
    if length < 2:
        raise ModelError(f"a sequence of {length} tokens has nothing to predict", fix="guess 2 tokens or more")
    if not gradients:
        return []
    layers = _matched(model, gradients)
    seen = {name: torch.stack([g[name].detach() for g in gradients]) for name in layers}
    table = causal_model(model).get_input_embeddings().weight.detach()
    draw, scale, norm = torch_generator(seed, "gradient matching"), float(table.std()), table.norm(dim=1).mean()
    training = model.training
    model.eval()
    try:
        shape = (len(gradients), length, table.shape[1])
        starts = torch.stack([scale * torch.randn(shape, generator=draw) for _ in range(max(rule.n_init, 1))])
        first = torch.stack([reconstruction_loss(model, layers, seen, start, rule.distance) for start in starts])
        x = starts[first.argmin(0), torch.arange(len(gradients))].requires_grad_(True)
        optimiser = torch.optim.Adam([x], lr=rule.rate * scale)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, rule.steps)
        for step in range(1, rule.steps + 1):
            total = reconstruction_loss(model, layers, seen, x, rule.distance, differentiable=True)
            total = total + rule.alpha_reg * (x.norm(dim=-1).mean(-1) - norm) ** 2
            (x.grad,) = torch.autograd.grad(total.sum(), [x])
            optimiser.step()
            schedule.step()
            if rule.n_d and step % rule.n_c == 0:
                changed = reordered(model, layers, seen, x.detach(), rule, language_model or model, draw)
                with torch.no_grad():
                    x.copy_(changed)
        losses = reconstruction_loss(model, layers, seen, x, rule.distance)
    finally:
        model.train(training)
    tokens = nearest(x.detach(), table)
    return [Guess(ids, loss) for ids, loss in zip(tokens.tolist(), losses.tolist(), strict=True)]


def reconstruction_loss(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    seen: Mapping[str, Tensor],
    x: Tensor,
    distance: Literal["cos", "l2"],
    *,
    differentiable: bool = False,
) -> Tensor:
    """L_rec [B] of embeddings x [B, T, d].

    Args:
        layers: whose weights' gradients are compared, by name.
        seen: those gradients [B, out, in], by the same names.
        differentiable: by x; otherwise the result is detached.
    """
    table = causal_model(model).get_input_embeddings().weight.detach()
    if not differentiable:
        x = x.detach().requires_grad_(True)  # outputs have gradients only where something before them does
    with sdpa_kernel(SDPBackend.MATH), _watched(layers) as (inputs, outputs):  # fused kernels: no second derivative
        logits = model(inputs_embeds=x, use_cache=False).logits[:, :-1]
        targets = (cosines(x[:, 1:], table) / TEMPERATURE).softmax(-1)
        loss = -(targets * log_softmax(logits, -1)).sum(-1).mean(-1)
        z_of = torch.autograd.grad(loss.sum(), [outputs[name] for name in layers], create_graph=differentiable)
    each = []
    for name, z in zip(layers, z_of, strict=True):
        h, g = inputs[name], seen[name]
        across = ((z @ g) * h).sum((1, 2))  # <sum_t z_t h_t^T, g>
        own = ((z @ z.mT) * (h @ h.mT)).sum((1, 2))  # |sum_t z_t h_t^T|^2
        there = g.square().sum((1, 2))
        if distance == "cos":
            each.append(1 - across * (own * there).clamp_min(1e-30).rsqrt())
        else:
            each.append(own - 2 * across + there)
    together = torch.stack(each)
    result = together.mean(0) if distance == "cos" else together.sum(0)
    return result if differentiable else result.detach()


def moved(length: int, draw: torch.Generator) -> list[int]:
    """0 ... length - 1 with two swapped, one moved, a piece moved, or a beginning moved to the end."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    order, kind = list(range(length)), pick(0, 4)
    if kind == 0:
        i, j = pick(0, length), pick(0, length)
        order[i], order[j] = order[j], order[i]
        return order
    start = 0 if kind == 3 else pick(0, length)
    end = start + 1 if kind == 1 else pick(start + 1, length + 1)
    piece, rest = order[start:end], order[:start] + order[end:]
    place = len(rest) if kind == 3 else pick(0, len(rest) + 1)
    return rest[:place] + piece + rest[place:]


def reordered(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    seen: Mapping[str, Tensor],
    x: Tensor,
    rule: Rule,
    language_model: nn.Module,
    draw: torch.Generator,
) -> Tensor:
    """The discrete phase: the best of x [B, T, d] and n_d reorderings of it, for each update by itself."""
    table = causal_model(model).get_input_embeddings().weight.detach()

    def value(y: Tensor) -> Tensor:
        prior = log_perplexity(language_model, nearest(y, table))
        return reconstruction_loss(model, layers, seen, y, rule.distance) + rule.alpha_lm * prior

    best, least = x, value(x)
    for _ in range(rule.n_d):
        y = torch.stack([one[moved(len(one), draw)] for one in x])
        now = value(y)
        best = torch.where((now < least)[:, None, None], y, best)
        least = torch.minimum(now, least)
    return best


def cosines(x: Tensor, table: Tensor) -> Tensor:
    """Cosine [..., V] of vectors [..., d] with each of the vocabulary's embeddings [V, d]."""
    return normalize(x, dim=-1) @ normalize(table, dim=-1).T


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The token [...] that each vector [..., d] is the nearest to by cosine."""
    return cosines(x, table).argmax(-1)


@torch.no_grad()
def log_perplexity(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log likelihood [B] (nats per token) of tokens [B, T], the first ones given."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(-1)


@contextmanager
def _watched(layers: Mapping[str, nn.Linear]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The inputs and outputs of these layers, by name, as the model runs."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keeps(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0], output

        return keep

    handles = [layer.register_forward_hook(keeps(name)) for name, layer in layers.items()]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def _matched(model: nn.Module, gradients: Sequence[Tensors]) -> dict[str, nn.Linear]:
    """The linear layers whose gradients are in the updates, by their weight's name, but for the output head. One that
    is 0 throughout, as of LoRA's A where B is 0, says nothing and is left out.

    Raises:
        ModelError: see `reconstruct`.
    """
    head = causal_model(model).get_output_embeddings()
    linear = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    known = trainable(model)
    if any(set(g) != set(gradients[0]) for g in gradients):
        raise ModelError("the updates hold different parameters", fix="attack those of one model together")
    if unknown := sorted(set(gradients[0]) - set(known)):
        raise ModelError(f"the update holds '{unknown[0]}', which the model does not train")
    found: dict[str, nn.Linear] = {}
    for name, parameter in known.items():
        if name not in gradients[0] or id(parameter) not in linear:
            continue
        values = [g[name] for g in gradients]
        if any(v.shape != parameter.shape or not bool(v.isfinite().all()) for v in values):
            raise ModelError(f"the update's '{name}' is misshapen or not finite")
        if any(bool(v.any()) for v in values):
            found[name] = linear[id(parameter)]
    if not found:
        raise ModelError("the update holds no gradients of linear layers", fix="gradient matching needs some")
    return found
