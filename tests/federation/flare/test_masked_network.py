"""Masks and a budget over a network: keys signed by the kits' certificates, every party a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fedlm.federation.engines.flare.demo import facts, parties, silos_of
from fedlm.federation.engines.flare.rehearsal import make_network, wait_connected
from fedlm.models.processor import for_this_machine
from fedlm.privacy.ledger import read_spent
from fedlm.recipe.load import dump_recipe, load_recipe
from fedlm.recipe.starters import read_template

pytestmark = pytest.mark.slow

CHANGES = [
    "data.partition.silos=4",
    "data.sources.0.max_rows=300",
    "federation.algorithm={name: fedavg, weights: equal}",
    "federation.rounds=1",
    "training.steps=1",
    "training.max_length=96",
    "evaluation.max_examples=2",
    "evaluation.metrics=[loss]",
    "guards=[{name: mask, coordinator: malicious}]",
]
BUDGET = "privacy={unit: silo, epsilon: 10, delta: 0.05, clip: 0.1, adaptive: {}}"


def fedlm(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "fedlm", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recipe(folder: Path, name: str, *changes: str) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(for_this_machine(read_template("news")))
    file.write_text(dump_recipe(load_recipe(file, [f"name={name}", *CHANGES, *changes])))
    return file


def test_masks_give_the_bits_of_a_simulation_and_silos_pay_for_noise_of_their_own(tmp_path: Path) -> None:
    masked, noised = recipe(tmp_path, "masked"), recipe(tmp_path, "noised", BUDGET)
    fedlm("run", str(masked), "--run-dir", str(tmp_path / "local"), "--no-report")
    data, policy = tmp_path / "data.yaml", tmp_path / "policy.yaml"
    data.write_text("share_of_recipe: true\n")
    policy.write_text("min_cohort: 3\nprivacy: {require_masks: true}\n")
    silos = silos_of(load_recipe(masked), tmp_path)
    kits = make_network(tmp_path / "kits", silos)
    with parties(kits, {name: [] for name in kits}, data, policy, tmp_path):
        wait_connected(kits["coordinator"], silos, workers=True)
        for file in (masked, noised):
            where = ["--network", str(kits["coordinator"].path), "--run-dir", str(tmp_path / file.stem)]
            fedlm("run", str(file), *where, "--no-report")
    # Whoever signed the keys, and whatever the masks, the sum is the same.
    assert facts(tmp_path / "masked")["sha256"] == facts(tmp_path / "local")["sha256"]
    (line,) = [json.loads(text) for text in (tmp_path / "noised" / "rounds.jsonl").read_text().splitlines()][1:]
    assert sorted(line["replied"]) == sorted(silos) and 0 < line["epsilon"] <= 10 and line["loss"] is None
    assert line["clip"] == 0.1 and math.isfinite(line["within_clip"])
    for name in silos:
        (ledger,) = (kits[name].state / name).rglob("ledger.jsonl")
        assert read_spent(ledger)[1].epsilon == pytest.approx(line["epsilon"], rel=1e-9)
    told = json.loads(fedlm("audit", str(tmp_path / "noised"), "--json"))
    assert told["guarantee"]["spent"] == {"every silo": line["epsilon"]}  # ledgers lie at the silos
