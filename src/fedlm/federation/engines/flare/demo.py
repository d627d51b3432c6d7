"""A recipe on this machine twice: with simulated silos, and between organisations' processes with mutual TLS.

Shows what simulation promises: both end in the same adapter, bit for bit. Every process is started by the same command
that a real party would use. Where the system allows it each party has a network namespace of its own, so that nothing
but the one TCP port connects a silo to the coordinator.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.kit import Kit
from fedlm.federation.engines.flare.namespaces import Namespaces
from fedlm.federation.engines.flare.processes import Child
from fedlm.federation.engines.flare.rehearsal import HOST, make_network, wait_connected
from fedlm.recipe.schema import Recipe

Say = Callable[[str], None]
Command = Callable[[Sequence[str], Sequence[str]], None]
"""Runs `fedlm` with these words behind this prefix, and shows what it prints. Raises NetworkError when it fails."""


@dataclass(frozen=True)
class Comparison:
    """Two runs of one recipe."""

    local: dict[str, Any]
    network: dict[str, Any]
    """Of each run: sha256 of its adapter, seconds, bytes_up, bytes_down, rounds."""

    @property
    def same(self) -> bool:
        return bool(self.local["sha256"] == self.network["sha256"])


def rehearse(
    recipe: Path, silos: Sequence[str], models: Sequence[str], folder: Path, apart: bool, say: Say, command: Command
) -> Comparison:
    """Run a recipe locally, then over a network on this machine.

    Args:
        recipe: its file.
        silos: the names that its partition makes.
        models: base models that are local folders, which the silos' policy then allows.
        folder: where kits and runs go; what an earlier rehearsal left there is replaced.
        apart: put every party into a network namespace (needs root).

    Raises:
        NetworkError: a command fails, or the network does not stand.
    """
    for name in ("kits", "local", "network"):
        shutil.rmtree(folder / name, ignore_errors=True)
    say("simulated silos, on this machine alone")
    command(["run", str(recipe), "--run-dir", str(folder / "local")], [])
    data, policy = folder / "data.yaml", folder / "policy.yaml"
    data.write_text(f"share_of_recipe: true\nbase: {json.dumps(str(recipe.resolve().parent))}\n")
    policy.write_text(json.dumps({"models": {name: name for name in models}} if models else {}) + "\n")
    with contextlib.ExitStack() as stack:
        spaces = stack.enter_context(Namespaces(["coordinator", *silos])) if apart else None
        say(f"a coordinator and {len(silos)} silos as processes of their own, with mutual TLS" + _where(apart))
        kits = make_network(folder / "kits", silos, host=spaces.host if spaces else HOST)
        prefix = {name: spaces.prefix(name) if spaces else [] for name in kits}
        stack.enter_context(parties(kits, prefix, data, policy, folder))
        wait_connected(kits["coordinator"], silos, workers=True)
        command(
            ["run", str(recipe), "--network", str(kits["coordinator"].path), "--run-dir", str(folder / "network")],
            prefix["coordinator"],
        )
    return Comparison(facts(folder / "local"), facts(folder / "network"))


def _where(apart: bool) -> str:
    return ", each in a network namespace of its own" if apart else " over loopback"


@contextlib.contextmanager
def parties(
    kits: dict[str, Kit], prefix: dict[str, list[str]], data: Path, policy: Path, folder: Path
) -> Iterator[dict[str, Child]]:
    """`fedlm coordinator start` and `fedlm silo start`, until the end of the context."""
    children: dict[str, Child] = {}
    try:
        for name, kit in kits.items():
            words = [kit.kind, "start", str(kit.path)]
            words += ["--data", str(data), "--policy", str(policy)] if kit.kind == "silo" else []
            children[name] = Child(name, "fedlm", words, folder / f"{name}.log", prefix=prefix[name])
            children[name].start()
        yield children
    finally:
        for child in reversed(children.values()):
            child.stop()


def run_fedlm(words: Sequence[str], prefix: Sequence[str]) -> None:
    """The usual `Command`: on this terminal."""
    done = subprocess.run([*prefix, sys.executable, "-m", "fedlm", *words], check=False, env={**os.environ})
    if done.returncode:
        raise NetworkError(f"fedlm {words[0]} ended with code {done.returncode}", fix="its message is above")


def facts(run_dir: Path) -> dict[str, Any]:
    """What is compared of a run."""
    rounds = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    trained = [line for line in rounds if line["round"] >= 0]
    return {
        "sha256": hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "rounds": len(trained),
        "seconds": sum(line["seconds"] for line in trained),
        "bytes_up": sum(line["bytes_up"] for line in trained),
        "bytes_down": sum(line["bytes_down"] for line in trained),
    }


def silos_of(recipe: Recipe, base: Path) -> list[str]:
    """The silos that a recipe's partition makes. Raises FedlmError when its data cannot be read."""
    from fedlm.data.federated import load_data

    return list(load_data(recipe, base).names)
