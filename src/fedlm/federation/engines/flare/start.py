"""What must be right before a party's processes run, and running them: `fedlm coordinator start`, `fedlm silo start`.

The foreground is all there is: systemd, compose or a terminal does the rest.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlm import __version__, logs
from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.checks import check_certificate, days_left, key_matches
from fedlm.federation.engines.flare.kit import DEMO_LABEL, Kit, private_folder
from fedlm.federation.engines.flare.processes import Child, check_port, only_one, stopped_by_signals, supervise
from fedlm.federation.engines.flare.settings import HEARTBEAT_SECONDS, write_settings
from fedlm.federation.engines.flare.tools import need_nvflare
from fedlm.federation.engines.flare.views import CoordinatorView, SiloView

log = logging.getLogger("fedlm.network")

SOON_DAYS = 30.0
"""A certificate that expires within so many days is worth a warning."""

_SERVER = "nvflare.private.fed.app.server.server_train"
_CLIENT = "nvflare.private.fed.app.client.client_train"
_WORKER = "fedlm.federation.engines.flare.worker"


def run_coordinator(kit: Kit, json_logs: bool = False) -> None:
    """Run the coordinator's side until SIGTERM or Ctrl-C.

    Raises:
        NetworkError: something is wrong with the kit or the port, the kit runs already, or NVFlare does not stay up.
        MissingExtra: NVFlare is not installed.
    """
    with only_one(kit):
        warn(check_ready(kit))
        check_port(kit.host, kit.port)
        write_settings(kit, json_logs)
        with stopped_by_signals() as stop:
            supervise([relay(kit)], stop, CoordinatorView(kit).watch)
    log.info("the coordinator of %s has ended", kit.network)


def run_silo(
    kit: Kit, data: Path, policy: Path | None, json_logs: bool = False, metrics_port: int | None = None
) -> None:
    """Run a silo's side until SIGTERM or Ctrl-C: the relay, and the worker that owns text and model.

    Raises:
        NetworkError: there is no policy, and what nobody has allowed is refused; something is wrong with the kit, the
            kit runs already, or a process does not stay up.
        MissingExtra: NVFlare is not installed.
    """
    for file in (data, policy):
        if file is not None and not file.is_file():
            raise NetworkError("there is no such file", where=str(file), fix="correct --data or --policy")
    if policy is None:
        raise NetworkError(
            "this silo has no policy, and without its owner's word nothing may be asked of it",
            where="--policy",
            fix="write one with `fedlm silo policy --example > policy.yaml`, and give --policy policy.yaml",
        )
    with only_one(kit):
        warn(check_ready(kit))
        write_settings(kit, json_logs)
        private_folder(kit.state)
        children = [relay(kit), worker(kit, data, policy)]
        view = SiloView(kit)
        endpoint = None if metrics_port is None else _metrics(kit, children, view, metrics_port)
        try:
            with stopped_by_signals() as stop:
                supervise(children, stop, view.watch)
        finally:
            if endpoint is not None:
                endpoint.close()
    log.info("the silo %s has ended", kit.name)


def relay(kit: Kit) -> Child:
    """The NVFlare process of a kit. Nothing secret is on its command line: keys are files of the kit."""
    server = kit.kind == "coordinator"
    spec = ["-m", str(kit.workspace), "-s", "fed_server.json" if server else "fed_client.json"]
    options = ["secure_train=true", f"org={kit.org}", "config_folder=config"]
    if not server:
        options += [f"uid={kit.name}", f"heart_beat_interval={HEARTBEAT_SECONDS}"]
    environment = {"MALLOC_ARENA_MAX": "4"}  # NVFlare's own setting: many threads would each keep a heap
    arguments = [*spec, "--set", *options]
    return Child("relay", _SERVER if server else _CLIENT, arguments, kit.logs / "relay.out", environment)


def worker(kit: Kit, data: Path, policy: Path) -> Child:
    """The process that owns a silo's text and model; it prints to the supervisor's own output."""
    arguments = ["--kit", str(kit.path), "--data", str(data.absolute()), "--policy", str(policy.absolute())]
    return Child("worker", _WORKER, arguments)


def check_ready(kit: Kit) -> list[str]:
    """Check everything that must be right before the kit's processes run.

    Returns:
        Warnings, one sentence each.

    Raises:
        NetworkError: a file missing or readable by others, a certificate expired or of another network, a kit of
            a newer fedlm.
        MissingExtra: NVFlare is not installed.
    """
    need_nvflare()
    check_private(kit)
    certificate, root = (read(file) for file in (kit.certificate, kit.root_certificate))
    check_certificate(certificate, root, str(kit.certificate))
    if not key_matches(kit.key, certificate):
        raise NetworkError("the private key is not the certificate's", where=str(kit.key), fix="make the kit again")
    warnings = version_warnings(kit.fedlm)
    if (left := days_left(certificate)) < SOON_DAYS:
        warnings.append(f"the certificate expires in {left:.0f} days; ask the coordinator for a new one in time")
    if kit.keys == "demo":
        warnings.append(f"{DEMO_LABEL}; never use this kit with real data")
    return warnings


def warn(warnings: list[str]) -> None:
    for sentence in warnings:
        log.warning(sentence)


def check_private(kit: Kit) -> None:
    """Raises NetworkError when someone else may read the kit's keys."""
    for folder in (kit.startup, kit.operator, kit.ca):
        for file in sorted(folder.glob("*.key")):
            if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise NetworkError(
                    "this private key can be read by other users of this machine",
                    where=str(file),
                    fix=f"chmod 600 {file}",
                )


def read(file: Path) -> bytes:
    """A file of the kit. Raises NetworkError when it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise NetworkError(
            f"cannot be read: {error.strerror}", where=str(file), fix="complete the kit: `fedlm network join`"
        ) from None


def version_warnings(made_by: str, mine: str = __version__) -> list[str]:
    """What to say when the kit was made by another fedlm; nothing for an older one of the same major version."""
    theirs, ours = _version(made_by), _version(mine)
    if theirs[:1] != ours[:1] or theirs > ours:
        return [f"this kit was made by fedlm {made_by}, this is fedlm {mine}; parties of one network should agree"]
    return []


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in text.split("+")[0].split(".")[:3])


def _metrics(kit: Kit, children: list[Child], view: SiloView, port: int) -> Any:
    """Serve /metrics and /health of a silo on this machine. Raises RunError: the port is taken."""
    from prometheus_client import Gauge

    from fedlm.endpoint import new_registry, serve_metrics
    from fedlm.federation.engines.flare.figures import FILE, serve_figures

    registry = new_registry()
    serve_figures(registry, kit.run / FILE)  # what the worker counts

    def gauge(name: str, about: str, value: Callable[[], float]) -> None:
        Gauge(name, about, registry=registry).set_function(value)

    gauge("fedlm_silo_connected", "1 while the coordinator is connected.", lambda: bool(view.status.get("connected")))
    gauge("fedlm_silo_worker_ready", "1 while the worker serves the relay.", lambda: bool(view.status.get("worker")))
    gauge(
        "fedlm_silo_restarts", "Processes of this silo that died and were started again.", lambda: _restarts(children)
    )

    def health() -> tuple[bool, dict[str, Any]]:
        facts = {name: bool(view.status.get(name)) for name in ("connected", "worker")}
        return all(facts.values()), {"silo": kit.name, "network": kit.network, "restarts": _restarts(children), **facts}

    return serve_metrics(registry, port, health=health)


def _restarts(children: list[Child]) -> int:
    return sum(child.restarts for child in children)


def configure_logs(kit: Kit, json_logs: bool) -> bool:
    """Log like the rest of fedlm; returns whether as JSON."""
    json_logs = json_logs or logs.wanted()
    if json_logs:
        logs.configure(True, role=kit.kind, party=kit.name)
    else:
        logs.configure(False)
    return json_logs
