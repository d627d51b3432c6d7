"""What bad silos can do: up to a rule's breakdown point no attack moves its step further than the bound, beyond it one
does. Bits depend on no order; what the server keeps survives being stored; huge values overflow nowhere."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.errors import MissingExtra, RunError
from fedlm.federation.folding import Verdict, fold_in_order
from fedlm.messages import Failure, FailureKind, Reply, Tensors
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AlgorithmSpec

from .bad_silos import ADAPTER, ATTACKS, F64, changes, flat, honest, huge, inner_product, moved, step, theta, together

ROBUST = [name for name, method in ALGORITHMS.items() if "robust_on" in method.options]
F = 2
FEWEST = {name: m.withstands[0] * F + m.withstands[1] for name, m in ALGORITHMS.items() if m.withstands}
"""Silos among which F bad ones are withstood."""
RADIUS = 0.6
OPTIONS: dict[str, dict[str, Any]] = {
    "fltrust": {"root": "silo-00"},
    "flame": {"noise": 0.0},
    "centred-clipping": {"clip_radius": RADIUS, "clip_iterations": 2},
    "norm-bound": {"norm_bound": RADIUS},
}
SPACES = [(n, on) for n in ROBUST for on in ("factors", "product") if on == "factors" or not ALGORITHMS[n].no_product]


def options_of(name: str) -> dict[str, Any]:
    bad = {"byzantine": F} if name in FEWEST else {}
    return {"name": name, **bad, **OPTIONS.get(name, {})}


def vectors(updates: Sequence[Tensors], robust_on: str) -> F64:
    return np.stack([flat(u) for u in updates]) if robust_on == "factors" else changes(updates)


def bound(name: str, x: F64) -> float:
    """How far a step may lie from the mean of the honest vectors x, with F bad silos beside them."""
    n = len(x) + F
    reach = np.linalg.norm(x - x.mean(0), axis=1).max()
    if name in ("krum", "multi-krum"):
        # Of those that count, each has an honest one among the n - f - 2 nearest, and a score no honest one's exceeds.
        return float(reach + 2 * reach * (n - F - 2) ** 0.5)
    if name == "rfa":  # Lopuhaä and Rousseeuw, 1991
        return float(2 * (n - F) / (n - 2 * F) * reach)
    if name in ("median", "trimmed-mean", "bulyan"):  # every coordinate lies between honest ones
        return float(np.linalg.norm(np.maximum(x.max(0) - x.mean(0), x.mean(0) - x.min(0))))
    assert name == "flame"  # no longer than the longest honest one
    return float(np.linalg.norm(x, axis=1).max() + np.linalg.norm(x.mean(0)))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name, robust_on", [s for s in SPACES if s[0] in FEWEST and s[0] != "centred-clipping"])
def test_up_to_its_breakdown_point_the_step_stays_within_the_bound(
    name: str, robust_on: str, attack: str, tmp_path: Path
) -> None:
    good = honest(FEWEST[name] - F)
    bad = ATTACKS[attack](good, F)
    x = vectors(good, robust_on)
    for sent in ([*good, *bad], [*bad, *good]):
        found = moved(sent, tmp_path, robust_on=robust_on, **options_of(name))
        assert np.linalg.norm(found - x.mean(0)) <= bound(name, x) * 1.0001
        if name in ("median", "trimmed-mean", "bulyan"):
            slack = 2e-6 * np.abs(x).max()
            assert np.all(found >= x.min(0) - slack) and np.all(found <= x.max(0) + slack)
    if attack in ("huge", "together"):  # which nobody would take for honest
        assert np.linalg.norm(vectors([*good, *bad], robust_on).mean(0) - x.mean(0)) > 5 * bound(name, x)


@pytest.mark.parametrize("name, robust_on", [s for s in SPACES if s[0] in FEWEST and s[0] != "centred-clipping"])
def test_beyond_its_breakdown_point_it_is_taken_over(name: str, robust_on: str, tmp_path: Path) -> None:
    good = honest(2)
    bad = together(good, FEWEST[name] - 2)  # most are bad, and say so together
    x = vectors(good, robust_on)
    found = moved([*good, *bad], tmp_path, robust_on=robust_on, **options_of(name))
    assert np.linalg.norm(found - x.mean(0)) > 5 * np.linalg.norm(x - x.mean(0), axis=1).max()


def test_one_more_bad_silo_than_said_is_enough(tmp_path: Path) -> None:
    """The tests above are at the limit: with f + 1 bad ones the trimmed mean is no longer bounded."""
    good = honest(FEWEST["trimmed-mean"] - F)
    x = vectors(good, "factors")
    for name in ("trimmed-mean", "median"):
        found = moved([*good[:-1], *together(good, F + 1)], tmp_path, **options_of(name))
        assert np.linalg.norm(found - x.mean(0)) > 5 * bound("median", x)


@pytest.mark.parametrize("attack", ATTACKS)
def test_centred_clipping_moves_by_less_than_two_radii_a_bad_silo(attack: str, tmp_path: Path) -> None:
    good = honest(3)
    mean = {n: torch.stack([u[n] for u in good]).mean(0) for n in good[0]}
    options = {"name": "centred-clipping", "byzantine": F, "clip_radius": RADIUS}
    clean = moved([*good, mean, mean], tmp_path, **options)
    attacked = moved([*good, *ATTACKS[attack](good, F)], tmp_path, **options)
    assert 1e-3 < np.linalg.norm(attacked - clean) <= 2 * F * RADIUS / 5 * 1.0001


@pytest.mark.parametrize("bad, taken", [(2, False), (3, True)])
def test_centred_clipping_follows_the_majority_over_rounds(bad: int, taken: bool, tmp_path: Path) -> None:
    """A centre moves to where most of the pull comes from, step by step."""
    good, state = honest(5 - bad), None
    x = vectors(good, "factors")
    far = ATTACKS["together"](good, bad)
    for round_ in range(40):
        after, state, _ = step(
            [*good, *far], tmp_path, name="centred-clipping", clip_radius=1.0, state=state, round_=round_
        )
    apart = float(np.linalg.norm(flat(after) - flat(theta()) - x.mean(0)))
    assert (apart > 5) is taken and (apart < 3) is not taken


@pytest.mark.parametrize("robust_on", ["factors", "product"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_norm_bound_holds_and_does_not_ask_who_is_bad(attack: str, robust_on: str, tmp_path: Path) -> None:
    good = honest(2)
    found = moved([*good, *ATTACKS[attack](good, 3)], tmp_path, robust_on=robust_on, **options_of("norm-bound"))
    assert np.linalg.norm(found) <= RADIUS * 1.0001
    against = moved([*good, *inner_product(good, 3)], tmp_path, robust_on=robust_on, **options_of("norm-bound"))
    assert against @ vectors(good, robust_on).mean(0) < 0


@pytest.mark.parametrize("robust_on", ["factors", "product"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_fltrust_withstands_any_number_while_the_root_is_good(attack: str, robust_on: str, tmp_path: Path) -> None:
    good = honest(2)
    x = vectors(good, robust_on)
    options = {"name": "fltrust", "robust_on": robust_on}
    sent = [*good, *ATTACKS[attack](good, 7)]
    found = moved(sent, tmp_path, root="silo-00", **options)
    assert np.linalg.norm(found) <= np.linalg.norm(x[0]) * 1.0001
    assert found @ x[0] > 0
    if attack == "inner product":
        assert moved(sent, tmp_path, root="silo-04", **options) @ x[0] < 0, "a bad root"
    if attack == "huge" and robust_on == "product":
        with pytest.raises(RunError, match="beyond fp32's range"):
            moved(sent, tmp_path, root="silo-04", **options)


def test_foolsgold_silences_many_of_one_hand_and_not_one_alone(tmp_path: Path) -> None:
    good = honest(4, spread=4.0)
    x = vectors(good, "factors")
    sybils = together(good, 3)
    _, _, figures = step([*good, *sybils], tmp_path, name="foolsgold")
    counted = list(figures["coefficients"].values())
    assert counted[4:] == [0.0] * 3 and min(counted[:4]) > 0.05
    found = moved([*good, sybils[0]], tmp_path, name="foolsgold")
    assert np.linalg.norm(found - x.mean(0)) > 5 * np.linalg.norm(x - x.mean(0), axis=1).max()


@pytest.mark.parametrize("name, robust_on", SPACES)
def test_the_largest_values_overflow_nowhere(name: str, robust_on: str, tmp_path: Path) -> None:
    good = honest(max(FEWEST.get(name, 5) - F, 3))
    after, state, figures = step([*good, *huge(good, F)], tmp_path, robust_on=robust_on, **options_of(name))
    assert all(bool(value.isfinite().all()) for value in [*after.values(), *state.values()])
    assert all(np.isfinite(c) for c in figures.get("coefficients", {}).values())
    if name != "foolsgold":
        apart = flat({n: after[n] - value for n, value in theta().items()})
        assert np.linalg.norm(apart) < 1e3


# order, storing, numbers


@pytest.mark.parametrize("robust_on", ["factors", "product"])
@pytest.mark.parametrize("name", ROBUST)
def test_bits_do_not_depend_on_the_order_of_arrival(name: str, robust_on: str, tmp_path: Path) -> None:
    robust_on = "factors" if ALGORITHMS[name].no_product else robust_on
    spec = AlgorithmSpec(robust_on=robust_on, **options_of(name) | {"byzantine": 1})
    groups = spec.model_copy(update={"groups": 7})
    grouped = robust_on == "factors" and "groups" in ALGORITHMS[name].options
    for one in [spec, groups] if grouped else [spec]:
        names = [f"silo-{i:02}" for i in range(9)]
        sent, ended = dict(zip(names, honest(9), strict=True)), []
        for attempt in range(3):
            random.Random(attempt).shuffle(order := list(names))
            algorithm = get_algorithm(one, ADAPTER)
            accumulator, start = algorithm.accumulator(tmp_path), theta()
            algorithm.asked(accumulator, names, Place("", 0, 9, 5))
            arrivals: list[Reply | Failure] = [Reply(s, "train", "run", 0, 0, sent[s]) for s in order if s != "silo-06"]
            arrivals.insert(attempt, Failure("silo-06", FailureKind.ERROR, "lost"))
            folded = fold_in_order(
                algorithm,
                accumulator,
                names,
                iter(arrivals),
                tmp_path,
                lambda reply: Verdict(1.0, Place(reply.silo, 0, 9, 5, ADAPTER.rank)),
                held_bytes=2000,
            )
            assert len(folded.replied) == accumulator.count == 8
            model, state = algorithm.server_step(start, accumulator, algorithm.init_state(start), Step(0, 9))
            ended.append(model | state)
        first = ended[0]
        assert any(not torch.equal(first[n], value) for n, value in theta().items())
        for other in ended[1:]:
            assert other.keys() == first.keys() and all(torch.equal(other[n], value) for n, value in first.items())


@pytest.mark.parametrize("name", ["centred-clipping", "foolsgold"])
def test_what_the_server_keeps_can_be_stored(name: str, tmp_path: Path) -> None:
    """After a checkpoint the next rounds have the same bits; without what it keeps they have not."""
    start: Tensors | None = None
    state: Tensors | None = None
    for round_ in range(2):
        start, state, _ = step(
            honest(5, 0.7, round_), tmp_path, start=start, state=state, round_=round_, **options_of(name)
        )
    assert state and start
    save_file(state, tmp_path / "server.safetensors")
    kept = load_file(tmp_path / "server.safetensors")
    ends = [
        step(honest(5, 0.7, 2), tmp_path, start=start, state=s, round_=2, **options_of(name))
        for s in (state, kept, None)
    ]
    for n, value in ends[0][0].items():
        assert torch.equal(ends[1][0][n], value) and not torch.equal(ends[2][0][n], value)
    assert all(torch.equal(ends[1][1][n], value) for n, value in ends[0][1].items())


@pytest.mark.parametrize("name", FEWEST)
def test_too_few_silos_are_an_error_before_they_train_and_too_few_answers_after(name: str, tmp_path: Path) -> None:
    few, sent = FEWEST[name] - 1, honest(FEWEST[name])
    step(sent, tmp_path, **options_of(name))
    said = f"'{name}' withstands 2 bad silos among at least {few + 1}, and {few} silos"
    with pytest.raises(RunError, match=f"{said} are asked"):
        step(sent[:-1], tmp_path, **options_of(name))
    algorithm = get_algorithm(AlgorithmSpec(**options_of(name)), ADAPTER)
    accumulator = algorithm.accumulator(tmp_path)
    algorithm.asked(accumulator, [f"silo-{i:02}" for i in range(few + 1)], Place())
    for i in range(few):
        algorithm.fold(accumulator, sent[i], 1.0, Place(f"silo-{i:02}", rank=ADAPTER.rank))
    with pytest.raises(RunError, match=f"{said} answered"):
        algorithm.server_step(theta(), accumulator, algorithm.init_state(theta()), Step(0, few + 1))


def test_silos_that_weigh_half_are_too_heavy_for_the_geometric_median(tmp_path: Path) -> None:
    options = {"name": "rfa", "byzantine": 1}
    step(honest(5), tmp_path, weights=[1, 1, 1, 3.9, 1], **options)
    with pytest.raises(RunError, match="1 heaviest silos weigh half"):
        step(honest(5), tmp_path, weights=[1, 1, 1, 4, 1], **options)


def test_multi_krum_cannot_average_more_than_it_scores(tmp_path: Path) -> None:
    step(honest(8), tmp_path, name="multi-krum", byzantine=2, selected=4)
    with pytest.raises(RunError, match="at most 4 can be averaged, and `selected` is 5"):
        step(honest(8), tmp_path, name="multi-krum", byzantine=2, selected=5)


def test_fltrust_needs_its_root_asked_and_answering(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="'site-1' is not among those asked"):
        step(honest(3), tmp_path, name="fltrust", root="site-1")
    with pytest.raises(RunError, match="no other"):
        step(honest(1), tmp_path, name="fltrust", root="silo-00")
    algorithm = get_algorithm(AlgorithmSpec(name="fltrust", root="silo-09"), ADAPTER)
    accumulator = algorithm.accumulator(tmp_path)
    algorithm.asked(accumulator, ["silo-00", "silo-09"], Place())
    algorithm.fold(accumulator, honest(1)[0], 1.0, Place("silo-00"))
    with pytest.raises(RunError, match="'silo-09' has no update in this round"):
        algorithm.server_step(theta(), accumulator, {}, Step(0, 2))


def test_flame_says_before_the_round_that_its_library_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    algorithm = get_algorithm(AlgorithmSpec(name="flame"), ADAPTER)
    with pytest.raises(MissingExtra, match=r"flame needs the optional extra \[selection\]"):
        algorithm.asked(algorithm.accumulator(tmp_path), ["a", "b", "c"], Place())


def test_updates_of_unlike_shapes_cannot_be_compared(tmp_path: Path) -> None:
    good = honest(3)
    good[1] = {n: u for n, u in good[1].items() if "lora" in n}
    with pytest.raises(RunError, match="not of the same tensors"):
        step(good, tmp_path, name="median")
