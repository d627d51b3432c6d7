"""A silo's worker that sends every request's tensors back: measures the wire alone.

With several kits it serves as many silos from one process.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from fedlm.federation.engines.flare.kit import socket_path
from fedlm.federation.engines.flare.worker import serve
from fedlm.messages import Observe, Reply, Request


def echo(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply:  # noqa: ARG001
    return Reply(request.silo, request.verb, request.run, request.round, request.attempt, request.tensors, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kits", type=Path, nargs="+", required=True)
    threads = [
        threading.Thread(target=serve, args=[socket_path(kit), echo, {}], daemon=True)
        for kit in parser.parse_args().kits
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
