"""Runs by DP-FTRL: one charge for all rounds, the same noise after a kill, and nothing that the accountant misses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch

from fedlm.errors import PrivacyError, RecipeError
from fedlm.federation.api import run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import cycled, private
from fedlm.federation.silo.private import LEDGER, cost
from fedlm.messages import Failure, Reply
from fedlm.privacy.chain import Chain
from fedlm.privacy.cycle import plan
from fedlm.privacy.ledger import read_spent
from fedlm.recipe.methods import ALGORITHMS
from fedlm.report.audit import audit_of
from tests.federation.conftest import Tiny
from tests.federation.test_private import PLAIN, ROWS, OneSilo, run

CYCLE = (*PLAIN, "privacy={unit: example, mechanism: dp-ftrl, epsilon: 8, delta: 1e-3, clip: 0.5}")
ALIKE = "data.split={validation: 0, test: 0}"


def test_one_charge_for_all_rounds_and_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    one = run(tiny, tmp_path / "1", *CYCLE, ALIKE)
    two = run(tiny, tmp_path / "2", *CYCLE, ALIKE, "federation.workers=2")
    other = run(tiny, tmp_path / "3", *CYCLE, ALIKE, "privacy.mechanism=dp-sgd")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    ledgers = sorted((tmp_path / "1" / "silos").rglob(LEDGER))
    assert len(ledgers) == 4
    for ledger in ledgers:
        budget, spent = read_spent(ledger)
        assert len(ledger.read_text().splitlines()) == 2  # the budget, and the whole run
        assert 7.99 < spent.epsilon <= budget.epsilon == 8
        rounds = [json.loads(line) for line in (ledger.parent / cycled.FILE).read_text().splitlines()][1:]
        assert [record["round"] for record in rounds] == [0, 1]
    audit = audit_of(tmp_path / "1")
    assert audit.guarantee is not None and audit.guarantee.by_ledger
    assert "once for the whole run: each is in every 8th of 6 steps" in audit.guarantee.mechanism


def test_the_noise_is_that_of_one_gaussian(tiny: Tiny) -> None:
    """18 rows in batches of 4: five batches, six steps in all, so that a row is in two of them, five apart."""
    found = cost(tiny.recipe(*CYCLE), "site0", ROWS)
    assert found.cycle is not None and (found.cycle.batches, found.cycle.steps) == (5, 6)
    assert found.mechanism.count == 1 and found.mechanism.noise_multiplier is not None
    exact = dp_accounting.get_epsilon_gaussian(found.mechanism.noise_multiplier, 1e-3)
    assert exact == pytest.approx(8, rel=1e-3) and found.epsilon(1) == found.epsilon(2) == pytest.approx(exact)
    assert found.epsilon(0) == 0 and found.expected == ROWS / 5


def test_killed_and_resumed_it_ends_in_the_same_bits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny, tmp_path / "whole", *CYCLE, ALIKE)

    class KilledError(RuntimeError):
        pass

    times = iter(range(10))
    save = RunDir.save_checkpoint

    def dies(*args: Any, **more: Any) -> None:
        if next(times) == 1:  # all silos have answered the second round
            raise KilledError
        save(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "save_checkpoint", dies)
        with pytest.raises(KilledError):
            run(tiny, tmp_path / "killed", *CYCLE, ALIKE)
    states = list((tmp_path / "killed" / "silos").rglob("round-0001.safetensors"))
    assert len(states) == 4
    for state in states:
        state.unlink()  # so that it is trained again, with noise that is drawn again
    resumed = run(tiny, tmp_path / "killed", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for ledger in (tmp_path / "killed" / "silos").rglob(LEDGER):
        assert len(ledger.read_text().splitlines()) == 2


def test_a_round_leaves_with_one_content_alone(tiny: Tiny, tmp_path: Path) -> None:
    one = OneSilo(tiny, tmp_path, tiny.recipe(*CYCLE))
    first = one.train(0)
    assert isinstance(first, Reply) and one.events == 1
    again = one.train(0)
    assert isinstance(again, Reply) and again.fields.get("repeated") and one.events == 1
    refused = one.train(0, attempt=1, shift=0.1)
    assert isinstance(refused, Failure) and "another one with the same noise would undo it" in refused.reason
    refused = one.train(0, attempt=1, shift=0.1)  # though it was trained and kept
    assert isinstance(refused, Failure) and "would undo it" in refused.reason
    back = one.train(0, attempt=2)
    assert isinstance(back, Reply) and all(torch.equal(back.tensors[n], first.tensors[n]) for n in first.tensors)
    assert isinstance(one.train(1, shift=0.1), Reply) and one.events == 1
    beyond = one.train(2)
    assert isinstance(beyond, Failure) and "step 6 is beyond the 6 steps" in beyond.reason


def test_a_round_without_the_silo_is_covered(tiny: Tiny, tmp_path: Path) -> None:
    """Round 1 alone: its rows are those of steps 3 to 5, and the whole run is paid for."""
    one = OneSilo(tiny, tmp_path, tiny.recipe(*CYCLE))
    assert isinstance(one.train(1), Reply) and one.events == 1


def test_what_the_record_does_not_show_does_not_leave(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = OneSilo(tiny, tmp_path, tiny.recipe(*CYCLE))
    assert isinstance(one.train(0), Reply)
    with monkeypatch.context() as patched:
        patched.setattr(private, "secret_of", lambda *_: bytes(32))
        refused = one.train(1)
    assert isinstance(refused, Failure) and "the key of the silo's noise is another one" in refused.reason
    for file in (tmp_path / "site1" / "run").glob(cycled.FILE + "*"):
        file.unlink()
    refused = one.train(1)
    assert isinstance(refused, Failure) and "what has left in it is not known any more" in refused.reason


def test_a_run_keeps_its_plan(tmp_path: Path) -> None:
    few, many = (plan("example", rows, 4, 6, 8.0, 1e-3) for rows in (18, 19))
    with Chain(tmp_path / "cycle") as chain:
        cycled.begin(chain, few, "key", charged=False)
        cycled.begin(chain, few, "key", charged=True)
        with pytest.raises(PrivacyError, match="sized for other rows, users or steps"):
            cycled.begin(chain, many, "key", charged=True)


def test_too_many_bands_for_a_silos_rows_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    one = OneSilo(tiny, tmp_path, tiny.recipe(*CYCLE, "privacy.bands=6", "training.steps=20"))
    refused = one.train(0)
    assert isinstance(refused, Failure) and "takes part every" in refused.reason and "privacy.bands" in refused.reason


def test_users_in_cyclic_order(tiny: Tiny, tmp_path: Path) -> None:
    by_user = ("federation.algorithm={name: fedavg, weights: equal}", "privacy.unit=user", "privacy.user='{prompt:.4}'")
    run(tiny, tmp_path / "run", *CYCLE, *by_user, ALIKE)
    for ledger in (tmp_path / "run" / "silos").rglob(LEDGER):
        budget, spent = read_spent(ledger)
        assert budget.unit == "user" and next(iter(budget.units.values())) < 30 and 7.99 < spent.epsilon <= 8


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (("privacy.mechanism=dp-sgd", "privacy.bands=3"), "has no effect without `privacy.mechanism: dp-ftrl`"),
        (("privacy.bands=0",), "greater than 0"),
        (("privacy.unit=silo", "federation.algorithm.weights=equal"), "has no effect with `privacy.unit: silo`"),
        (("training.order=sequential",), "order"),
        (("federation.algorithm.name=scaffold",), "'example' not with 'scaffold'"),
    ],
)
def test_what_cannot_be_is_said_at_load(tiny: Tiny, changes: tuple[str, ...], wanted: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny.recipe(*CYCLE, *changes)
    assert wanted in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rolora", "flora", "fedex-lora", "lora-xs", "fedprox"])
def test_methods_that_train_other_parts_each_round(tiny: Tiny, tmp_path: Path, algorithm: str) -> None:
    """Or that reshape them: a number has its noise by name and place, whatever else a round trains."""
    method = ALGORITHMS[algorithm]
    recipe = tiny.recipe(
        *CYCLE,
        ALIKE,
        f"federation.algorithm={{name: {algorithm}}}",
        f"adapter.kind={method.adapters[0]}",
        f"federation.rounds={max(2, method.min_rounds)}",
    )
    assert run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run").status == "finished"
