"""A clip that moves by a count which silos noise and mask themselves: sum and count, their noise, what both cost
together, where the clip goes, and what a silo refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

import fedlm.federation.noise
import fedlm.guards.noised
from fedlm.cli.main import app
from fedlm.errors import PrivacyError, RunError
from fedlm.federation import api
from fedlm.federation.engines.choose import make_engine
from fedlm.federation.identities import simulated
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo.masked import Masked
from fedlm.federation.silo.sums import Sums
from fedlm.guards import REST
from fedlm.guards.noised import ROOM, NoisedEncoding, hidden_noised, noised_encoding, shown_count, shown_noised
from fedlm.messages import Engine, Failure, Reply, Request, Stop
from fedlm.privacy.accounting import ORDERS
from fedlm.privacy.adaptive_clipping import AdaptiveClipping
from fedlm.privacy.ledger import read_spent
from fedlm.privacy.mechanisms import noise_multiplier
from fedlm.privacy.secagg.message import Words
from fedlm.privacy.stream import SecretStream, fresh_secret
from fedlm.recipe.load import dump_recipe
from fedlm.report.audit import audit_of
from tests.algorithms.observed import federate, final
from tests.federation.conftest import Tiny
from tests.federation.test_adaptive_clip import norm
from tests.federation.test_masked import Runs, adapter, lines, run

__all__ = ["run"]

CLIP, RATE, QUANTILE = 0.05, 0.7, 0.3
MOVING = f"privacy.adaptive={{quantile: {QUANTILE}, rate: {RATE}}}"
NOISED = (
    "federation.algorithm={name: fedavg, weights: equal}",
    f"privacy={{unit: silo, epsilon: 20, delta: 0.01, clip: {CLIP}}}",
    MOVING,
)
SUM = ("federation.rounds=2", "data.split={validation: 0, test: 0}", "guards=[{name: mask}]", *NOISED)
NOISES = ("skellam", "discrete-gaussian")


def how_of(tiny: Tiny, values: int, *changes: str, silos: int = 4, clip: float = CLIP) -> NoisedEncoding:
    return noised_encoding(tiny.recipe(*SUM, *changes), silos, values, clip)


def rule_of(how: NoisedEncoding) -> tuple[AdaptiveClipping, float, float]:
    """The clip's rule, z, and z_delta."""
    assert how.adaptive is not None
    noise = noise_multiplier(how.mechanism)
    return how.adaptive, noise, how.adaptive.update_noise(noise)


def added(words: Iterable[Words], how: NoisedEncoding) -> Words:
    total: Words = (sum(word.astype(np.uint64) for word in words) & (2**how.ring_bits - 1)).astype(np.uint32)  # type: ignore[union-attr]
    return total


def silent(_: Any, __: float, count: int) -> NDArray[np.int64]:
    return np.zeros(count, np.int64)


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedlm.federation.noise, "gaussian", silent)
    monkeypatch.setattr(fedlm.guards.noised, "skellam", silent)
    monkeypatch.setattr(fedlm.guards.noised, "discrete_gaussian", silent)


# ---------------------------------------------------------------- sum and count


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.usefixtures("no_noise")
def test_without_noise_sum_and_count_are_the_plain_ones(noise: str, tiny: Tiny) -> None:
    how, draw = how_of(tiny, 500, f"privacy.noise={noise}"), np.random.default_rng(1)
    updates, within = [], [True, False, False, False]
    for inside in within:
        update = draw.normal(size=500)
        updates.append(update * (CLIP * (0.4 if inside else 1) / float(np.linalg.norm(update))))
    secret = fresh_secret()
    words = [
        hidden_noised(torch.from_numpy(update).float() * (1 - 1e-6), how, SecretStream(secret, n), inside)
        for n, (update, inside) in enumerate(zip(updates, within, strict=True))
    ]
    total = added(words, how)
    mean, weight = shown_noised(total, 4, how)
    assert weight == 4 and mean.shape == (500,)
    np.testing.assert_allclose(mean.numpy(), np.mean(updates, axis=0), rtol=0, atol=1.01 * how.step)
    assert shown_count(total, 4, how) == pytest.approx(-1.0, abs=4 / how.one) and how.one > 500


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.usefixtures("no_noise")
def test_without_noise_a_run_is_that_of_the_coordinators_way(noise: str, tiny: Tiny, tmp_path: Path) -> None:
    """Two rounds: two of four updates are within the first clip, so the second is one step of the rule lower."""
    kept, unmasked = ("federation.keep=all", f"privacy.noise={noise}"), ("guards=[]", "privacy.noise=skellam")
    engine, _ = federate(tiny.recipe(*SUM, *unmasked, "privacy.clip=1e6"), tiny.base, tmp_path / "large")
    norms = sorted(norm(update) for update in engine.updates[0].values())
    clip = math.sqrt(norms[1] * norms[2])
    for folder, changes in (("masked", ()), ("plain", unmasked)):
        recipe = tiny.recipe(*SUM, *kept, f"privacy.clip={clip}", *changes)
        api.run_recipe(recipe, run_dir=tmp_path / folder, base=tiny.base)
    ours, theirs = (final(RunDir.open(tmp_path / folder, write=False), 0) for folder in ("masked", "plain"))
    how = how_of(tiny, sum(value.numel() for value in ours.values()), *kept, clip=clip)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2 * how.step)  # rounding to the grid, at random
    one, two = lines(tmp_path / "masked")[1:]
    assert one["clip"] == clip and one["within_clip"] == pytest.approx(0.5, abs=1 / how.one)
    assert two["clip"] == pytest.approx(clip * math.exp(-RATE * (0.5 - QUANTILE)), rel=RATE / how.one)
    for mine, other in zip((one, two), lines(tmp_path / "plain")[1:], strict=True):
        assert mine["within_clip"] == pytest.approx(other["within_clip"], abs=1 / how.one)


@pytest.mark.parametrize("noise", NOISES)
def test_the_noise_on_sum_and_count(noise: str, tiny: Tiny) -> None:
    """z_delta times the clip on the sum and sigma_b on the count, of the two silos that the accountant counts; of all
    four, sqrt(2) times as much."""
    how, secret = how_of(tiny, 20, f"privacy.noise={noise}"), fresh_secret()
    rule, z, z_delta = rule_of(how)
    assert how.mechanism.survivors == 2 and how.mechanism.dimension == 21
    assert rule.count_noise == z and z_delta == pytest.approx(math.sqrt(4 / 3) * z)  # a twentieth of 4 is nothing
    counts, sums = list[float](), list[torch.Tensor]()
    for number in range(600):
        words = [hidden_noised(torch.zeros(20), how, SecretStream(secret, number, n), n > 0) for n in range(4)]
        total = added(words, how)
        counts.append(shown_count(total, 4, how) - 1)
        sums.append(4 * shown_noised(total, 4, how)[0])
    assert np.std(counts) == pytest.approx(math.sqrt(2) * rule.count_noise, rel=0.1)
    assert abs(np.mean(counts)) < 5 * math.sqrt(2) * rule.count_noise / math.sqrt(600)
    assert float(torch.cat(sums).std()) == pytest.approx(math.sqrt(2) * z_delta * CLIP, rel=0.03)
    chosen = how_of(tiny, 20, f"privacy.noise={noise}", "privacy.adaptive.count_noise=40")
    rule, z, z_delta = rule_of(chosen)
    assert rule.count_noise == 40 and chosen.mechanism == how.mechanism
    assert chosen.mechanism.silo_scale() * math.sqrt(2) / chosen.one == pytest.approx(40)
    assert chosen.mechanism.silo_scale() * math.sqrt(2) * chosen.step == pytest.approx(z_delta * CLIP)
    assert z_delta == pytest.approx((z**-2 - 80**-2) ** -0.5)


@pytest.mark.parametrize(("silos", "bits"), [(4, 16), (10, 12), (100, 16), (1000, 20)])
def test_the_longer_vector_is_within_the_bound_and_its_sum_has_room(tiny: Tiny, silos: int, bits: int) -> None:
    changes = (f"guards=[{{name: mask, bits: {bits}}}]", "privacy.delta=1e-4", "privacy.epsilon=8")
    how = how_of(tiny, 50_000, *changes, silos=silos)
    rule, _, _ = rule_of(how)
    longest = math.hypot(CLIP / how.step, rule.indicator(True) * how.one)
    assert longest == pytest.approx(how.mechanism.bound, rel=1e-12)
    everyones = how.mechanism.silo_scale() * math.sqrt(silos)
    half = 2 ** (how.ring_bits - 1) - 1
    assert silos * (how.one / 2 + 1) + ROOM * everyones <= silos * (how.mechanism.bound + 1) + ROOM * everyones <= half


def test_another_clip_is_another_grid_and_the_same_promise(tiny: Tiny) -> None:
    """What is masked does not depend on the units: an update and a clip that are 2^k times as large give the same."""
    secret, update = fresh_secret(), torch.linspace(-1, 1, 30) * (CLIP / 8)
    first = how_of(tiny, 30)
    words = hidden_noised(update, first, SecretStream(secret, 0), within=True)
    for factor in (2.0**-20, 2.0**9):
        how = how_of(tiny, 30, clip=CLIP * factor)
        assert how.mechanism == first.mechanism and how.step == pytest.approx(first.step * factor, rel=1e-12)
        again = hidden_noised(update * factor, how, SecretStream(secret, 0), within=True)
        np.testing.assert_array_equal(again, words)


def test_what_costs_more_than_it_is_noised_for_is_refused(tiny: Tiny) -> None:
    how, stream = how_of(tiny, 30), SecretStream(fresh_secret(), 0)
    for within in (None, 1, "yes"):
        with pytest.raises(PrivacyError, match="not known whether the update was within the clip"):
            hidden_noised(torch.zeros(30), how, stream, within)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="there are 32 numbers, and the noise is for 31"):
        hidden_noised(torch.zeros(31), how, stream, within=True)
    with pytest.raises(PrivacyError, match="above the bound"):
        hidden_noised(torch.full((30,), CLIP), how, stream, within=False)
    for clip in (1e-306, 5e-324):
        with pytest.raises(PrivacyError, match="with which nothing can be counted"):
            how_of(tiny, 30, clip=clip)
    with pytest.raises(PrivacyError, match="it is not said where it is"):
        noised_encoding(tiny.recipe(*SUM), 4, 30)
    with pytest.raises(RunError, match="is no count of 4 silos"):
        shown_count(np.array([0, 2 ** (how.ring_bits - 1), 4], np.uint32), 4, how)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("noise", NOISES)
def test_the_ledgers_are_what_the_longer_vector_costs(noise: str, run: Runs, tmp_path: Path) -> None:
    """The paper's bound, written out for d + 1 numbers of two rounds; and, from below, two Gaussians in each."""
    run(tmp_path / "run", *NOISED, f"privacy.noise={noise}")
    d = sum(value.numel() for value in adapter(tmp_path / "run").values()) + 1
    how = how_of(run.tiny, d - 1, f"privacy.noise={noise}")
    rule, _, z_delta = rule_of(how)
    c = math.hypot(CLIP / how.step, how.one / 2)
    l2 = min(c + math.sqrt(d), math.sqrt(c**2 + d / 4 + math.sqrt(2 * 0.5) * (c + math.sqrt(d) / 2)))  # beta = e^-1/2
    l1, variance = min(math.sqrt(d) * l2, l2**2), how.mechanism.silo_scale() ** 2 * how.mechanism.survivors
    curve = []
    for order in ORDERS:
        if noise == "skellam":
            a = math.ceil(order)
            extra = min(((2 * a - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
            curve.append(2 * (a * l2**2 / (2 * variance) + extra))
        else:  # tau is below 1e-300 at a scale of hundreds
            curve.append(2 * order * l2**2 / (2 * variance))
    epsilon = float(dp_accounting.rdp.compute_epsilon(ORDERS, curve, 0.01)[0])
    ledgers = sorted((tmp_path / "run" / "silos").rglob("ledger.jsonl"))
    assert len(ledgers) == 4
    for ledger in ledgers:
        assert read_spent(ledger)[1].epsilon == pytest.approx(epsilon, rel=1e-6)
        assert len(ledger.read_text().splitlines()) == 3
    assert lines(tmp_path / "run")[-1]["epsilon"] == pytest.approx(epsilon, rel=1e-6) and 19.9 < epsilon <= 20
    gaussians = dp_accounting.rdp.RdpAccountant(ORDERS, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    for multiplier in (z_delta, 2 * rule.count_noise):  # a bit moves the count by a half
        gaussians.compose(dp_accounting.GaussianDpEvent(multiplier), 2)
    assert 0.95 * epsilon < gaussians.get_epsilon(0.01) < epsilon  # Skellam: whole orders alone


# ---------------------------------------------------------------- runs


def test_the_clip_moves_by_the_rule_and_workers_give_the_same_bits(run: Runs, tmp_path: Path) -> None:
    one = run(tmp_path / "1", *NOISED, "federation.rounds=3")
    run(tmp_path / "2", *NOISED, "federation.rounds=3", workers=2)
    first, second = adapter(tmp_path / "1"), adapter(tmp_path / "2")
    assert all(torch.equal(first[name], second[name]) for name in first)
    told = lines(tmp_path / "1")[1:]
    for ours, theirs in zip(told, lines(tmp_path / "2")[1:], strict=True):
        assert all(ours[name] == theirs[name] for name in ("clip", "within_clip", "epsilon"))
    rule = AdaptiveClipping(1.0, QUANTILE, RATE)
    assert told[0]["clip"] == CLIP
    for line, following in pairwise(told):
        moved = rule.step(line["clip"], 4 * (line["within_clip"] - 0.5), 4)
        assert following["clip"] == pytest.approx(moved, rel=1e-12) and moved != line["clip"]
    for reply in one.seen:
        if reply.verb == "train":
            assert set(reply.tensors) == {"masked"}
            assert set(reply.fields) == {"run", "round", "attempt", "sent_bytes", "received_bytes"}
    page = audit_of(tmp_path / "1")
    (bit,) = [leaving for leaving in page.leaving if "within the clip" in leaving.what]
    assert "noise that the silo added itself" in bit.protection and "only in the sum" in bit.protection
    assert page.guarantee is not None and "count of those within the clip together" in page.guarantee.mechanism


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_comes_to_the_quantile_of_the_norms(tiny: Tiny, quantile: float) -> None:
    """Log-normal norms of 100 silos: the quantile is exp(s z). Sums and counts have the noise of the budget; the mean
    of the last rounds' clips is compared, since each wanders."""
    silos, rounds, spread, clip = 100, 60, 0.8, 3.0
    recipe = tiny.recipe(
        *SUM, f"federation.rounds={rounds}", "privacy={unit: silo, epsilon: 20, delta: 1e-3, clip: 3}",
        f"privacy.adaptive={{quantile: {quantile}, rate: 0.5}}",
    )  # fmt: skip
    draw, secret, clips = np.random.default_rng(3), fresh_secret(), list[float]()
    for number in range(rounds):
        how = noised_encoding(recipe, silos, 1, clip)
        words = []
        for n, length in enumerate(np.exp(draw.normal(0, spread, silos))):
            update = torch.tensor([min(length, clip * (1 - 1e-7))])
            words.append(hidden_noised(update, how, SecretStream(secret, number, n), bool(length <= clip)))
        assert how.adaptive is not None
        clip = how.adaptive.step(clip, shown_count(added(words, how), silos, how), silos)
        clips.append(clip)
    exact = math.exp(spread * {0.2: -0.841621, 0.5: 0.0, 0.9: 1.281552}[quantile])
    assert math.exp(np.mean(np.log(clips[25:]))) == pytest.approx(exact, rel=0.15)


def test_killed_anywhere_it_goes_on_with_the_same_clip_and_pays_once(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*NOISED, "federation.rounds=3")
    run(tmp_path / "whole", *changes)
    whole = adapter(tmp_path / "whole")

    class KilledError(RuntimeError):
        pass

    for moment in ("save_checkpoint", "append_round"):
        real, calls = getattr(RunDir, moment), list[int]()

        def dies(self: RunDir, *args: Any, real: Any = real, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == (2 if real.__name__ == "save_checkpoint" else 3):  # of the second round
                raise KilledError
            real(self, *args)

        folder = tmp_path / moment
        with monkeypatch.context() as patched:
            patched.setattr(RunDir, moment, dies)
            with pytest.raises(KilledError):
                run(folder, *changes)
        run(folder)
        resumed = adapter(folder)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        for ours, theirs in zip(lines(folder), lines(tmp_path / "whole"), strict=True):
            assert all(ours.get(name) == theirs.get(name) for name in ("clip", "within_clip", "epsilon"))
        for ledger in (folder / "silos").rglob("ledger.jsonl"):
            assert len(ledger.read_text().splitlines()) == 4


# ---------------------------------------------------------------- what a silo refuses, and what it pays for


def test_another_clip_or_another_bit_is_another_release(tiny: Tiny, tmp_path: Path) -> None:
    """One update within two clips: under the same draws the two sums would tell it."""
    recipe, values = tiny.recipe(*SUM, "federation.rounds=4"), 2000
    (tmp_path / "run").mkdir()
    masked = Masked("a", recipe, tmp_path, simulated(0, "a"), 3, Sums(tmp_path, 2), "train", simulated=True)
    update, request, noises = {REST: torch.full((values,), CLIP / 100)}, Request("a", "train", "run", 0, 0), []
    for clip, within in ((CLIP, True), (2 * CLIP, True), (CLIP, False), (CLIP, True)):
        how = noised_encoding(recipe, 4, values, clip)
        ring = 2**how.ring_bits
        whole = masked._noised(request, update, how, within)[:values].astype(np.int64)
        whole[whole >= ring // 2] -= ring
        noises.append(whole * how.step - CLIP / 100)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(noises[one], noises[other])[0, 1]) < 0.1
    np.testing.assert_array_equal(noises[0], noises[3])
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 4  # three of four, after the first


class Twisted:
    """An engine that changes requests on their way."""

    def __init__(self, engine: Engine, twist: Callable[[Request], Request]) -> None:
        self.engine, self.twist = engine, twist

    def silos(self) -> Any:
        return self.engine.silos()

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        return self.engine.exchange(map(self.twist, requests), deadline, stop)

    def close(self) -> None:
        self.engine.close()


def asked_for(clip: Any) -> Callable[[Request], Request]:
    def twist(request: Request) -> Request:
        return replace(request, fields={**request.fields, "clip": clip}) if request.verb == "train" else request

    return twist


def agreed_on(clip: Any) -> Callable[[Request], Request]:
    def twist(request: Request) -> Request:
        if request.verb != "keys":
            return request
        return replace(request, fields={**request.fields, "agreed": {**request.fields["agreed"], "clip": clip}})

    return twist


@pytest.mark.parametrize(
    ("twist", "words"),
    [
        *((asked_for(clip), "does not say where it is") for clip in (None, 0, -1.0, math.inf, math.nan, True, "1")),
        *((agreed_on(clip), "does not say where it is") for clip in (None, 0, -1.0, True, "1")),
        (asked_for(2 * CLIP), "another clip than the silos agreed on"),
        (agreed_on(2 * CLIP), "another 'agreed' than this run's recipe has"),
        (agreed_on(1e-306), "with which nothing can be counted"),
    ],
)
def test_no_clip_or_another_one_is_no_answer(
    twist: Callable[[Request], Request], words: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "make_engine", lambda *args, **named: Twisted(make_engine(*args, **named), twist))
    with pytest.raises(RunError, match=words):
        api.run_recipe(tiny.recipe(*SUM), run_dir=tmp_path / "run", base=tiny.base)
    assert not list((tmp_path / "run" / "silos").rglob("ledger.jsonl"))  # nothing left, and nothing was paid for


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count_noise": 0.01}, "noise of 0.01 on the count spends the whole budget"),
        ({"quantile": 1.5}, "privacy.adaptive.quantile"),
        ({"rate": -1}, "privacy.adaptive.rate"),
    ],
)
def test_bad_settings_end_with_one_sentence(change: dict[str, float], words: str, tiny: Tiny, tmp_path: Path) -> None:
    said = dump_recipe(tiny.recipe(*SUM))
    file = tiny.base / f"{next(iter(change))}.yaml"
    file.write_text(said)
    ((name, value),) = change.items()
    command = ["run", str(file), "--run-dir", str(tmp_path / "run"), "--set", f"privacy.adaptive.{name}={value}"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "run").rglob("ledger.jsonl"))
