"""Bench h: what the wire adds to a round of real training.

    python benchmarks/network_overhead.py [--rounds 3]

SmolLM2-135M, LoRA r=16, the demo's news in three silos, each party started by the commands that people use, with mutual
TLS on loopback. Of each round: the longest training time that a silo reports, the time from sending the model until the
last update has been folded, and the difference (goal <= 10 % of the training time). On two cores three silos share the
processors, so a part of the difference is waiting for a core. Printed too: peak memory of every process.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import psutil

from fedlm.federation.api import run_recipe
from fedlm.federation.engines.flare.demo import parties, silos_of
from fedlm.federation.engines.flare.rehearsal import make_network, wait_connected
from fedlm.messages import Event
from fedlm.recipe.load import load_recipe
from fedlm.recipe.starters import read_template

MIB = 2**20


def peaks() -> dict[str, float]:
    """Largest peak of resident memory (MiB) by kind of process, of this process and all below it."""
    found: dict[str, float] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError, StopIteration):
            words = " ".join(process.cmdline())
            kind = next(
                name
                for name, word in (
                    ("coordinator's relay", "server_train"),
                    ("silo's relay", "client_train"),
                    ("silo's worker", "flare.worker"),
                    ("supervisor", " fedlm "),
                    ("run", "network_overhead"),
                )
                if word in words
            )
            text = Path(f"/proc/{process.pid}/status").read_text()
            peak = next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmHWM"))
            found[kind] = max(found.get(kind, 0.0), peak)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    started: dict[int, float] = {}
    ended: dict[int, float] = {}
    training: dict[int, list[float]] = {}

    def observe(event: Event) -> None:
        if event["kind"] == "round_started":
            started[event["round"]] = time.perf_counter()
        elif event["kind"] == "silo_done" and event["verb"] == "train":
            ended[event["round"]] = time.perf_counter()
            training.setdefault(event["round"], []).append(event["seconds"])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "recipe.yaml"
        file.write_text(read_template("news"))
        recipe = load_recipe(file, ["data.partition.silos=3", "adapter.rank=16", f"federation.rounds={rounds}"])
        (folder / "data.yaml").write_text("share_of_recipe: true\n")
        (folder / "policy.yaml").write_text("{}\n")
        silos = silos_of(recipe, folder)
        kits = make_network(folder / "kits", silos)
        with parties(kits, {n: [] for n in kits}, folder / "data.yaml", folder / "policy.yaml", folder):
            wait_connected(kits["coordinator"], silos, workers=True)
            run_recipe(recipe, base=folder, run_dir=folder / "run", network=kits["coordinator"].path, observe=observe)
            memory = peaks()
    total = 0.0
    for number, longest in sorted((n, max(times)) for n, times in training.items()):
        whole = ended[number] - started[number]
        total += (whole - longest) / longest
        print(f"round {number}: training {longest:.1f} s, to the last update {whole:.1f} s: +{whole - longest:.2f} s")
    print(f"overhead {100 * total / len(training):.1f} % of the training time (goal <= 10 %)")
    for kind, peak in sorted(memory.items()):
        print(f"peak memory, {kind}: {peak:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
