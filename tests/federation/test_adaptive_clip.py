"""A clip that follows a quantile of norms in a run: where it goes, what it costs, and that a kill changes no bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fedlm.federation.noise
from fedlm.algorithms.base import Accumulator
from fedlm.errors import PrivacyError, RunError
from fedlm.federation.noise import SumNoise, adaptive_of, mechanism_of
from fedlm.federation.rundir import RunDir
from fedlm.messages import Failure, Fields, Reply, Request, Tensors
from fedlm.models.adapters import initial_tensors
from fedlm.privacy.ledger import read_spent
from fedlm.report.audit import audit_of
from tests.algorithms.observed import federate
from tests.federation.conftest import Tiny
from tests.federation.test_private import SILOS, OneSilo, lines, run

RATE, QUANTILE = 0.7, 0.3
ADAPTIVE = (
    *SILOS,
    "data.split={validation: 0, test: 0}",
    f"privacy.adaptive={{quantile: {QUANTILE}, rate: {RATE}}}",
)


def silent(_: Any, __: float, count: int) -> NDArray[np.float64]:
    return np.zeros(count)


def norm(update: Tensors) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in update.values()))


def test_the_clip_of_a_round_follows_from_the_count_of_the_one_before(tiny: Tiny, tmp_path: Path) -> None:
    _, plain = federate(tiny.recipe(*ADAPTIVE), tiny.base, tmp_path / "run")
    first, second = [line for line in plain.rounds() if line["round"] >= 0]
    assert first["clip"] == 0.05
    moved = 0.05 * math.exp(-RATE * (first["within_clip"] - QUANTILE))
    assert second["clip"] == pytest.approx(moved, rel=1e-12) and second["clip"] != first["clip"]
    assert 19.9 < second["epsilon"] <= 20


def test_without_noise_the_share_is_that_of_the_norms(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the second and the third of four norms, two updates are within: left as they are, the others scaled."""
    monkeypatch.setattr(fedlm.federation.noise, "gaussian", silent)
    engine, _ = federate(tiny.recipe(*SILOS, ADAPTIVE[-2], "privacy.clip=1e6"), tiny.base, tmp_path / "large")
    norms = sorted(norm(update) for update in engine.updates[0].values())
    clip = math.sqrt(norms[1] * norms[2])
    engine, run_dir = federate(tiny.recipe(*ADAPTIVE, f"privacy.clip={clip}"), tiny.base, tmp_path / "run")
    line = next(line for line in run_dir.rounds() if line["round"] == 0)
    assert line["within_clip"] == 0.5
    sent = sorted(norm(update) for update in engine.updates[0].values())
    assert sent == pytest.approx([*norms[:2], clip, clip], rel=1e-6)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_comes_to_the_quantile_of_the_norms(tiny: Tiny, tmp_path: Path, quantile: float) -> None:
    """Log-normal norms: the quantile is exp(s z). 2,000 silos, sums and counts with noise in budget."""
    silos, rounds, spread = 2000, 60, 0.8
    recipe = tiny.recipe(
        *SILOS, f"federation.rounds={rounds}", "privacy={unit: silo, epsilon: 8, delta: 1e-4, clip: 3}",
        f"privacy.adaptive={{quantile: {quantile}, rate: 0.5, count_noise: 20}}",
    )  # fmt: skip
    directory = RunDir.create(tmp_path / "run", meta={"run": "run", "status": "running"}, recipe_text="")
    noise = SumNoise(recipe, directory, [f"silo{n}" for n in range(10)])  # the ledger is slow with thousands
    draw = np.random.default_rng(3)
    for number in range(rounds):
        norms = np.exp(draw.normal(0, spread, silos))
        replies: list[Fields] = [{"within": bool(value <= noise.clip)} for value in norms]
        accumulator = Accumulator()
        accumulator.add_mean({"x": torch.zeros(1)}, float(silos), silos)
        noise.add(accumulator, number, {"x": torch.tensor([float(number)])}, replies)
    exact = math.exp(spread * {0.2: -0.841621, 0.5: 0.0, 0.9: 1.281552}[quantile])
    assert noise.clip == pytest.approx(exact, rel=0.06)
    assert 7.9 < read_spent(directory.path / "ledger.jsonl")[1].epsilon <= 8


def test_the_ledger_is_what_an_accountant_of_its_own_finds(tiny: Tiny, tmp_path: Path) -> None:
    """Sum and count as two Gaussians in each of two rounds, by dp-accounting."""
    recipe = tiny.recipe(*ADAPTIVE)
    run(tiny, tmp_path / "run", *ADAPTIVE)
    adaptive, mechanism = adaptive_of(recipe, 4), mechanism_of(recipe, 4)
    assert adaptive is not None and mechanism.noise_multiplier is not None
    assert adaptive.count_noise == mechanism.noise_multiplier  # a twentieth of four silos would be nothing
    accountant = dp_accounting.pld.PLDAccountant()
    on_sum = adaptive.update_noise(mechanism.noise_multiplier)
    assert on_sum == pytest.approx(math.sqrt(4 / 3) * mechanism.noise_multiplier)
    for noise in (on_sum, 2 * adaptive.count_noise):  # a bit moves the count by a half
        accountant.compose(dp_accounting.GaussianDpEvent(noise), 2)
    spent = read_spent(tmp_path / "run" / "ledger.jsonl")[1].epsilon
    assert spent == pytest.approx(accountant.get_epsilon(0.01), abs=5e-3) and spent <= 20
    found = audit_of(tmp_path / "run")
    assert found.guarantee is not None and f"{on_sum:.4g} on the sum of updates" in found.guarantee.mechanism


def test_the_noise_on_sum_and_count(tiny: Tiny, tmp_path: Path) -> None:
    """Each is drawn with the deviation that is accounted for: z_delta times the round's clip, and sigma_b."""
    recipe = tiny.recipe(*ADAPTIVE, "federation.rounds=400", "privacy.epsilon=90", "privacy.adaptive.rate=1e-9")
    directory = RunDir.create(tmp_path / "run", meta={"run": "run", "status": "running"}, recipe_text="")
    noise = SumNoise(recipe, directory, ["a", "b", "c", "d"])
    adaptive = noise.adaptive
    assert adaptive is not None and noise.mechanism.noise_multiplier is not None
    counts, sums = list[float](), list[torch.Tensor]()
    for number in range(150):
        accumulator = Accumulator()
        accumulator.add_mean({"x": torch.zeros(50)}, 4.0, 4)
        figures = noise.add(accumulator, number, {"x": torch.tensor([float(number)])}, [{"within": True}] * 4)
        counts.append(4 * (figures["within_clip"] - 1))
        sums.append(accumulator.total["x"].clone())
    assert np.std(counts) == pytest.approx(adaptive.count_noise, rel=0.2)
    assert abs(np.mean(counts)) < 4 * adaptive.count_noise / math.sqrt(150)
    expected = adaptive.update_noise(noise.mechanism.noise_multiplier) * 0.05
    assert float(torch.cat(sums).std()) == pytest.approx(expected, rel=0.03)


def test_killed_anywhere_it_goes_on_with_the_same_bits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny, tmp_path / "whole", *ADAPTIVE, "federation.rounds=3", "federation.workers=2")

    class KilledError(RuntimeError):
        pass

    for moment in ("save_checkpoint", "append_round"):
        real, calls = getattr(RunDir, moment), list[int]()

        def dies(self: RunDir, *args: Any, real: Any = real, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KilledError
            real(self, *args)

        folder = tmp_path / moment
        with monkeypatch.context() as patched:
            patched.setattr(RunDir, moment, dies)
            with pytest.raises(KilledError):
                run(tiny, folder, *ADAPTIVE, "federation.rounds=3")
        resumed = run(tiny, folder, resume=True)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        for ours, theirs in zip(lines(folder), lines(tmp_path / "whole"), strict=True):
            assert all(ours.get(name) == theirs.get(name) for name in ("clip", "within_clip", "epsilon"))
        assert len((folder / "ledger.jsonl").read_text().splitlines()) == 4


def test_what_spends_all_on_the_count_is_refused_before_anything_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"noise of 0\.01 on the count spends the whole budget"):
        run(tiny, tmp_path / "run", *ADAPTIVE, "privacy.adaptive.count_noise=0.01")


@pytest.mark.parametrize(
    ("lie", "words"),
    [({}, "does not say whether"), ({"within": 1}, "does not say whether"), ({"within": "no"}, "does not say whether")],
)
def test_a_reply_without_its_bit_is_refused(
    lie: Fields, words: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlm.federation.silo.door.told", lambda fields, _: {"steps": fields["steps"], **lie})
    with pytest.raises(RunError, match=words):
        run(tiny, tmp_path / "run", *ADAPTIVE)


def test_only_a_bit_leaves_beside_the_update_and_no_clip_is_no_answer(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(*ADAPTIVE)
    one = OneSilo(tiny, tmp_path, recipe)
    tensors = initial_tensors(recipe)

    def ask(attempt: int, **more: Any) -> Reply | Failure:
        fields = {"round": 0, "rounds": 2, "accepted": -1, "silos": 4, **more}
        return one.silo.handle(Request("site1", "train", "run", 0, attempt, tensors, fields))

    for attempt, (clip, within) in enumerate([(1e6, True), (1e-3, False)]):
        reply = ask(attempt, clip=clip)
        assert isinstance(reply, Reply) and reply.fields == {"steps": 3, "within": within}
        assert norm(dict(reply.tensors)) <= clip
    for attempt, clip in enumerate([None, 0, -1.0, math.inf, math.nan, True, "1"], 2):
        answer = ask(attempt, clip=clip)
        assert isinstance(answer, Failure) and "does not say where it is" in answer.reason
