"""DiLoCo, Streaming DiLoCo, eager DiLoCo and delayed Nesterov on a toy network, against loops written from the papers
without rounds or messages, against torch.optim, and for what their papers claim.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch.nn import Parameter

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Algorithm, Place, Step
from fedlm.algorithms.streaming_diloco import fragment_in, fragments_of
from fedlm.errors import RecipeError, TrainingError
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec

from .outer_toy import LAYERS, OuterToy, adamw, first, loss

M, STEPS = 3, 4


def spec(name: str, **options: object) -> AlgorithmSpec:
    return AlgorithmSpec(name=name, **options)  # type: ignore[arg-type]


def close(ours: Tensors, theirs: Tensors, atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=0, atol=atol)


def sgd(parameters: list[Parameter], eta: float = 0.7, beta: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=eta, momentum=beta, nesterov=True)


# -------------------------------------------------------------------------------- DiLoCo


def test_diloco_is_local_adamw_and_torchs_nesterov_outside() -> None:
    """Six rounds, three silos, fp32: the paper's algorithm 1 with torch.optim at both ends; within 1e-6."""
    ours = OuterToy(spec("diloco")).run(6)
    theta = {name: Parameter(value) for name, value in first().items()}
    outer = sgd(list(theta.values()))
    silos = [{name: Parameter(p.detach().clone()) for name, p in theta.items()} for _ in range(M)]
    inner = [adamw(list(w.values())) for w in silos]
    for t in range(6):
        for i in range(M):
            with torch.no_grad():
                for name, p in theta.items():
                    silos[i][name].copy_(p)
            for h in range(STEPS):
                inner[i].zero_grad()
                loss(silos[i], i, t * STEPS + h).backward()
                inner[i].step()
        for name, p in theta.items():
            p.grad = torch.stack([p.detach() - silos[i][name].detach() for i in range(M)]).mean(0)
        outer.step()
        close(ours.models[t], theta)  # type: ignore[arg-type]


def test_one_silo_one_step_without_momentum_is_plain_adamw() -> None:
    """H = 1, outer rate 1, momentum 0, the inner state kept: 20 steps of AdamW, within 1e-6 in fp32."""
    ours = OuterToy(spec("diloco", server_lr=1.0, server_momentum=0.0), silos=1, steps=1).run(20)
    w = {name: Parameter(value) for name, value in first().items()}
    optimizer = adamw(list(w.values()))
    for step in range(20):
        optimizer.zero_grad()
        loss(w, 0, step).backward()
        optimizer.step()
        close(ours.models[step], w)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- Streaming DiLoCo


def streaming_reference(
    rounds: int, count: int, overlap: int, mixing: float, pattern: str = "strided"
) -> tuple[Tensors, list[Tensors]]:
    """The paper's algorithm 2, one inner step t after another: the outer parameters and the silos' own at the end.

    Fragment p is due when t = (p + 1) H / P, (p + 1) H / P + H ..., with H / P steps in a round.
    """
    fragments = fragments_of(first(), spec("streaming-diloco", fragments=count, pattern=pattern))
    outer = {name: Parameter(value) for name, value in first().items()}
    optimizers = [sgd([p for name, p in outer.items() if fragments[name] == f]) for f in range(count)]
    own = [{name: Parameter(value.clone()) for name, value in first().items()} for _ in range(M)]
    inner = [adamw(list(w.values())) for w in own]
    every = STEPS * count
    for t in range(1, rounds * STEPS + 1):
        for i in range(M):
            inner[i].zero_grad()
            loss(own[i], i, t - 1).backward()
            inner[i].step()
        with torch.no_grad():
            for f in range(count):
                names = [name for name, fragment in fragments.items() if fragment == f]
                if (t - (f + 1) * STEPS) % every == 0 and t >= (f + 1) * STEPS:
                    for name in names:
                        outer[name].grad = torch.stack([outer[name] - own[i][name] for i in range(M)]).mean(0)
                    optimizers[f].step()
                received = t - overlap
                if (received - (f + 1) * STEPS) % every == 0 and received >= (f + 1) * STEPS:
                    for i in range(M):
                        for name in names:
                            own[i][name].copy_(mixing * own[i][name] + (1 - mixing) * outer[name])
    return {n: p.detach() for n, p in outer.items()}, [{n: p.detach() for n, p in w.items()} for w in own]


@pytest.mark.parametrize(
    "count, overlap, mixing, pattern",
    [(1, 0, 0.0, "strided"), (2, 0, 0.0, "strided"), (2, 1, 0.5, "strided"), (4, 3, 0.25, "sequential")],
)
def test_streaming_is_the_papers_loop_over_inner_steps(count: int, overlap: int, mixing: float, pattern: str) -> None:
    """Nine rounds of four steps, which end within a cycle: outer parameters and the silos' own, within 2e-6."""
    options = {"fragments": count, "overlap": overlap, "mixing": mixing, "pattern": pattern}
    ours = OuterToy(spec("streaming-diloco", **options)).run(9)
    outer, own = streaming_reference(9, count, overlap, mixing, pattern)
    close(ours.theta, outer, atol=2e-6)
    place = Place("silo-0", 9, 2**20)
    for i in range(M):
        rule = ours.algorithm.local(ours.algorithm.broadcast(ours.theta, ours.server, 9), ours.states[i], place)
        if overlap == 0:
            close(rule.start(), own[i], atol=2e-6)
        else:
            close({n: t for n, t in ours.states[i].items() if n in own[i]}, own[i], atol=2e-6)


def test_one_fragment_without_overlap_is_diloco_bit_for_bit() -> None:
    one = OuterToy(spec("streaming-diloco", fragments=1)).run(6)
    other = OuterToy(spec("diloco")).run(6)
    for ours, theirs in zip(one.models, other.models, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_fragment_travels_once_a_cycle_and_all_together_are_the_model() -> None:
    toy = OuterToy(spec("streaming-diloco", fragments=LAYERS)).run(LAYERS)
    assert set.union(*toy.sent) == set(first())
    assert sum(len(names) for names in toy.sent) == len(first())
    assert "model.embed_tokens.weight" in toy.sent[0] and "lm_head.weight" in toy.sent[-1]


def test_a_silo_that_missed_rounds_mixes_in_all_that_it_missed() -> None:
    """Its update of round 1 is lost: in round 2 it goes on from its state of round 0, with fragments 0 and 1 due."""
    toy = OuterToy(spec("streaming-diloco", fragments=3)).run(2, absent={1: 2})
    place = Place("silo-2", 2, 2**20)
    start = toy.algorithm.local(toy.theta, toy.states[2], place).start()
    due = fragment_in(0, toy.theta, toy.spec) | fragment_in(1, toy.theta, toy.spec)
    for name, value in start.items():
        assert torch.equal(value, toy.theta[name] if name in due else toy.states[2][name]), name


@settings(max_examples=8, deadline=None)
@given(
    fragments=st.integers(1, LAYERS),
    overlap=st.integers(0, STEPS - 1),
    mixing=st.sampled_from([0.0, 0.5, 0.9]),
    stopped=st.integers(1, 4),
    lost=st.none() | st.tuples(st.integers(0, 4), st.integers(0, M - 1)),
)
def test_what_a_silo_keeps_is_all_that_it_needs(
    fragments: int, overlap: int, mixing: float, stopped: int, lost: tuple[int, int] | None
) -> None:
    """Stopped anywhere and gone on with by new objects, from bytes alone: the same bits, whatever answer was lost."""
    chosen = spec("streaming-diloco", fragments=fragments, overlap=overlap, mixing=mixing)
    absent = dict([lost]) if lost else {}
    whole = OuterToy(chosen).run(5, absent)
    before, after = OuterToy(chosen).run(stopped, absent), OuterToy(chosen)
    after.theta, after.server = load(save(before.theta)), load(save(before.server))
    after.states = [load(save(state)) for state in before.states]
    after.moments, after.models = before.moments, before.models
    after.run(5 - stopped, absent)
    assert all(torch.equal(after.theta[name], value) for name, value in whole.theta.items())
    for state, expected in zip(after.states, whole.states, strict=True):
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@given(layers=st.integers(1, 40), count=st.integers(1, 40), pattern=st.sampled_from(["strided", "sequential"]))
def test_fragments_part_any_model_evenly_or_are_refused(layers: int, count: int, pattern: str) -> None:
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.w.weight" for i in range(layers)), "model.norm.weight"]
    chosen = spec("streaming-diloco", fragments=count, pattern=pattern)
    if count > layers:
        with pytest.raises(RecipeError, match=f"{count} fragments cannot be made of {layers} layers"):
            fragments_of(names, chosen)
        return
    found = fragments_of(names, chosen)
    sizes = [sum(found[n] == f for n in names if "layers" in n) for f in range(count)]
    assert sum(sizes) == layers and max(sizes) - min(sizes) <= 1
    assert found.keys() == set(names)
    where = [found[f"model.layers.{i}.w.weight"] for i in range(layers)]
    assert where == (sorted(where) if pattern == "sequential" else [i % count for i in range(layers)])
    assert (found["model.embed_tokens.weight"], found["model.norm.weight"]) == (0, count - 1)


# -------------------------------------------------------------------------------- eager DiLoCo


def eager_reference(rounds: int, *, eager: bool = True, rate: float = 0.7) -> list[Tensors]:
    """Every silo's own model after so many rounds. Without `eager` it takes the mean of the round before as it is."""
    own = [{name: Parameter(value.clone()) for name, value in first().items()} for _ in range(M)]
    inner, outer = [adamw(list(w.values())) for w in own], [sgd(list(w.values()), rate) for w in own]
    zero = {name: torch.zeros_like(value) for name, value in first().items()}
    mean, last = zero, [zero] * M
    for t in range(rounds):
        deltas = []
        for i in range(M):
            start = {name: p.detach().clone() for name, p in own[i].items()}
            for h in range(STEPS):
                inner[i].zero_grad()
                loss(own[i], i, t * STEPS + h).backward()
                inner[i].step()
            delta = {name: start[name] - p.detach() for name, p in own[i].items()}
            with torch.no_grad():
                for name, p in own[i].items():
                    p.copy_(start[name])
                    fresh = delta[name] / M - last[i][name] / M if eager else 0.0
                    p.grad = fresh + mean[name]
            outer[i].step()
            deltas.append(delta)
        last, mean = deltas, {name: torch.stack([d[name] for d in deltas]).mean(0) for name in zero}
    return [{name: p.detach() for name, p in w.items()} for w in own]


def test_eager_is_the_papers_rule_in_every_silo_and_the_global_model_is_their_mean() -> None:
    """Eight rounds: each silo's model against the rule with torch.optim, and the mean; within 2e-6."""
    ours, theirs = OuterToy(spec("eager-diloco")).run(8), eager_reference(8)
    for i in range(M):
        close({n: t for n, t in ours.states[i].items() if n in theirs[i]}, theirs[i], atol=2e-6)
    mean = {name: torch.stack([w[name] for w in theirs]).mean(0) for name in ours.theta}
    close(ours.theta, mean, atol=2e-6)
    assert any((ours.states[0][n] - ours.states[1][n]).abs().max() > 1e-3 for n in ours.theta), "silos do differ"


def test_an_eager_silo_alone_is_diloco_bit_for_bit() -> None:
    one = OuterToy(spec("eager-diloco"), silos=1).run(6)
    other = OuterToy(spec("diloco"), silos=1).run(6)
    for ours, theirs in zip(one.models, other.models, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def mean_loss(model: Tensors) -> float:
    w = {name: Parameter(value) for name, value in model.items()}
    return sum(float(loss(w, i, 10_000 + k).detach()) for i in range(M) for k in range(50)) / (50 * M)


def test_eager_updates_lose_less_than_late_ones() -> None:
    """The paper's claim: with all pseudo-gradients a round late training suffers, with one's own fresh less so."""

    def mean(silos: list[Tensors]) -> Tensors:
        return {name: torch.stack([w[name] for w in silos]).mean(0) for name in silos[0]}

    late = mean_loss(mean(eager_reference(12, eager=False)))
    eager, diloco = (mean_loss(OuterToy(spec(name)).run(12).theta) for name in ("eager-diloco", "diloco"))
    assert diloco < eager < late


def test_an_eager_silo_cannot_join_later() -> None:
    algorithm = get_algorithm(spec("eager-diloco"))
    state = algorithm.init_state(first())
    with pytest.raises(TrainingError, match="no model of its own in round 3"):
        algorithm.local(algorithm.broadcast(first(), state, 3), {}, Place("late", 3, 9))


# -------------------------------------------------------------------------------- delayed Nesterov


def answers(algorithm: Algorithm, updates: list[torch.Tensor]) -> list[torch.Tensor]:
    """The model after each answer, one server step for each."""
    theta: Tensors = {"w": torch.linspace(-1, 1, 5)}
    state = algorithm.init_state(theta)
    models = []
    for t, u in enumerate(updates):
        accumulator = algorithm.accumulator(Path())
        algorithm.fold(accumulator, {"w": u}, 1.0, Place(staleness=t % 3))
        theta, state = algorithm.server_step(theta, accumulator, state, Step(t, 4))
        models.append(theta["w"])
    return models


def draws(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(5, generator=generator) for _ in range(count)]


def test_with_one_answer_at_a_time_it_is_torchs_nesterov() -> None:
    w = Parameter(torch.linspace(-1, 1, 5))
    optimizer = sgd([w])
    for ours, u in zip(answers(get_algorithm(spec("delayed-nesterov", buffer=1)), draws(12)), draws(12), strict=True):
        w.grad = -u
        optimizer.step()
        torch.testing.assert_close(ours, w.detach(), rtol=0, atol=1e-5)


def test_n_answers_move_as_far_as_one_nesterov_step_on_their_mean() -> None:
    """The paper's reason for dividing by N: 12 answers, N = 4, against torch.optim on three means; within 1e-6."""
    ours = answers(get_algorithm(spec("delayed-nesterov", buffer=4)), draws(12))
    w = Parameter(torch.linspace(-1, 1, 5))
    optimizer = sgd([w])
    for k in range(3):
        w.grad = -torch.stack(draws(12)[4 * k : 4 * k + 4]).mean(0)
        optimizer.step()
        torch.testing.assert_close(ours[4 * k + 3], w.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("c", [0.1, 0.25])
def test_momentum_in_every_step_is_the_papers_formula(c: float) -> None:
    eta, beta, n = 0.5, 0.8, 4
    chosen = spec("delayed-nesterov", buffer=n, momentum_share=c, server_lr=eta, server_momentum=beta)
    theta, m, total = torch.linspace(-1, 1, 5).double(), torch.zeros(5).double(), torch.zeros(5).double()
    for t, (ours, u) in enumerate(zip(answers(get_algorithm(chosen), draws(11)), draws(11), strict=True)):
        g = -u.double()
        total = total + g
        if (t + 1) % n == 0:
            m = beta * m + total / n
            theta = theta - eta * ((1 - c * n + c) * beta * m + g / n)
            total = torch.zeros(5).double()
        else:
            theta = theta - eta * (c * beta * m + g / n)
        torch.testing.assert_close(ours.double(), theta, rtol=0, atol=2e-6)


def test_late_answers_hurt_delayed_momentum_less() -> None:
    """The paper's finding on a quadratic, eight silos at work and so every answer seven steps late: momentum refreshed
    by each late answer drives theta away, at the same rate and at an eighth of it; refreshed by eight it does not."""

    def away(buffer: int, rate: float) -> float:
        algorithm = get_algorithm(spec("delayed-nesterov", buffer=buffer, server_lr=rate))
        theta: Tensors = {"w": torch.full((5,), 1.0)}
        state, past = algorithm.init_state(theta), [theta["w"]] * 8
        for t in range(400):
            accumulator = algorithm.accumulator(Path())
            accumulator.add({"w": -0.4 * past[0]}, 1.0)
            theta, state = algorithm.server_step(theta, accumulator, state, Step(t, 8))
            past = [*past[1:], theta["w"]]
        return float(theta["w"].abs().max())

    assert away(8, 0.7) < 0.2
    assert away(1, 0.7) > 1e3 and away(1, 0.7 / 8) > 1e3
