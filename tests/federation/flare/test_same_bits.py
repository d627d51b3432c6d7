"""The promise: one recipe ends in the same adapter simulated and over a network, bit for bit.

With the real model, AdamW, SCAFFOLD (silos keep private states), three rounds, sockets, mutual TLS, every party started
by the commands that people use, and one worker killed while it trains.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedlm.federation.engines.flare.demo import facts, parties, silos_of
from fedlm.federation.engines.flare.processes import Child
from fedlm.federation.engines.flare.rehearsal import make_network, wait_connected
from fedlm.models.processor import for_this_machine
from fedlm.recipe.load import dump_recipe, load_recipe
from fedlm.recipe.starters import read_template

pytestmark = pytest.mark.slow

CHANGES = [
    "name=same-bits",
    "data.partition.silos=3",
    "data.sources.0.max_rows=400",
    "federation.algorithm.name=scaffold",
    "federation.rounds=3",
    "training.steps=2",
    "training.max_length=96",
    "evaluation.max_examples=2",
    "evaluation.metrics=[loss]",
]


def fedlm(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "fedlm", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("same-bits") / "recipe.yaml"
    file.write_text(for_this_machine(read_template("news")))
    file.write_text(dump_recipe(load_recipe(file, CHANGES)))
    return file


@pytest.fixture(scope="module")
def local(recipe: Path) -> str:
    fedlm("run", str(recipe), "--run-dir", str(recipe.parent / "local"), "--no-report")
    return str(facts(recipe.parent / "local")["sha256"])


def worker_of(child: Child) -> psutil.Process:
    assert child.process is not None
    return next(
        process
        for process in psutil.Process(child.process.pid).children(recursive=True)
        if any("flare.worker" in word for word in process.cmdline())
    )


def rounds_done(run_dir: Path) -> int:
    file = run_dir / "rounds.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_over_a_network_with_a_worker_killed(recipe: Path, local: str) -> None:
    folder = recipe.parent
    data, policy = folder / "data.yaml", folder / "policy.yaml"
    data.write_text("share_of_recipe: true\n")
    policy.write_text("{}\n")
    silos = silos_of(load_recipe(recipe), folder)
    kits = make_network(folder / "kits", silos)
    with parties(kits, {name: [] for name in kits}, data, policy, folder) as running:
        wait_connected(kits["coordinator"], silos, workers=True)
        command = ["run", str(recipe), "--network", str(kits["coordinator"].path), "--no-report"]
        with subprocess.Popen(
            [sys.executable, "-m", "fedlm", *command, "--run-dir", str(folder / "network")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as run:
            while rounds_done(folder / "network") < 2 and run.poll() is None:  # the start and round 1
                time.sleep(0.1)
            time.sleep(1.5)
            victim = worker_of(running[silos[1]])
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
            output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert facts(folder / "network")["sha256"] == local
    lines = [json.loads(line) for line in (folder / "network" / "rounds.jsonl").read_text().splitlines()]
    assert [line["failures"] for line in lines] == [[]] * 4  # asked again, so nobody was missed
    log = (folder / f"{silos[1]}.log").read_text()
    assert "the worker ended (killed by SIGKILL)" in log, log
