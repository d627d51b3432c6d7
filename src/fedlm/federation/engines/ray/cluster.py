"""Ray itself: start it on this machine or connect to a cluster, keep it quiet, and share out its CPUs and GPUs.

The one file that knows Ray's private details. Ray trusts everybody who reaches its ports, which it opens on all of a
machine's addresses: a Ray that is started here therefore demands a random token, and keeps its logs in a private
folder.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm.errors import FedlmError, MissingExtra
from fedlm.recipe.schema import FederationSpec

CONNECT_SECONDS = 5.0
_LONGEST_TMP = 24
"""Ray's sockets lie below its folder, and a socket's path has at most 107 bytes."""


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray.

    Attributes:
        ours: whether leaving it ends it, or at least this process's connection.
        folder: the files of a Ray that was started here.
    """

    ours: bool
    folder: Path | None = None

    def leave(self) -> None:
        """Disconnect; a Ray that was started here ends, with all its processes and files."""
        import ray

        if self.ours:
            with _own_signals():
                ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def join(address: str | None, log: Path) -> Cluster:
    """Start Ray on this machine (`address` None) or connect to a running one; one this process has already is used.

    Args:
        address: HOST:PORT of the cluster's head, or 'auto' for the one that this machine belongs to.
        log: what Ray has to say of its processes is appended to this file.

    Raises:
        MissingExtra: Ray is not installed.
        FedlmError: nothing answers at the address, or Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a call that comes after the end must not start a new Ray
    if address is not None:
        _check_address(address)
    ray = require()
    if ray.is_initialized():
        return Cluster(ours=False)
    _hush(log)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    folder: Path | None = None
    try:
        with _own_signals():
            if address is not None:
                ray.init(address=address, **common)
            else:
                folder = _private_folder()
                _demand_token()
                ray.init(
                    address="local",  # RAY_ADDRESS in the environment must not lead elsewhere
                    num_cpus=_cores(),
                    include_dashboard=False,
                    _temp_dir=str(folder / "r"),  # Ray opens its folder to everybody, so it lies in a private one
                    **common,
                )
    except BaseException as error:
        with contextlib.suppress(Exception):
            Cluster(ours=True, folder=folder).leave()
        if not isinstance(error, Exception):
            raise
        why = str(error).strip().splitlines()
        raise FedlmError(
            f"Ray cannot be {'started' if address is None else 'reached'}: {why[0] if why else type(error).__name__}",
            where=address,
            fix="check the address with `ray status`; Ray, Python and fedlm must be the same on all its machines"
            if address is not None
            else None,
        ) from error
    return Cluster(ours=True, folder=folder)


def require() -> Any:
    """The module `ray`. Raises MissingExtra where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("the Ray engine", "ray") from error
    return ray


@dataclass(frozen=True)
class Share:
    """How many workers there are, and what each asks of the cluster."""

    workers: int
    cpus: int
    gpus: float


def share_out(spec: FederationSpec, device: str, most: int, nodes: list[dict[str, float]]) -> Share:
    """Workers for a recipe on machines with these resources.

    `workers: auto` gives one per GPU, or where the model runs on CPUs one per group of `threads` cores. A number above
    that is kept: workers then share GPUs in equal fractions, and cores as the operating system deals them.

    Args:
        device: the recipe's `model.device`.
        most: never more workers than this.
        nodes: by machine, its "CPU" and "GPU".
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    groups = [int(node.get("CPU", 0) // spec.threads) for node in nodes]
    fitting = max(1, gpus if on_gpu else sum(groups))
    workers = max(1, min(fitting if spec.workers == "auto" else spec.workers, most))
    fraction, per_gpu = 0.0, 0
    if on_gpu and gpus:
        per_gpu = -(-workers // gpus)
        fraction = 1.0 if per_gpu == 1 else (10_000 // per_gpu) / 10_000  # Ray counts in ten-thousandths
        groups = [min(n, int(node.get("GPU", 0)) * per_gpu) for n, node in zip(groups, nodes, strict=True)]
    return Share(workers, spec.threads if workers <= sum(groups) else 0, fraction)


def nodes() -> list[dict[str, float]]:
    """The resources of every live machine of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_address(address: str) -> None:
    """Raises:
    FedlmError: the address is none, or nothing answers there (Ray itself would try for a minute).
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise FedlmError(
            f"'{address}' is no address of a Ray cluster",
            where="--address",
            fix="give HOST:PORT of its head node, or 'auto' on one of its machines",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise FedlmError(
            f"no Ray cluster answers at {address} ({error.strerror or type(error).__name__})",
            where="--address",
            fix="start one with `ray start --head`, or leave --address out to start Ray on this machine",
        ) from error


def _private_folder() -> Path:
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="fedlm-ray-", dir=parent if len(parent) <= _LONGEST_TMP else "/tmp"))


def _demand_token() -> None:
    """Without one, whoever reaches a port of this Ray could run code as this user. Ray's processes inherit it.

    The user's own setting of RAY_AUTH_MODE stands; ours stays for the life of this process.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    core: Any = importlib.import_module("ray._raylet")
    if not hasattr(core, "AuthenticationTokenLoader"):
        raise _too_old()
    core.Config.initialize("")  # Ray has read its settings when it was imported
    core.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray replaces the process's handler of SIGTERM; the run's own comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hush(log: Path) -> None:
    """Ray prints what befell its processes to standard output, which belongs to results: send it to a file."""
    import ray._private.worker as internals

    def to_file(data: dict[str, Any], *_: Any, **__: Any) -> None:
        with contextlib.suppress(OSError), log.open("a") as file:
            file.writelines(f"{line}\n" for line in data.get("lines", []))

    if not hasattr(internals, "print_to_stdstream"):
        raise _too_old()
    internals.print_to_stdstream = to_file


def _too_old() -> FedlmError:
    return FedlmError("this version of Ray is not one that fedlm knows", fix="pip install 'ray==2.60.0'")
