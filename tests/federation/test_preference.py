"""Preference alignment through whole federations: figures, the reference, resumed runs, other engines, bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlm.federation.api import run_recipe
from tests.federation.preferences import Preferences


@pytest.fixture(scope="module")
def tiny_preferences(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Preferences:
    return Preferences(tmp_path_factory.mktemp("preferences"), tiny_model_dir)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_every_loss_learns_and_is_measured(loss: str, tiny_preferences: Preferences, tmp_path: Path) -> None:
    of = tiny_preferences
    result = run_recipe(
        of.recipe(
            f"preference.loss={loss}",
            "training={lr: 0.02, steps: 8, batch_size: 8, max_length: 96}",
            *(["preference.beta=2"] if loss == "orpo" else []),  # beside its likelihood 0.1 shows only after many steps
        ),
        base=of.base,
        run_dir=tmp_path / "run",
    )
    assert result.status == "finished"
    before, *_, after = lines(tmp_path / "run")
    first, last = before["validation"], after["validation"]
    assert last["loss"] < first["loss"] and last["reward_margin"] > first["reward_margin"]
    assert last["reward_accuracy"] > 0.8
    assert "perplexity" not in last and last["chosen_logp"] < 0
    if loss in ("dpo", "ipo", "kto"):  # the policy is the reference: no reward differs
        wanted = {"dpo": 0.6931472, "ipo": 25.0, "kto": 0.5}[loss]
        assert first["loss"] == pytest.approx(wanted, abs=1e-5)
        assert first["reward_accuracy"] == pytest.approx(0.5, abs=1e-6) and abs(first["reward_margin"]) < 1e-6
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 1e-4
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert told["final"]["reward_accuracy_interval"][0] > 0.5 and set(told["final"]["silos"]) == {"site0", "site1"}
