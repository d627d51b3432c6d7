"""Chaos: does a federation over a network end in the right model, whatever dies on the way?

    python benchmarks/network_chaos.py [--seeds 0 1 2 ...] [--loss 0.3]

One run per seed: a coordinator and three silos with mutual TLS on loopback, SCAFFOLD (silos keep private states) with
AdamW on a small random model, started with the same commands that a service manager would use. While it runs, `kill -9`
hits at random moments: a silo's worker, a silo's connection, a silo's supervisor (its whole site), the coordinator's
connection, its supervisor, and the process that runs the rounds; connections are cut for seconds; workers are stopped
for a while; and a share of all answers to the coordinator is lost. What a service manager would start again is started
again.

Even seeds wait for every silo in every round; odd ones have a deadline and a quorum, so rounds go on without silos.
Afterwards the run is replayed on the local engine with, in each round, exactly the silos that `rounds.jsonl` names. The
adapters must be equal bit for bit: an update that was lost, counted twice or computed from a wrong state would show.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedlm.federation import coordinator
from fedlm.federation.api import new_run
from fedlm.federation.engines.flare.kit import Kit
from fedlm.federation.engines.flare.rehearsal import make_network
from fedlm.federation.engines.local import LocalEngine
from fedlm.messages import Failure, FailureKind, Reply, Request
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from many_silos import tiny_model

PARTS = Path(__file__).parent / "parts"
FEDLM = [sys.executable, "-m", "fedlm"]
SILOS = ("north", "south", "west")
ROUNDS = 6
FAULTS = 16
"""Per run. Without a bound a run is as long as its luck: a site needs some ten seconds to come back on two cores."""

LONGEST = 420.0
"""Seconds after which a run counts as not finished."""

RECIPE = """
name: chaos
task: pretrain
model: {{source: {model}, dtype: float32}}
adapter: {{rank: 4}}
data:
  sources: [{{path: rows.jsonl, columns: {{text: text}}}}]
  partition: {{kind: natural, by: silo}}
  split: {{validation: 0.1, test: 0.1}}
training: {{steps: {steps}, batch_size: 8, max_length: 64, optimizer: adamw, lr: 0.002}}
federation:
  rounds: {rounds}
  algorithm: {{name: scaffold}}
  retries: 10
  {mode}
"""
PATIENT = "{quorum: 1.0, reconnect: 120}"
HASTY = "{quorum: 0.3, reconnect: 5, deadline: 20}"


class Cable:
    """The connection of one silo: passes bytes between it and the coordinator, until it is cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self.whole = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        self.whole = False
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        threading.Timer(seconds, self._mend).start()

    def _mend(self) -> None:
        self.whole = True

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                if not self.whole:
                    raise OSError
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=[source, sink], daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open -= {source, sink}
        source.close()


@dataclass
class Service:
    """A command that is started again whenever it ends, as by a service manager."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        self.starts += 1

    def keep(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            self.start()

    def child(self, word: str) -> psutil.Process | None:
        """The process below this one whose command line holds `word`."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid if self.process else 0).children(recursive=True):
                if any(word in part for part in process.cmdline()):
                    return process
        return None

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


class Chaos:
    """One run with faults."""

    def __init__(self, folder: Path, seed: int, loss: float, steps: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        write_rows(folder / "rows.jsonl")
        tiny_model(folder / "model")
        mode = (PATIENT if seed % 2 == 0 else HASTY).strip("{}").replace(", ", "\n  ")
        text = RECIPE.format(model=folder / "model", rounds=ROUNDS, steps=steps, mode=mode)
        (folder / "recipe.yaml").write_text(text)
        (folder / "data.yaml").write_text(f"share_of_recipe: true\nbase: {folder}\n")
        (folder / "policy.yaml").write_text(f"models:\n  {folder / 'model'}: {folder / 'model'}\n")
        kits = make_network(folder / "kits", SILOS)
        self.cables = {name: self._cable(kits[name]) for name in SILOS}
        lossy = {"PYTHONPATH": str(PARTS / "lossy"), "FEDLM_LOSS": str(loss)}
        hub = kits["coordinator"].path
        self.hub = Service("coordinator", [*FEDLM, "coordinator", "start", str(hub)], folder / "hub.log", lossy)
        own = ["--data", str(folder / "data.yaml"), "--policy", str(folder / "policy.yaml")]
        self.sites = {
            name: Service(name, [*FEDLM, "silo", "start", str(kits[name].path), *own], folder / f"{name}.log")
            for name in SILOS
        }
        command = [*FEDLM, "run", str(folder / "recipe.yaml"), "--network", str(hub), "--or-resume", "--no-report"]
        self.run = Service("run", [*command, "--run-dir", str(folder / "run")], folder / "run.log")
        self.faults: dict[str, int] = {}

    def _cable(self, kit: Kit) -> Cable:
        cable = Cable(kit.port)
        file = kit.startup / "fed_client.json"
        client = json.loads(file.read_text())
        client["servers"][0]["service"]["target"] = f"localhost:{cable.port}"
        file.write_text(json.dumps(client))
        return cable

    def go(self) -> bool:
        """Whether the run finished in time."""
        services = [self.hub, *self.sites.values()]
        for service in [*services, self.run]:
            service.start()
        started = time.monotonic()
        next_fault = started + 12.0  # the first after everybody has been greeted, more or less
        try:
            while time.monotonic() - started < LONGEST:
                for service in services:
                    service.keep()
                assert self.run.process is not None
                code = self.run.process.poll()
                if code == 0:
                    return True
                if code is not None:
                    time.sleep(1.0)
                    self.run.start()
                if time.monotonic() > next_fault and sum(self.faults.values()) < FAULTS:
                    self.strike()
                    next_fault = time.monotonic() + self.draw.uniform(2.0, 10.0)
                time.sleep(0.1)
            return False
        finally:
            for service in [self.run, *services]:
                service.end()

    def strike(self) -> None:
        """One fault, at random."""
        silo = self.draw.choice(SILOS)
        site = self.sites[silo]
        fault = self.draw.choice(
            ["worker", "worker", "silo's connection", "site", "hub's connection", "hub", "run", "cut", "stop"]
        )
        if fault == "cut":
            self.cables[silo].cut(self.draw.uniform(1.0, 8.0))
        elif fault == "stop":
            if (process := site.child("flare.worker")) is not None:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
                    threading.Timer(self.draw.uniform(1.0, 4.0), _resume, [process]).start()
        else:
            victims = {
                "worker": site.child("flare.worker"),
                "silo's connection": site.child("client_train"),
                "site": psutil.Process(site.process.pid) if site.process else None,
                "hub's connection": self.hub.child("server_train"),
                "hub": psutil.Process(self.hub.process.pid) if self.hub.process else None,
                "run": psutil.Process(self.run.process.pid) if self.run.process else None,
            }
            process = victims[fault]
            if process is None:
                return
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.faults[fault] = self.faults.get(fault, 0) + 1


def _resume(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.resume()


class Rejoined(Exception):
    """From this round on the recorded run had more silos: it was resumed, and greeted those that were missing."""


class Replay:
    """The local engine with, in each round, only the silos that took part in the run to be replayed: in the greeting
    (their number weighs in SCAFFOLD's step), in training, and in validation (which decides the best round)."""

    def __init__(self, engine: LocalEngine, run_dir: Path) -> None:
        self._engine = engine
        lines = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
        self._replied = {line["round"]: set(line["replied"]) for line in lines}
        self._missed = {
            line["round"]: {failure["silo"] for failure in (line["validation"] or {}).get("failures", [])}
            for line in lines
        }
        self._sampled = {line["round"]: set(line["sampled"]) for line in lines}
        self._greeted: set[str] = set()
        self.next_round = 0

    def silos(self) -> Sequence[str]:
        return self._engine.silos()

    def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:  # noqa: ARG002
        for request in requests:
            if request.verb == "hello":
                absent = request.silo not in self._sampled[self.next_round]
                self._greeted |= set() if absent else {request.silo}
            elif request.verb == "train":
                if self._sampled[request.round] - self._greeted:
                    self.next_round = request.round
                    raise Rejoined
                absent = request.silo not in self._replied[request.round]
            else:
                absent = request.fields["role"] == "validation" and request.silo in self._missed[request.round]
            if absent:
                yield Failure(request.silo, FailureKind.UNREACHABLE, "not in the run that is replayed")
            else:
                yield from self._engine.exchange([request])

    def close(self) -> None:
        self._engine.close()


def replay(folder: Path, recipe: Recipe) -> None:
    """The same run, without faults, into folder/replay."""
    from fedlm.data.federated import load_data

    data = load_data(recipe, folder)
    directory = new_run(recipe, folder / "replay", base=folder)
    engine = Replay(LocalEngine(recipe, data, directory.path, workers=1, base=folder), folder / "run")
    try:
        for resume in itertools.chain([False], itertools.repeat(True)):
            with contextlib.suppress(Rejoined):
                coordinator.run(recipe, engine, directory, resume=resume)
                return
    finally:
        engine.close()
        directory.close()


def write_rows(file: Path) -> None:
    draw = random.Random(0)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "runs",
        "away",
        "from",
        "all",
        "of",
        "them",
    ]
    with file.open("w") as handle:
        for number in range(240):
            text = " ".join(draw.choices(words, k=12))
            handle.write(json.dumps({"text": f"{text} {number}", "silo": SILOS[number % 3]}) + "\n")


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def one(seed: int, loss: float, steps: int, keep: Path | None) -> bool:
    """Run a seed and print its line; whether it is right."""
    with contextlib.ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        else:
            folder = keep / f"seed-{seed}"
            folder.mkdir(parents=True)
        chaos = Chaos(folder, seed, loss, steps)
        started = time.monotonic()
        finished = chaos.go()
        seconds = time.monotonic() - started
        good = False
        missing = 0
        if finished:
            replay(folder, load_recipe(folder / "recipe.yaml"))
            good = digest(folder / "run") == digest(folder / "replay")
            for line in (folder / "run/rounds.jsonl").read_text().splitlines():
                record = json.loads(line)
                assert record["round"] < 0 or len(set(record["replied"])) == len(record["replied"])
                missing += len(record["sampled"]) - len(record["replied"])
        faults = ", ".join(f"{n} {name}" for name, n in sorted(chaos.faults.items()))
        verdict = "equal" if good else "DIFFERENT" if finished else "NOT FINISHED"
        mode = "waits for all" if seed % 2 == 0 else "quorum, deadline"
        print(
            f"| {seed} | {mode} | {seconds:.0f} s | {chaos.run.starts} | {missing} | {verdict} | {faults} |", flush=True
        )
        if not good and keep is None:
            for log in sorted(folder.glob("*.log")):
                print(
                    f"---- {log.name}", *log.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr
                )
        return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)))
    parser.add_argument("--loss", type=float, default=0.3, help="share of answers that are lost")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of a silo and round")
    parser.add_argument("--keep", type=Path, help="keep every run's folder here")
    options = parser.parse_args()
    print("| seed | mode | time | starts of the run | updates missing | adapter against replay | faults |")
    print("|---|---|---|---|---|---|---|", flush=True)
    right = [one(seed, options.loss, options.steps, options.keep) for seed in options.seeds]
    print(f"{sum(right)} of {len(right)} runs finished and equal their replay bit for bit")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
