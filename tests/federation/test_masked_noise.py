"""Silos protected as a whole by noise of their own under masks: the mean, its noise, its cost, too few survivors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlm.guards.noised
from fedlm.errors import RunError
from fedlm.federation.api import run_recipe
from fedlm.federation.identities import simulated
from fedlm.federation.silo.masked import Masked
from fedlm.federation.silo.sums import Sums
from fedlm.guards import REST
from fedlm.guards.mask import BESIDE
from fedlm.guards.noised import ROOM, NoisedEncoding, hidden_noised, least_survivors, noised_encoding, shown_noised
from fedlm.messages import Request, Tensors
from fedlm.privacy.accounting import spent
from fedlm.privacy.ledger import read_spent
from fedlm.privacy.mechanisms import noise_multiplier, times
from fedlm.privacy.stream import SecretStream, fresh_secret
from tests.federation.conftest import Tiny
from tests.federation.test_masked import Runs, adapter, lines, run

__all__ = ["run"]

CLIP = 0.05
NOISED = ("federation.algorithm.weights=equal", f"privacy={{unit: silo, epsilon: 20, delta: 0.01, clip: {CLIP}}}")
SUM = ("federation.algorithm={name: fedavg, weights: equal}", "federation.rounds=2", "guards=[{name: mask}]", *NOISED)


def stepped(tiny: Tiny, folder: Path, *changes: str) -> Tensors:
    run_recipe(tiny.recipe(*SUM, *changes), run_dir=folder, base=tiny.base)
    return adapter(folder)


def how_of(tiny: Tiny, values: int) -> NoisedEncoding:
    return noised_encoding(tiny.recipe(*SUM), 4, values)


@pytest.mark.parametrize("noise", ["skellam", "discrete-gaussian"])
def test_without_the_noise_the_mean_is_that_of_clipped_updates(
    noise: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the coordinator's way, which sees each clipped update, with its noise off as well."""

    def silent(_: Any, __: float, count: int) -> np.ndarray:
        return np.zeros(count, np.int64)

    monkeypatch.setattr("fedlm.federation.noise.gaussian", silent)
    monkeypatch.setattr(fedlm.guards.noised, "skellam", silent)
    monkeypatch.setattr(fedlm.guards.noised, "discrete_gaussian", silent)
    summed = stepped(tiny, tmp_path / "masked", f"privacy.noise={noise}", "federation.rounds=1")
    plain = stepped(tiny, tmp_path / "plain", "guards=[]", "federation.rounds=1")
    step = how_of(tiny, sum(value.numel() for value in plain.values())).step
    for name, value in plain.items():
        torch.testing.assert_close(summed[name], value, rtol=0, atol=2 * step)  # rounding to the grid, at random


def test_the_noise_of_all_silos_together(tiny: Tiny) -> None:
    """Variance of the sum of four silos' noise where three at least must be there and one may tell its own: 4/2 of
    that which the accountant counts."""
    values, secret = 20_000, fresh_secret()
    for noise in ("skellam", "discrete-gaussian"):
        how = noised_encoding(tiny.recipe(*SUM, f"privacy.noise={noise}"), 4, values)
        assert how.mechanism.survivors == 2 and least_survivors(tiny.recipe(*SUM), 4) == 3
        update = torch.zeros(values)
        update[0] = CLIP
        words = [hidden_noised(update, how, SecretStream(secret, "silo", n)) for n in range(4)]
        assert all(word.shape == (values + BESIDE,) and word[-1] == 1 and word[-2] == 0 for word in words)
        total = (sum(word.astype(np.uint64) for word in words) & (2**how.ring_bits - 1)).astype(np.uint32)
        mean, weight = shown_noised(total, 4, how)
        deviation = noise_multiplier(how.mechanism) * CLIP * math.sqrt(4 / 2) / 4
        assert weight == 4 and float(mean[1:].std()) == pytest.approx(deviation, rel=0.03)
        assert float(mean[0]) == pytest.approx(CLIP, abs=5 * deviation)
        assert abs(float(mean[1:].mean())) < 5 * deviation / math.sqrt(values)


@pytest.mark.parametrize(("silos", "bits"), [(4, 16), (10, 12), (100, 16), (1000, 20)])
def test_a_sum_has_room_and_the_noise_is_in_budget(tiny: Tiny, silos: int, bits: int) -> None:
    recipe = tiny.recipe(*SUM, f"guards=[{{name: mask, bits: {bits}}}]", "privacy.delta=1e-4", "privacy.epsilon=8")
    how = noised_encoding(recipe, silos, 50_000)
    noise = noise_multiplier(how.mechanism) * how.mechanism.bound * math.sqrt(silos / how.mechanism.survivors)
    assert silos * (how.mechanism.bound + 1) + ROOM * noise <= 2 ** (how.ring_bits - 1) - 1
    assert how.ring_bits <= bits + math.ceil(math.log2(silos)) and how.step * how.mechanism.bound == pytest.approx(CLIP)
    assert 7.9 < spent([times(how.mechanism, 2)], 1e-4).epsilon <= 8


def test_the_same_update_is_noised_anew_where_the_noise_is_for_other_silos(tiny: Tiny, tmp_path: Path) -> None:
    """A round that is repeated with those who are left: two sums of one update under the same draws, of another scale
    and grid, would give the update away."""
    recipe, values = tiny.recipe(*SUM, "federation.rounds=4"), 2000
    (tmp_path / "run").mkdir()
    masked = Masked("a", recipe, tmp_path, simulated(0, "a"), 3, Sums(tmp_path, 2), "train", simulated=True)
    update = {REST: torch.full((values,), CLIP / 100)}
    request, noises = Request("a", "train", "run", 0, 0), []
    for silos in (4, 5, 5):
        how = noised_encoding(recipe, silos, values)
        ring = 2**how.ring_bits
        whole = masked._noised(request, update, how)[:values].astype(np.int64)
        whole[whole >= ring // 2] -= ring
        noises.append(whole * how.step - CLIP / 100)
    assert abs(np.corrcoef(noises[0], noises[1])[0, 1]) < 0.1
    np.testing.assert_array_equal(noises[1], noises[2])  # a repeat of the same is the same, and costs nothing
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 3


def test_values_that_wrap_around_come_back(tiny: Tiny) -> None:
    """Negative sums are the ring's upper half."""
    how = how_of(tiny, 3)
    ring = 2**how.ring_bits
    mean, _ = shown_noised(np.array([ring - 4, 8, 0, 0, 4], np.uint32), 4, how)
    torch.testing.assert_close(mean, torch.tensor([-1.0, 2.0, 0.0]) * how.step)
    with pytest.raises(RunError, match="the weights' sum is 5, of 4 silos"):
        shown_noised(np.array([0, 0, 0, 0, 5], np.uint32), 4, how)


def test_every_silo_pays_and_workers_give_the_same_bits(run: Runs, tmp_path: Path) -> None:
    one = run(tmp_path / "1", *NOISED)
    run(tmp_path / "2", *NOISED, workers=2)
    first, second = adapter(tmp_path / "1"), adapter(tmp_path / "2")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {reply.verb for reply in one.seen} == {"hello", "keys", "shares", "train", "unmask"}
    told = [line["epsilon"] for line in lines(tmp_path / "1")[1:]]
    ledgers = sorted((tmp_path / "1" / "silos").rglob("ledger.jsonl"))
    assert len(ledgers) == 4 and 19 < told[-1] <= 20
    for ledger in ledgers:
        assert read_spent(ledger)[1].epsilon == pytest.approx(told[-1], rel=1e-9)
        assert len(ledger.read_text().splitlines()) == 3
    cards = json.loads((tmp_path / "1" / "data.json").read_text())["silos"]
    assert all(card["rows"] == {"train": 1, "validation": 0, "test": 0} for card in cards.values())


def test_silos_do_not_unmask_a_sum_with_too_little_noise(run: Runs, tmp_path: Path) -> None:
    """The protocol would let one of four go, and noise was sized for all four."""
    changes = ("federation.rounds=1", "federation.quorum=0.75", "guards=[{name: mask, dropouts: 0, corrupt: 0}]")
    run(tmp_path / "masks", *changes, lost={"train": {"site2"}})
    assert lines(tmp_path / "masks")[1]["replied"] == ["site0", "site1", "site3"]
    with pytest.raises(RunError, match="cannot go on after 'unmask'"):
        run(tmp_path / "noise", *changes, *NOISED, lost={"train": {"site2"}})
    assert len(lines(tmp_path / "noise")) == 1
    changes = (*changes[:2], "guards=[{name: mask, dropouts: 0.25, corrupt: 0}]")
    run(tmp_path / "sized", *changes, *NOISED, lost={"train": {"site2"}})
    assert lines(tmp_path / "sized")[1]["replied"] == ["site0", "site1", "site3"]
