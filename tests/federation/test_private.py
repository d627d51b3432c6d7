"""Runs under a budget of differential privacy: what leaves, what it costs, and that a kill costs nothing twice."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import safetensors.torch
import torch

import fedlm.federation.noise
from fedlm.errors import BudgetExceeded, RecipeError, RunError
from fedlm.federation.api import run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import Silo, Workbench
from fedlm.federation.silo.private import cost
from fedlm.federation.silo.secret import FILE, secret_of
from fedlm.messages import Failure, Reply, Request, Tensors
from fedlm.privacy.clipping import Clipped
from fedlm.privacy.ledger import read_spent
from fedlm.privacy.mechanisms import Poisson
from fedlm.recipe.schema import Recipe
from tests.algorithms.observed import Observed, federate, final
from tests.federation.conftest import Tiny

PLAIN = ("federation.algorithm.name=fedavg", "federation.rounds=2", "training.clip_norm=null")
EXAMPLES = (*PLAIN, "privacy={unit: example, epsilon: 8, delta: 1e-3, clip: 0.5}")
SILOS = (*PLAIN, "federation.algorithm.weights=equal", "privacy={unit: silo, epsilon: 20, delta: 0.01, clip: 0.05}")
ROWS = 18
"""Of each silo of the tiny recipe, to train on; see `test_the_noise_is_what_an_accountant_of_its_own_finds`."""


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def run(tiny: Tiny, folder: Path, *changes: str, resume: bool = False) -> Tensors:
    run_recipe(None if resume else tiny.recipe(*changes), base=tiny.base, run_dir=folder, resume=resume)
    tensors: Tensors = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    return tensors


# ---------------------------------------------------------------- examples: noise of the silo's own


def test_the_same_bits_and_no_figure_of_a_silo(tiny: Tiny, tmp_path: Path) -> None:
    alike = "data.split={validation: 0, test: 0}"  # as many rows in each silo: one calibration serves all
    one = run(tiny, tmp_path / "1", *EXAMPLES, alike)
    two = run(tiny, tmp_path / "2", *EXAMPLES, alike, "federation.workers=2")
    assert all(torch.equal(one[name], two[name]) for name in one)
    for line in lines(tmp_path / "1"):
        assert line["loss"] is None and line["validation"] is None and line["figures"] == {}
        assert all(silo.keys() == {"steps", "bytes_up", "bytes_down"} for silo in line["silos"].values())
    assert not (tmp_path / "1" / "evaluation.json").exists()
    ledgers = sorted((tmp_path / "1" / "silos").rglob("ledger.jsonl"))
    assert len(ledgers) == 4
    for ledger in ledgers:
        budget, spent = read_spent(ledger)
        assert 7.9 < spent.epsilon <= budget.epsilon == 8


def test_the_noise_is_what_an_accountant_of_its_own_finds(tiny: Tiny) -> None:
    """4 of a silo's rows a step, 3 steps in each of 2 rounds: dp-accounting's epsilon of that noise is the budget."""
    recipe = tiny.recipe(*EXAMPLES)
    found = cost(recipe, "site0", ROWS)
    assert found.mechanism.sampling == Poisson(4 / ROWS, secret=True) and found.mechanism.count == 3
    assert found.mechanism.noise_multiplier is not None
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    event = dp_accounting.GaussianDpEvent(found.mechanism.noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(4 / ROWS, event), 6)
    assert accountant.get_epsilon(1e-3) == pytest.approx(8, abs=5e-3) and accountant.get_epsilon(1e-3) <= 8
    assert found.epsilon(2) == pytest.approx(accountant.get_epsilon(1e-3), abs=1e-3)
    assert 0 == found.epsilon(0) < found.epsilon(1) < found.epsilon(2)


def test_noise_reaches_the_update(tiny: Tiny, tmp_path: Path) -> None:
    """SGD, one step: the update is -lr (sum + noise) / expected, whose deviation is lr sigma C / expected at least."""
    sgd = ("training.optimizer=sgd", "training.steps=1", "federation.rounds=1", "training.lr=1.0")
    recipe = tiny.recipe(*PLAIN, *sgd, "privacy={unit: example, epsilon: 1, delta: 1e-3, clip: 1e-6}")
    one = OneSilo(tiny, tmp_path, recipe)
    reply = one.train(0)
    assert isinstance(reply, Reply)
    sigma = cost(recipe, "site1", reply.fields["rows"]).mechanism.noise_multiplier
    values = torch.cat([value.flatten() for name, value in reply.tensors.items() if "lora_B" in name])
    assert sigma is not None and float(values.std()) == pytest.approx(sigma * 1e-6 / 4, rel=0.1)


class OneSilo:
    """A silo with its own key, and requests to it."""

    def __init__(self, tiny: Tiny, folder: Path, recipe: Recipe) -> None:
        self.observed = Observed(recipe, tiny.base, folder)
        self.silo = Silo("site1", Workbench(recipe, self.observed.data), folder)
        self.folder, self.recipe = folder, recipe

    def train(self, round_: int, attempt: int = 0, shift: float = 0.0) -> Reply | Failure:
        from fedlm.models.adapters import initial_tensors

        tensors = {name: value + shift for name, value in initial_tensors(self.recipe).items()}
        fields = {"round": round_, "rounds": 2, "accepted": -1, "silos": 4}
        return self.silo.handle(Request("site1", "train", "run", round_, attempt, tensors, fields))

    @property
    def events(self) -> int:
        return len((self.folder / "site1" / "run" / "ledger.jsonl").read_text().splitlines()) - 1


def test_a_repeat_costs_nothing_and_what_exceeds_the_budget_does_not_leave(tiny: Tiny, tmp_path: Path) -> None:
    one = OneSilo(tiny, tmp_path, tiny.recipe(*EXAMPLES))
    first = one.train(0)
    assert isinstance(first, Reply) and first.fields.keys() == {"steps", "rows"} and one.events == 1
    again = one.train(0)
    assert isinstance(again, Reply) and again.fields.get("repeated") and one.events == 1
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    assert isinstance(one.train(0, attempt=1), Reply) and one.events == 1
    assert isinstance(one.train(0, attempt=2, shift=0.1), Reply) and one.events == 2  # other content is paid for
    refused = one.train(1)
    assert isinstance(refused, Failure) and "this release" in refused.reason and one.events == 2
    assert "epsilon" in refused.reason


def test_verbs_without_noise_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    one = OneSilo(tiny, tmp_path, tiny.recipe(*EXAMPLES))
    for verb in ("evaluate", "profile", "pairs", "score", "answer"):
        answer = one.silo.handle(Request("site1", verb, "run", 0, 0, {}, {"role": "validation"}))
        assert isinstance(answer, Failure) and answer.kind.value == "refused", verb
    hello = Request("site1", "hello", "run", -1, 0, {}, {})
    for figures, held_out in (("withheld", False), ("open", True)):
        recipe = tiny.recipe(*EXAMPLES, f"privacy.figures={figures}")
        told = OneSilo(tiny, tmp_path / figures, recipe).silo.handle(hello)
        assert isinstance(told, Reply) and told.fields["card"]["rows"]["train"] > 0
        assert bool(told.fields["card"]["rows"]["validation"]) is held_out


def test_a_delta_too_large_for_the_rows_is_told_at_the_greeting(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"delta is 0\.2; it must be above 0 and below 1/"):
        run(tiny, tmp_path / "run", *EXAMPLES, "privacy.delta=0.2")


def test_a_secret_is_made_once_and_its_owners_alone(tmp_path: Path) -> None:
    first = secret_of(tmp_path / "silo", None)
    assert secret_of(tmp_path / "silo", None) == first != secret_of(tmp_path / "other", None)
    assert (tmp_path / "silo" / FILE).stat().st_mode & 0o777 == 0o600
    assert [file.name for file in (tmp_path / "silo").iterdir()] == [FILE]
    assert secret_of(tmp_path, (0, "a")) == secret_of(tmp_path, (0, "a")) != secret_of(tmp_path, (1, "a"))


# ---------------------------------------------------------------- silos: noise on the sum


def test_the_noise_on_the_mean_and_what_it_cost(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, noisy = federate(tiny.recipe(*SILOS), tiny.base, tmp_path / "noisy")
    mechanism = fedlm.federation.noise.SumNoise(tiny.recipe(*SILOS), noisy, ["a", "b", "c", "d"]).mechanism
    assert mechanism.noise_multiplier is not None
    after = [line["epsilon"] for line in noisy.rounds() if line["round"] >= 0]
    exact = [
        dp_accounting.get_epsilon_gaussian(mechanism.noise_multiplier / math.sqrt(rounds), 0.01) for rounds in (1, 2)
    ]
    assert after == pytest.approx(exact, abs=1e-6) and 19.9 < after[-1] <= 20
    for number in (0, 1):
        for update in engine.updates[number].values():
            norm = math.sqrt(sum(float(value.double().square().sum()) for value in update.values()))
            assert norm <= 0.05
        before, mean = engine.broadcasts[number], {}
        for name in before:
            mean[name] = sum(update[name] for update in engine.updates[number].values()) / 4
        following = engine.broadcasts[number + 1] if number == 0 else final(noisy)
        drawn = torch.cat([(following[name] - before[name] - mean[name]).flatten() for name in before])
        assert float(drawn.std()) == pytest.approx(mechanism.noise_multiplier * 0.05 / 4, rel=0.05)

    monkeypatch.setattr(
        fedlm.federation.noise, "gaussian", lambda _, __, count: torch.zeros(count, dtype=torch.float64).numpy()
    )
    engine, silent = federate(tiny.recipe(*SILOS), tiny.base, tmp_path / "silent")
    ended = final(silent)
    for name, start in engine.broadcasts[1].items():
        mean_ = sum(update[name] for update in engine.updates[1].values()) / 4
        torch.testing.assert_close(ended[name], start + mean_, rtol=0, atol=1e-7)


def test_an_update_above_the_clip_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgotten(update: Tensors, _: float) -> Clipped:
        return Clipped(update, 1.0, within=True)

    monkeypatch.setattr("fedlm.federation.silo.trained.clip", forgotten)
    with pytest.raises(RunError, match=r"the update's norm is .*, above the clip of 0\.05"):
        run(tiny, tmp_path / "run", *SILOS)


def test_killed_after_the_noise_it_goes_on_with_the_same(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny, tmp_path / "whole", *SILOS)

    class KilledError(RuntimeError):
        pass

    def dies(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "save_checkpoint", dies)
        with pytest.raises(KilledError):
            run(tiny, tmp_path / "killed", *SILOS)
    ledger = tmp_path / "killed" / "ledger.jsonl"
    kept = next((tmp_path / "killed" / "noised").glob("*.safetensors")).read_bytes()
    assert len(ledger.read_text().splitlines()) == 2
    # Another noise would be drawn now, and must not be.
    with monkeypatch.context() as patched:
        patched.setattr(fedlm.federation.noise, "PARTY", "somebody else")
        patched.setattr(RunDir, "save_checkpoint", dies)
        with pytest.raises(KilledError):
            run(tiny, tmp_path / "killed", resume=True)
    assert next((tmp_path / "killed" / "noised").glob("*.safetensors")).read_bytes() == kept
    assert len(ledger.read_text().splitlines()) == 2
    resumed = run(tiny, tmp_path / "killed", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(ledger.read_text().splitlines()) == 3


def test_put_back_to_an_earlier_round_it_pays_again(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run", *SILOS, "federation.keep=all")
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**meta, "status": "interrupted"}))
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        if "1" in file.name:
            shutil.rmtree(file)
    with pytest.raises(BudgetExceeded, match=r"epsilon .* of 20 is spent at delta 0\.01; this release"):
        run(tiny, tmp_path / "run", resume=True)


# ---------------------------------------------------------------- what a recipe may ask for


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ((*EXAMPLES, "privacy.epsilon=0"), "greater than 0"),
        ((*EXAMPLES, "privacy.epsilon=1000"), "less than or equal to 100"),
        ((*EXAMPLES, "privacy.delta=1"), "less than 1"),
        ((*EXAMPLES, "privacy.unit=person"), "unknown value 'person', valid names: example, silo, user"),
        ((*EXAMPLES, "privacy.unit=user"), "needs the column that says whose a row is"),
        ((*EXAMPLES, "training.clip_norm=1.0"), "privacy clips each example's: set it to null"),
        ((*EXAMPLES, "training.steps=null", "training.epochs=1"), "epochs would tell how many rows a silo has"),
        ((*EXAMPLES, "training.gradient_checkpointing=true"), "layers would be read twice"),
        ((*EXAMPLES, "federation.algorithm.weights=tokens"), "'tokens' not under `privacy`"),
        ((*EXAMPLES, "federation.algorithm.name=scaffold"), "'example' not with 'scaffold'"),
        ((*EXAMPLES, "federation.algorithm.name=fedbuff"), "nobody knows beforehand how often a silo trains"),
        ((*EXAMPLES, "federation.algorithm.name=ditto"), "beside the common one, on the same examples"),
        ((*EXAMPLES, "federation.patience=2"), "when to stop is told by losses without noise"),
        ((*EXAMPLES, "federation.capacity={silos: {site1: {seconds: 3}}}"), "`seconds` not under `privacy`"),
        ((*EXAMPLES, "data.selection={method: feddqc}"), "not under `privacy`: what is trained on"),
        ((*SILOS, "federation.algorithm.weights=examples"), "'equal' is needed with `privacy.unit: silo`"),
        ((*SILOS, "guards=[{name: int4}]"), "a clipped update must arrive as it is"),
        ((*SILOS, "guards=[{name: mask, bound: 0.1}]"), "the clip and equal weights say it"),
        ((*SILOS, "privacy.noise=discrete-gaussian"), "has no effect without the guard 'mask'"),
        ((*EXAMPLES, "privacy.noise=discrete-gaussian"), "has no effect with `privacy.unit: example`"),
        ((*EXAMPLES, "privacy.adaptive={}"), "an example's clip, or a user's, stays what it is"),
        ((*SILOS, "privacy.adaptive={quantile: 1}"), "less than 1"),
        ((*SILOS, "federation.algorithm={name: krum}"), "noise is added to the sum"),
        ((*SILOS, "federation.algorithm={name: scaffold}"), "'silo' not with 'scaffold'"),
        ((*SILOS, "federation.capacity={silos: {site1: {layers: 1}}}"), "fewer silos would share a mean"),
    ],
)
def test_what_cannot_be_is_said_at_load(tiny: Tiny, changes: tuple[str, ...], wanted: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny.recipe(*changes)
    assert wanted in str(caught.value)


def test_delta_must_be_below_one_over_the_silos(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"delta is 0\.3; it must be above 0 and below 1/4"):
        run(tiny, tmp_path / "run", *SILOS, "privacy.delta=0.3")
