"""A whole network on this machine, each party with its own processes: for demonstrations, tests and measurements.

Everything is real (NVFlare's processes, sockets, mutual TLS); only the keys are made in one place.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.ask import status_of
from fedlm.federation.engines.flare.consortium import Consortium, Coordinator, Silo
from fedlm.federation.engines.flare.kit import Kit, read_kit
from fedlm.federation.engines.flare.processes import Child
from fedlm.federation.engines.flare.provision import new_network
from fedlm.federation.engines.flare.settings import write_settings
from fedlm.federation.engines.flare.start import relay

HOST = "localhost"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def make_network(folder: Path, silos: Sequence[str], *, host: str = HOST, port: int | None = None) -> dict[str, Kit]:
    """Kits with demo keys by party ('coordinator' and the silos' names) in a new folder.

    Raises:
        NetworkError: NVFlare refuses, or a name is not possible.
    """
    consortium = Consortium(
        name="rehearsal",
        coordinator=Coordinator(host=host, port=port or free_port(), org="coordinator"),
        silos=tuple(Silo(name=name, org=f"org_{number}") for number, name in enumerate(silos)),
    )
    kits = {path.name: read_kit(path) for path in new_network(consortium, folder.resolve(), demo=True)}
    for kit in kits.values():
        write_settings(kit)
    return kits


def wait_connected(coordinator: Kit, silos: Sequence[str], *, workers: bool, seconds: float = 120.0) -> None:
    """Wait until these silos are connected, and their workers too.

    Raises:
        NetworkError: not in time.
    """
    until = time.monotonic() + seconds
    missing = list(silos)
    while time.monotonic() < until:
        try:
            seen = status_of(coordinator)["silos"]
        except NetworkError:  # not up yet
            seen = {}
        missing = [name for name in silos if not _there(seen.get(name, {}), workers)]
        if not missing:
            return
        time.sleep(0.3)
    raise NetworkError(
        f"not connected after {seconds:.0f} s: {', '.join(missing)}", fix=f"look at the logs: {coordinator.logs}"
    )


def _there(silo: dict[str, Any], workers: bool) -> bool:
    return bool(silo.get("connected") and (silo.get("worker") or not workers))


class Rehearsal:
    """A network's processes; none outlives this object's process.

    Args:
        folder: where the kits go.
        silos: their names.
        worker: the process that answers for a silo, given its kit; None starts none.
    """

    def __init__(self, folder: Path, silos: Sequence[str], worker: Callable[[Kit], Child] | None = None) -> None:
        self.kits = make_network(folder, silos)
        self.silos = list(silos)
        self.children = {"coordinator": relay(self.kits["coordinator"])}
        for name in silos:
            self.children[name] = relay(self.kits[name])
            if worker is not None:
                self.children[f"{name} worker"] = worker(self.kits[name])

    @property
    def coordinator(self) -> Kit:
        return self.kits["coordinator"]

    def start(self, seconds: float = 120.0) -> None:
        """Start every process and wait until the network stands. Raises NetworkError when it does not in time."""
        for child in self.children.values():
            child.start()
        self.wait(seconds)

    def wait(self, seconds: float = 120.0) -> None:
        """Until every silo is connected, with its worker if it has one. Raises NetworkError when not in time."""
        wait_connected(self.coordinator, self.silos, workers=len(self.children) > len(self.kits), seconds=seconds)

    def stop(self) -> None:
        for child in reversed(self.children.values()):
            child.stop()

    def __enter__(self) -> Rehearsal:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
