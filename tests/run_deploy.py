"""Follow docs/deploy.md literally: every ```bash block in order, in the folder of the party that its first line names.

    python tests/run_deploy.py [--list] [--wrap 'ip netns exec {party}'] [--host NAME]

Comments in the page say what a reader does between blocks: `<!-- carry: FROM TO FILE -->` sends a file,
`<!-- stays running -->` leaves the next command running. Blocks marked no-ci, and those for every host (installing),
are listed and not run. Host name and ports are replaced by ones that are free here; nothing else is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "deploy.md"
PARTIES = ("coordinator", "hospital-a", "hospital-b")
PATIENCE = 180.0
"""Seconds until a command that stays running must have done what the next block builds on."""


@dataclass(frozen=True)
class Step:
    """A block to run (`party` is '' for every host), or a file to carry."""

    line: int
    party: str = ""
    text: str = ""
    stays: bool = False
    run: bool = True
    carry: tuple[str, str, str] | None = None


def steps(markdown: str) -> list[Step]:
    """What the page asks for, in order.

    Raises:
        ValueError: a block whose first line names no party, or a comment that is not understood.
    """
    found: list[Step] = []
    stays = False
    for match in re.finditer(r"^```bash([^\n]*)\n(.*?)^```$|^<!-- (.*?) -->$", markdown, re.MULTILINE | re.DOTALL):
        line = markdown.count("\n", 0, match.start()) + 1
        if (note := match[3]) is not None:
            if note == "stays running":
                stays = True
            elif carried := re.fullmatch(r"carry: (\S+) (\S+) (\S+)", note):
                found.append(Step(line, carry=(carried[1], carried[2], carried[3])))
            elif not note.startswith("measured:"):
                raise ValueError(f"line {line}: <!-- {note} --> is not understood")
            continue
        first = match[2].splitlines()[0]
        named = re.fullmatch(r"# (?:on the (coordinator)'s host|at (\S+)|(on every host))", first)
        if named is None:
            raise ValueError(f"line {line}: the first line must say where the block is typed, not '{first}'")
        party = named[1] or named[2] or ""
        found.append(Step(line, party, match[2], stays, run=bool(party) and match[1].strip() != "no-ci"))
        stays = False
    return found


@dataclass
class Rehearsal:
    """Folders of the parties, and what is left running."""

    root: Path
    changes: dict[str, str]
    wrap: str = ""
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, party: str, text: str) -> list[str]:
        for old, new in self.changes.items():
            text = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w])", new, text)
        return [*self.wrap.format(party=party).split(), "bash", "-euo", "pipefail", "-c", text]

    def do(self, step: Step) -> None:
        """Raises RuntimeError: the block fails, or does not come up."""
        folder = self.root / step.party
        if step.carry is not None:
            source, target, name = step.carry
            print(f"---- {name}: {source} -> {target}", flush=True)
            shutil.copy2(self.root / source / name, self.root / target / name)
            return
        print(f"---- line {step.line}, {step.party or 'every host'}{'' if step.run else ', NOT RUN'}", flush=True)
        print(step.text.rstrip(), flush=True)
        if not step.run:
            return
        if step.stays:
            command = self.command(step.party, step.text.replace("\nfedlm ", "\nexec fedlm "))
            self.running.append(subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, start_new_session=True))
            self.await_ready(step.party, self.running[-1])
            return
        started = time.monotonic()
        done = subprocess.run(self.command(step.party, step.text), cwd=folder, stdin=subprocess.DEVNULL)
        print(f"---- line {step.line}: exit {done.returncode} after {time.monotonic() - started:.0f} s", flush=True)
        if done.returncode:
            raise RuntimeError(f"docs/deploy.md, line {step.line}: exit {done.returncode}")

    def await_ready(self, party: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for what a reader would see: the relay answers; at a silo, coordinator and worker are there."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f"{party}: ended with {process.returncode}")
            asked = subprocess.run(
                self.command(party, f"fedlm network status {party} --json"), cwd=self.root / party, capture_output=True
            )
            if asked.returncode == 0:
                answer = json.loads(asked.stdout)
                if party == "coordinator" or (answer["connected"] and answer["worker"]):
                    return
            time.sleep(1.0)
        raise RuntimeError(f"{party}: not ready after {PATIENCE:.0f} s")

    def stop(self) -> None:
        """End what runs, in reverse order. Raises RuntimeError: something does not end well."""
        bad = []
        for process in reversed(self.running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(60.0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
            if code:
                bad.append(code)
        if bad:
            raise RuntimeError(f"what stayed running ended with {bad}")


def free_ports(number: int) -> Iterator[int]:
    """Ports that nobody listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
            yield int(one.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description="Follow docs/deploy.md literally.")
    parser.add_argument("--list", action="store_true", help="show the steps, run nothing")
    parser.add_argument("--wrap", default="", help="put before every command, {party} replaced")
    parser.add_argument("--host", default="localhost", help="the coordinator's host name")
    options = parser.parse_args()
    found = steps(PAGE.read_text(encoding="utf-8"))
    if options.list:
        for step in found:
            what = f"carry {' '.join(step.carry)}" if step.carry else step.text.splitlines()[-1]
            mark = " (stays running)" if step.stays else "" if step.run else " (not run)"
            print(f"{step.line:>4} {step.party or '-':<12} {what}{mark}")
        return 0
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ports = dict(zip(("8002", "9464", "9465"), map(str, free_ports(3)), strict=True))
    with tempfile.TemporaryDirectory(prefix="fedlm-deploy-") as name:
        rehearsal = Rehearsal(Path(name), {"fl.example.org": options.host, **ports}, options.wrap)
        for party in PARTIES:
            (rehearsal.root / party).mkdir()
        try:
            for step in found:
                rehearsal.do(step)
        finally:
            rehearsal.stop()
    print("docs/deploy.md: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
