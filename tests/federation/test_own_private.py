"""A budget of differential privacy between organisations: noise of each silo's own key, and what its owner allows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from fedlm.errors import RunError
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, using
from fedlm.federation.silo import own
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.secret import FILE
from fedlm.messages import Tensors
from fedlm.models.fingerprint import fingerprint
from fedlm.privacy.ledger import read_spent
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.mixed import adapter
from tests.federation.own_silos import Network, sharing_owner

BUDGET = (
    "federation.algorithm.name=fedavg",
    "federation.rounds=1",
    "training.clip_norm=null",
    "data.split={validation: 0, test: 0}",
    "privacy={unit: example, epsilon: 3, delta: 1e-3}",
)


@pytest.fixture
def owner(tiny: Tiny, tmp_path: Path) -> Callable[..., OwnSilo]:
    def make(name: str, policy: str = "") -> OwnSilo:
        return sharing_owner(name, tiny.base, tiny.recipe().model.source, tmp_path / f"states-{name}", policy)

    return make


def run(recipe: Recipe, silos: dict[str, OwnSilo], folder: Path) -> Tensors:
    with using(new_run(recipe, folder)) as directory:
        coordinator.run(recipe, Network(recipe, silos, fingerprint(recipe.model)), directory)
    tensors: Tensors = adapter(folder)
    return tensors


def test_every_silo_has_a_key_and_a_ledger_of_its_own(
    tiny: Tiny, owner: Callable[..., OwnSilo], tmp_path: Path
) -> None:
    recipe = tiny.recipe(*BUDGET)
    silos = {name: owner(name) for name in ("site0", "site1", "site2", "site3")}
    first = run(recipe, silos, tmp_path / "first")
    again = run(recipe, silos, tmp_path / "again")
    # Nobody who knows the seed knows the noise.
    assert any(not torch.equal(first[name], again[name]) for name in first)
    keys = [(tmp_path / f"states-{name}" / name / FILE) for name in silos]
    assert len({key.read_bytes() for key in keys}) == 4 and all(key.stat().st_mode & 0o077 == 0 for key in keys)
    for name in silos:
        ledgers = list((tmp_path / f"states-{name}").rglob("ledger.jsonl"))
        assert len(ledgers) == 2
        assert all(2.9 < read_spent(ledger)[1].epsilon <= 3 for ledger in ledgers)


def test_an_owner_limits_what_a_month_may_cost(
    tiny: Tiny, owner: Callable[..., OwnSilo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(*BUDGET)
    silos = {name: owner(name) for name in ("site0", "site1", "site2")}
    silos["site3"] = owner("site3", "privacy: {max_epsilon: 5, per: month}\n")
    monkeypatch.setattr(own, "now", lambda: datetime(2030, 1, 31, 12, tzinfo=UTC))
    run(recipe, silos, tmp_path / "first")
    with pytest.raises(RunError, match=r"may spend 3 of it, and this one another 3"):
        run(recipe, silos, tmp_path / "second")
    monkeypatch.setattr(own, "now", lambda: datetime(2030, 2, 1, 12, tzinfo=UTC))
    run(recipe, silos, tmp_path / "third")


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("max_epsilon: 5", r"privacy.max_epsilon\), and the recipe does not bound it"),
        (
            "unit: silo",
            r"privacy.unit: silo\), and the recipe leaves noise to the coordinator.*it needs .* guard 'mask'",
        ),
    ],
)
def test_noise_of_the_coordinators_is_no_matter_of_a_silos_policy(
    tiny: Tiny, owner: Callable[..., OwnSilo], tmp_path: Path, rule: str, told: str
) -> None:
    recipe = tiny.recipe(
        "federation.algorithm={name: fedavg, weights: equal}", "privacy={unit: silo, epsilon: 3, delta: 0.01}"
    )
    silos = {name: owner(name) for name in ("site0", "site1", "site2")}
    silos["site3"] = owner("site3", f"privacy: {{{rule}}}\n")
    with pytest.raises(RunError, match=told):
        run(recipe, silos, tmp_path / "run")
