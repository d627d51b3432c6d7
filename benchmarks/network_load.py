"""Bench g: many sites on one coordinator, for many rounds: is anything lost, does memory or the number of threads grow?

    python benchmarks/network_load.py [--silos 20] [--shared 50] [--rounds 20] [--megabytes 2] [--minutes 0]

First a network in which every site has a worker of its own, then one in which a single worker process serves all
sites (a test mode: each site still has its own NVFlare process and certificate). Each round sends tensors to every
site and back and compares them. Printed: seconds per round, answers lost (goal 0), and for each kind of process the
memory and threads after round 3, half-way and at the end (goal: flat over the second half, within 10 % or one and a
half payloads: each thread keeps buffers of its own, up to a payload each, from when it first carries one).
`--minutes 60 --megabytes 50 --silos 3 --shared 0` is the soak, some 4,000 rounds, which shows a leak of a thousandth of
a payload a round; in one minute, of a twentieth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from fedlm.federation.engines.flare.processes import Child
from fedlm.federation.engines.flare.rehearsal import Rehearsal
from network_wire import Wire, echo_worker, on_path, recipe, round_trip, tensors

MIB = 2**20


def sizes(network: Rehearsal) -> dict[str, tuple[float, int]]:
    """By kind of process: the largest resident memory (MiB) and number of threads."""
    found: dict[str, list[tuple[float, int]]] = {}
    for name, child in [("run", None), *network.children.items()]:
        pid = os.getpid() if child is None else child.process.pid if child.process else 0
        process = psutil.Process(pid)
        kind = (
            "run"
            if child is None
            else "worker"
            if "worker" in name
            else "coordinator's relay"
            if name == "coordinator"
            else "silo's relay"
        )
        found.setdefault(kind, []).append((process.memory_info().rss / MIB, process.num_threads()))
    return {kind: (max(m for m, _ in all_), max(t for _, t in all_)) for kind, all_ in found.items()}


def load(silos: list[str], shared: bool, options: argparse.Namespace, folder: Path) -> bool:
    network = Rehearsal(folder / "kits", silos, None if shared else echo_worker)
    if shared:
        kits = [str(network.kits[name].path) for name in silos]
        network.children["shared worker"] = Child("worker", "echo_worker", ["--kits", *kits], environment=on_path())
    began = time.monotonic()
    with network:
        print(f"{len(silos)} sites up after {time.monotonic() - began:.0f} s", flush=True)
        engine = Wire(recipe(), network.coordinator.path, "load", folder / "run")
        seconds: list[float] = []
        history: list[dict[str, tuple[float, int]]] = []
        until = time.monotonic() + 60 * options.minutes
        number = 0
        while number < options.rounds or time.monotonic() < until:
            # compares every value and fails on a missing or failed answer
            seconds.append(round_trip(engine, silos, tensors(options.megabytes), number))
            number += 1
            history.append(sizes(network))
            if number % 50 == 0:
                print(f"  round {number}: {seconds[-1]:.2f} s, {sizes(network)}", flush=True)
        engine.close()
    how = "one worker process for all" if shared else "a worker each"
    print(f"{len(silos)} sites, {how}: {number} rounds of {options.megabytes} MB there and back, nothing lost")
    print(f"  {statistics.median(seconds):.2f} s a round (median), {max(seconds):.2f} s at most")
    flat = True
    third, half, end = history[2], history[number // 2], history[-1]
    for kind, (memory, threads) in end.items():
        flat &= memory - half[kind][0] < max(0.1 * half[kind][0], 24, 1.5 * options.megabytes)
        print(
            f"  {kind}: {third[kind][0]:.0f} MiB after round 3, {half[kind][0]:.0f} half-way, {memory:.0f} at the end; "
            f"threads {third[kind][1]}, {half[kind][1]}, {threads}"
        )
    print(f"  flat: {flat}")
    return flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=20)
    parser.add_argument("--shared", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0.0, help="go on for this long")
    options = parser.parse_args()
    flat = True
    for count, shared in ((options.silos, False), (options.shared, True)):
        if count:
            with tempfile.TemporaryDirectory() as name:
                flat &= load([f"silo-{i:03d}" for i in range(count)], shared, options, Path(name))
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
