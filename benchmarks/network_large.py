"""Bench f: large updates over the network: seconds, and the memory of every process.

    python benchmarks/network_large.py [--silos 8] [--megabytes 500] [--gigabytes-once 2 5]

Random fp32 tensors, echoed by every silo's worker and folded by FedAvg as they arrive, on loopback with mutual TLS.
Printed: the peak of the coordinator's process against one fp32 update (goal <= 2.5x; model, sum and one tensor at a
time), and how much the peak of each relay process and each worker grew over its idle size. A relay lives in NVFlare's
process, so that process's own buffers are in its figure; what the relay itself holds is one part (4 MiB) per silo under
way. The worker maps the request's file, so its figure holds file pages that the system can take back.
`--gigabytes-once` sends one update of that size to one silo and back, and compares every tensor.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place
from fedlm.federation.engines.flare.rehearsal import Rehearsal
from fedlm.federation.folding import Verdict, fold_in_order
from fedlm.messages import Reply, Request, Tensors
from network_wire import Wire, echo_worker, recipe

MIB = 2**20


def status(pid: int, name: str) -> int:
    """Bytes from /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def pids(network: Rehearsal) -> dict[str, int]:
    return {name: child.process.pid for name, child in network.children.items() if child.process is not None}


def tensors(megabytes: int, piece: int = 4) -> Tensors:
    return {f"layer.{i}": torch.randn(piece * 2**18) for i in range(megabytes // piece)}


def folded(silos: list[str], megabytes: int, folder: Path) -> None:
    with Rehearsal(folder / "kits", silos, echo_worker) as network:
        engine = Wire(recipe(), network.coordinator.path, "large", folder / "run")
        model = tensors(megabytes)
        update = sum(t.nbytes for t in model.values())
        before = {name: status(pid, "VmRSS") for name, pid in pids(network).items()}
        for pid in [os.getpid(), *pids(network).values()]:
            forget_peak(pid)
        start = status(os.getpid(), "VmRSS") - update
        algorithm = get_algorithm(recipe().federation.algorithm)
        accumulator = algorithm.accumulator(folder / "run" / "spool")
        began = time.perf_counter()
        answers = engine.exchange([Request(silo, "train", "large", 0, 0, model, {}) for silo in silos])
        spool = folder / "run" / "spool"
        result = fold_in_order(algorithm, accumulator, silos, answers, spool, lambda _: Verdict(1.0, Place()))
        seconds = time.perf_counter() - began
        peak = status(os.getpid(), "VmHWM")  # before the comparison below, which needs memory of its own
        assert result.replied == silos, result.failures
        for name, value in accumulator.mean():
            torch.testing.assert_close(value, model[name], rtol=1e-6, atol=1e-6)
        print(f"{megabytes} MB x {len(silos)} silos, there and back and folded: {seconds:.1f} s")
        print(
            f"coordinator's process: peak {peak / MIB:.0f} MiB = {peak / update:.2f}x one fp32 update (goal <= 2.5x); "
            f"of it {start / MIB:.0f} MiB interpreter and libraries"
        )
        for kind, wanted in (("relay at the coordinator", "hub"), ("relay at a silo", "silo"), ("worker", "worker")):
            grown = [
                status(pid, "VmHWM") - before[name]
                for name, pid in pids(network).items()
                if ("worker" if name.endswith("worker") else "hub" if name == "coordinator" else "silo") == wanted
            ]
            print(f"{kind}: grew by at most {max(grown) / MIB:.0f} MiB")
        anon = max(status(pid, "RssAnon") for name, pid in pids(network).items() if name.endswith("worker"))
        print(f"worker, memory of its own at the end: {anon / MIB:.0f} MiB (the rest is mapped files)")
        engine.close()


def once(gigabytes: int, folder: Path) -> None:
    with Rehearsal(folder / "kits", ["silo-0"], echo_worker) as network:
        engine = Wire(recipe(), network.coordinator.path, "large", folder / "run")
        sent = tensors(gigabytes * 1024, piece=64)
        before = {name: status(pid, "VmRSS") for name, pid in pids(network).items()}
        for pid in pids(network).values():
            forget_peak(pid)
        began = time.perf_counter()
        (answer,) = engine.exchange([Request("silo-0", "train", "large", 0, 0, sent, {})])
        seconds = time.perf_counter() - began
        assert isinstance(answer, Reply), answer
        equal = answer.tensors.keys() == sent.keys() and all(torch.equal(answer.tensors[n], sent[n]) for n in sent)
        grown = ", ".join(
            f"{name} +{(status(pid, 'VmHWM') - before[name]) / MIB:.0f} MiB" for name, pid in pids(network).items()
        )
        print(f"{gigabytes} GiB there and back: {seconds:.1f} s, every tensor equal: {equal}; {grown}")
        del answer
        engine.close()
        assert equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--gigabytes-once", type=int, nargs="*", default=[2])
    options = parser.parse_args()
    free = psutil.virtual_memory().available / 2**30
    print(f"{free:.0f} GiB of memory free")
    with tempfile.TemporaryDirectory() as name:
        folded([f"silo-{i}" for i in range(options.silos)], options.megabytes, Path(name))
    for size in options.gigabytes_once:
        with tempfile.TemporaryDirectory() as name:
            once(size, Path(name))


if __name__ == "__main__":
    sys.exit(main())
