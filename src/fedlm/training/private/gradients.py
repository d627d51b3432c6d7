"""The sum of clipped per-example gradients: what DP-SGD adds noise to (Abadi et al., CCS 2016, algorithm 1).

An example's gradient g_i is that of its own loss, over all trained parameters together; it enters the sum as
min(1, C / |g_i|) g_i. However a batch is cut into passes, the sum is the same up to the order of float additions.

Where users are protected, g_i is the mean of the gradients of a user's examples (Charles et al., 2024, user-level
sampling): the gradient of the mean of their losses. A user then goes through a pass as one example with more sequences.

Ways to get there, which differ in cost alone:

- 'micro': one example at a time by plain autograd. It is the truth that the others are compared with.
- 'hooks': every example's gradient is kept, as Opacus' GradSampleModule does.
- 'fast': of large layers an example's gradient is formed for its norm and dropped again (Lee and Kifer, PoPETs 2021).
- 'ghost': of large layers the norm comes from products of tokens with tokens, |sum_t g_t x_t'|^2 = sum_st (x_s x_t)
  (g_s g_t), and no example's gradient is ever formed (Goodfellow, 2015; Li et al., ICLR 2022).
- None, the default: layer by layer whichever of these is least, see `choice`.

A step needs one forward and one backward pass in each but 'micro'; the sum over 'fast' and 'ghost' layers is made of
what these left (`fedlm.training.private.taps`).

An example whose gradient is not finite adds nothing. That is a contribution of norm 0 <= C, whatever the other examples
are, so the bound on the sum holds; to stop instead would tell that such an example was there. They are counted, and the
count is as private as everything else about the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from fedlm.messages import Tensors
from fedlm.training.objective import Objective
from fedlm.training.private.layers import applied, norm_rules
from fedlm.training.private.losses import example_losses, require_separable
from fedlm.training.private.taps import Call, Tape, taped, through_encoder
from fedlm.training.sequences import Example

Way = Literal["hooks", "fast", "ghost", "micro"]

MICRO_TOKENS = 512
"""Tokens of a forward pass, padding counted: what large layers read and received stays in memory until its end.
Twice as many are not faster on a CPU and take 1.5 times the memory of a whole step."""

KEPT = 1 << 26
"""Numbers of per-example gradients that exist at once, 256 MB."""

SMALL = 1 << 14
"""A weight of so few numbers is reduced to per-example gradients at once, whatever the length."""

FORMED = 1 << 24
"""Numbers of per-example gradients that 'fast' forms at a time, 64 MB."""

ROUNDING = 4e-7
"""'ghost' subtracts products that may be much larger than the norm. Its square gets this share of (sum_t |x_t| |g_t|)^2
on top, more than fp32 rounding takes away, so that a norm is never found too small."""


@dataclass
class Clipped:
    """The clipped sum over some units, each an example or a user; everything in it is private."""

    total: Tensors
    """By parameter, fp32."""
    norms: Tensor
    """fp64 [units]: norms before clipping, in the order of the units; not finite where the gradient was not."""
    losses: Tensor
    """fp32 [units]: of a user the mean over its examples."""

    @property
    def not_finite(self) -> int:
        """Units that added nothing because their gradient was not finite."""
        return int((~self.norms.isfinite()).sum())


def clipped_sum(
    objective: Objective,
    parameters: dict[str, Parameter],
    units: Sequence[Example | Sequence[Example]],
    clip: float,
    *,
    way: Way | None = None,
    micro_tokens: int = MICRO_TOKENS,
) -> Clipped:
    """The sum of clipped gradients of these units, possibly of none. `.grad` is left as it was.

    The model is as the caller has set it (training mode, dropout's generators); the objective must not pack.

    Args:
        units: what is clipped as a whole: an example, or the examples of a user, at least one.
        clip: C; infinite for no clipping.
        micro_tokens: of a pass; a unit is never cut.

    Raises:
        TrainingError: the objective couples examples, or a trained layer has no rule.
        MissingExtra: Opacus is not installed.
    """
    groups = [[unit] if isinstance(unit, Example) else list(unit) for unit in units]
    require_separable(objective, [example for group in groups for example in group])
    device = next(iter(parameters.values())).device
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    norms, losses = torch.zeros(len(groups), dtype=torch.float64), torch.zeros(len(groups))
    if way == "micro":
        for i, group in enumerate(groups):
            gradients, losses[i] = _mean(objective, parameters, group)
            norms[i] = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
            factor = factors(norms[i : i + 1], clip).item()
            for name, g in gradients.items():
                total[name].add_(g.nan_to_num(0.0, 0.0, 0.0) if factor == 0.0 else g, alpha=factor)
        return Clipped(total, norms, losses)
    with taped(objective.tools.model, parameters, choice(way)) as tape:
        for run in passes(groups, parameters, way, micro_tokens):
            found = _pass(objective, parameters, tape, [groups[i] for i in run])
            squared = _squared(tape, way)
            norms[run] = squared.sqrt().cpu()
            losses[run] = found.cpu()
            _add(total, tape, factors(squared.sqrt(), clip).to(device, torch.float32))
    return Clipped(total, norms, losses)


def factors(norms: Tensor, clip: float) -> Tensor:
    """min(1, C / |g_i|), and 0 where the norm is not finite."""
    return torch.where(norms.isfinite(), (clip / norms).clamp(max=1.0), 0.0)


def choice(way: Way | None) -> Any:
    """Whether a large layer's call is kept as it is: told the call and whether the weight is tied.

    With T tokens of an example, a call is T (d_in + d_out) numbers and the gradient d_in d_out: the smaller is kept.
    LoRA's factors of rank r < T are therefore reduced, whole weights are kept.
    """

    def books(call: Call, tied: bool) -> bool:
        if way is not None:
            return way != "hooks"
        return tied or not _reduced(call.layer.weight, call.dy.shape[1])

    return books


def _reduced(weight: Tensor, tokens: int) -> bool:
    """Whether a weight's per-example gradients are kept, by default, with so many tokens of an example."""
    return weight.numel() <= max(SMALL, tokens * sum(weight.shape))


def ghostly(calls: Sequence[Call], way: Way | None) -> bool:
    """Whether the norm of a weight's gradient is found without forming it.

    Over T tokens that takes 2 T^2 (d_in + d_out) multiplications, forming it 2 T d_in d_out. What is written and read
    again decides as well: 2 T^2 numbers against d_in d_out (mixed ghost clipping: Bu, Mao and Xu, NeurIPS 2022).

    The gradient of a weight of several calls is a sum, and its norm not that of the parts. Of embeddings that give the
    logits too, the product of the two parts is as cheap as they are (`_ghost`); all else is formed.
    """
    if way == "fast" or (len(calls) > 1 and sorted(type(c.layer).__name__ for c in calls) != ["Embedding", "Linear"]):
        return False
    longest = max(call.dy.shape[1] for call in calls)
    return way == "ghost" or 2 * longest**2 < calls[0].layer.weight.numel()


def passes(
    groups: Sequence[Sequence[Example]], parameters: dict[str, Parameter], way: Way | None, micro_tokens: int
) -> Iterator[list[int]]:
    """Numbers of the units of each pass: of as many examples each, of similar length, of at most `micro_tokens` with
    their padding, and so few that what is kept of them has its bounds."""
    longest = [max(len(s) for e in g for s in e.sequences) * sum(len(e.sequences) for e in g) for g in groups]
    order = sorted(range(len(groups)), key=lambda i: (len(groups[i]), -longest[i]))
    done = 0
    while done < len(order):
        tokens = longest[order[done]]
        numbers = sum(p.numel() for p in parameters.values() if way == "hooks" or _reduced(p, tokens))
        size = max(1, min(KEPT // max(1, numbers), micro_tokens // tokens))
        run = [i for i in order[done : done + size] if len(groups[i]) == len(groups[order[done]])]
        yield run
        done += len(run)


def alone(objective: Objective, parameters: dict[str, Parameter], example: Example) -> tuple[Tensors, Tensor]:
    """The gradient of one example by plain autograd, and its loss."""
    before = [p.grad for p in parameters.values()]
    for p in parameters.values():
        p.grad = None
    loss = example_losses(objective, [example])[0]
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for (name, p), old in zip(parameters.items(), before, strict=True):
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad.float()
        p.grad = old
    return found, loss.detach()


def _mean(objective: Objective, parameters: dict[str, Parameter], group: Sequence[Example]) -> tuple[Tensors, Tensor]:
    """The mean of the gradients of a unit's examples, one after another, and of their losses."""
    found, loss = alone(objective, parameters, group[0])
    for example in group[1:]:
        gradients, more = alone(objective, parameters, example)
        found, loss = {name: g + gradients[name] for name, g in found.items()}, loss + more
    return {name: g / len(group) for name, g in found.items()}, loss / len(group)


def taken_down(
    objective: Objective, parameters: dict[str, Parameter], examples: Sequence[Example], way: Way | None
) -> tuple[Tape, Tensor]:
    """What one pass over these examples left, and the norms [n] that the way gives, for comparison."""
    with taped(objective.tools.model, parameters, choice(way)) as tape:
        _pass(objective, parameters, tape, [[example] for example in examples])
        return tape, _squared(tape, way).sqrt()


def own(tape: Tape, name: str, i: int) -> Tensor | None:
    """A parameter's gradient of example i alone; None where nothing was taken down of it."""
    if name in tape.kept:
        return tape.kept[name][i]
    return _formed(tape, tape.booked[name], slice(i, i + 1))[0] if name in tape.booked else None


def _pass(
    objective: Objective, parameters: dict[str, Parameter], tape: Tape, groups: Sequence[Sequence[Example]]
) -> Tensor:
    """One forward and backward pass over these units, of as many examples each: the tape has it then. The mean losses
    of their examples [n]."""
    examples = [example for group in groups for example in group]
    tape.begin(len(groups), sum(len(e.sequences) for e in examples))
    losses = example_losses(objective, examples)
    if len(examples) > len(groups):
        losses = losses.view(len(groups), -1).mean(1)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    if tape.prompt is not None:
        model: Any = objective.tools.model
        tape.kept.update(through_encoder(model, parameters, tape.prompt))
    return losses.detach()


def _squared(tape: Tape, way: Way | None) -> Tensor:
    """Squared norms [n] over all parameters, fp64."""
    parts = [torch.linalg.vector_norm(g.flatten(1), dim=1).double().square() for g in tape.kept.values()]
    parts += [_ghost(calls) if ghostly(calls, way) else _fast(tape, calls) for calls in tape.booked.values()]
    return torch.stack(parts).sum(0)


def _ghost(calls: Sequence[Call]) -> Tensor:
    """Squared norms [n] of a weight's gradients. With G = sum_m p_m h_m' of the logits and E = sum_t e_(x_t) b_t' of
    the words x_t, |G + E|^2 = |G|^2 + |E|^2 + 2 sum_mt p_m[x_t] (h_m b_t)."""
    total: Any = 0.0
    received: Any = 0.0
    for call in calls:
        (norms,) = applied(norm_rules()[type(call.layer)], call.layer, call.x, call.dy, call.layer.weight)
        sizes = torch.linalg.vector_norm(call.dy, dim=2)
        if type(call.layer) is nn.Linear:
            sizes = sizes * torch.linalg.vector_norm(call.x, dim=2)
        total, received = total + norms.double().square(), received + sizes.sum(1).double()
    if len(calls) > 1:
        words, logits = sorted(calls, key=lambda call: type(call.layer).__name__)
        picked = logits.dy.gather(2, words.x[:, None, :].expand(-1, logits.dy.shape[1], -1))
        total = total + 2 * torch.einsum("nmt,nmt->n", picked, logits.x @ words.dy.transpose(1, 2)).double()
    squared: Tensor = total.clamp(min=0.0) + ROUNDING * received.square()
    return squared


def _fast(tape: Tape, calls: Sequence[Call]) -> Tensor:
    weight, found = calls[0].layer.weight, []
    size = max(1, FORMED // weight.numel())
    for start in range(0, tape.n, size):
        formed = _formed(tape, calls, slice(start, start + size)).flatten(1)
        found.append(torch.linalg.vector_norm(formed, dim=1).double().square())
    return torch.cat(found)


def _formed(tape: Tape, calls: Sequence[Call], part: slice) -> Tensor:
    """Per-example gradients of a weight for some of the examples [part, *shape]."""
    total: Tensor | None = None
    for call in calls:
        rule = tape.rules[type(call.layer)]
        (found,) = applied(rule, call.layer, call.x[part], call.dy[part], call.layer.weight)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def _add(total: Tensors, tape: Tape, factors: Tensor) -> None:
    """total += sum_i c_i g_i."""
    lost = factors == 0.0  # 0 times what is not finite is not 0
    for name, gradients in tape.kept.items():
        gradients[lost] = 0.0
        total[name] += torch.einsum("n,n...->...", factors, gradients)
    for name, calls in tape.booked.items():
        for call in calls:
            dy = (call.dy * factors[:, None, None]).masked_fill_(lost[:, None, None], 0.0).flatten(0, 1)
            if type(call.layer) is nn.Embedding:
                total[name].index_add_(0, call.x.flatten(), dy)
            else:
                total[name].addmm_(dy.t(), call.x.masked_fill(lost[:, None, None], 0.0).flatten(0, 1))


@contextmanager
def without_dropout(model: Module) -> Iterator[None]:
    """Inside, nothing is dropped, and all else of training mode stays."""
    changed: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.training:
            changed.append((module, "training", True))
            module.training = False
        rate = getattr(module, "attention_dropout", None)
        if isinstance(rate, float) and rate:
            changed.append((module, "attention_dropout", rate))
            module.attention_dropout = 0.0  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
