"""Kills processes that charge a ledger, again and again: imports once and forks each of them.

    python ledger_driver.py FOLDER KILLS

Each child opens the ledger and charges one event after the other; when `charge` has returned it writes the event's
number and receipt into a pipe, as a release would follow. SIGKILL comes at a random moment, or in the middle of
writing a line. Prints a JSON list of what every child had released, [number, index, digest] each.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import dp_accounting  # noqa: F401  once, before the forks

from fedlm.privacy import chain
from fedlm.privacy.ledger import Budget, Event, Ledger
from fedlm.privacy.mechanisms import Gaussian

BUDGET = Budget("silo", "zero-out", 50.0, 0.01, {"a": 1, "b": 1, "c": 1})


def event(number: int) -> Event:
    content = hashlib.sha256(str(number).encode()).hexdigest()
    return Event("run", number, 0, None, Gaussian("silo", "zero-out", 100.0), content)


def child(path: Path, pipe: int, first: int, tear: int | None) -> None:
    """Charge until killed. `tear`: die by one's own hand in the middle of this child's so-manieth line."""
    if tear is not None:
        whole, lines = chain._write, 0

        def torn(descriptor: int, data: bytes) -> None:
            nonlocal lines
            lines += 1
            if lines == tear:
                whole(descriptor, data[: random.randrange(len(data))])
                os.kill(os.getpid(), signal.SIGKILL)
            whole(descriptor, data)

        chain._write = torn
    with Ledger(path, BUDGET) as ledger:
        for number in range(first, first + 10_000):
            receipt = ledger.charge(event(number))
            os.write(pipe, json.dumps([number, receipt.index, receipt.digest]).encode() + b"\n")


def main() -> None:
    path, kills = Path(sys.argv[1]) / "ledger.jsonl", int(sys.argv[2])
    random.seed(5)
    released = []
    for attempt in range(kills):
        reading, writing = os.pipe()
        # Odd: torn in the ledger (every second write of a charge) or in the file beside it.
        tear = random.randrange(3, 16) if attempt % 2 else None
        pid = os.fork()
        if not pid:
            try:
                child(path, writing, attempt * 10_000, tear)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            # A time alone would hit nothing but the start where the machine is busy: so many releases, then a moment.
            seen = [pipe.readline() for _ in range(0 if tear else random.randrange(8))]
            if tear is None:
                time.sleep(random.uniform(0, 0.02))
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                raise SystemExit(f"a child ended by itself, with {status}")
            released.append([json.loads(line) for line in [*seen, *pipe.read().splitlines()]])
    print(json.dumps(released))


if __name__ == "__main__":
    main()
