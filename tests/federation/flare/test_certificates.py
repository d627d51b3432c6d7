"""Who is let in. The slow tests let real NVFlare processes try, over real sockets and mutual TLS."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.ask import change_access, status_of
from fedlm.federation.engines.flare.checks import (
    check_certificate,
    fingerprint,
    may_run,
    same_fingerprint,
    sign,
    verify,
)
from fedlm.federation.engines.flare.examine import examine_kit
from fedlm.federation.engines.flare.kit import Kit, private_folder, read_kit, write_kit
from fedlm.federation.engines.flare.processes import check_port
from tests.federation.flare.parties import (
    certificate,
    connected,
    demo_network,
    edit,
    free_port,
    log_of,
    running,
    seen,
    until,
)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kit]:
    return demo_network(tmp_path_factory.mktemp("network"))


def copy_of(kit: Kit, folder: Path) -> Kit:
    """The same kit elsewhere."""
    shutil.copytree(kit.path, folder, ignore=shutil.ignore_patterns("*.sock", "logs"))
    private_folder(folder / "logs")
    return read_kit(folder)


# ---------------------------------------------------------------- without processes


def test_who_may_run(kits: dict[str, Kit], tmp_path: Path) -> None:
    kit = kits["coordinator"]
    root, operator = kit.root_certificate.read_bytes(), kit.operator / "client.crt"
    assert may_run(operator.read_bytes(), root) == "ops@example.org"
    with pytest.raises(NetworkError, match="may not run federations: its role is 'none'"):
        may_run(kits["hospital-a"].certificate.read_bytes(), root)
    other = demo_network(tmp_path)["coordinator"]
    with pytest.raises(NetworkError, match="not signed by this network's root"):
        may_run((other.operator / "client.crt").read_bytes(), root)
    for start, end, reason in ((-9.0, -1.0, "expired"), (1.0, 9.0, "not valid before")):
        with pytest.raises(NetworkError, match=reason):
            may_run(certificate(kits["hospital-a"], kit.ca, start=start, end=end, role="lead"), root)
    assert may_run(certificate(kits["hospital-a"], kit.ca, start=-1, end=9, role="lead"), root) == "hospital-a"
    for junk in (b"", b"junk", operator.read_bytes()[:400]):
        with pytest.raises(NetworkError, match="not a PEM certificate"):
            may_run(junk, root)


def test_a_certificate_is_worth_nothing_without_its_key(kits: dict[str, Kit]) -> None:
    folder, silo = kits["coordinator"].operator, kits["hospital-a"]
    pem, nonce = (folder / "client.crt").read_bytes(), secrets.token_bytes(32)
    signature = sign(folder / "client.key", nonce)
    verify(pem, nonce, signature)
    for wrong in (
        (pem, nonce, sign(silo.key, nonce)),
        (pem, secrets.token_bytes(32), signature),
        (silo.certificate.read_bytes(), nonce, signature),
        (pem, nonce, b""),
    ):
        with pytest.raises(NetworkError, match="not by the certificate's owner"):
            verify(*wrong)
    with pytest.raises(NetworkError, match="private key cannot be read"):
        sign(folder / "none.key", nonce)


def test_the_roots_own_certificate_is_no_identity(kits: dict[str, Kit]) -> None:
    """A silo cannot act as a certificate authority: what its key signed is not the root's."""
    root = kits["coordinator"].root_certificate.read_bytes()
    forged_ca = private_folder(kits["hospital-a"].path / "forged")
    shutil.copyfile(kits["hospital-a"].key, forged_ca / "rootCA.key")
    shutil.copyfile(kits["hospital-a"].root_certificate, forged_ca / "rootCA.pem")
    forged = certificate(kits["hospital-b"], forged_ca, start=-1, end=9, role="lead")
    with pytest.raises(NetworkError, match="not signed by this network's root"):
        check_certificate(forged, root, "forged")
    shutil.rmtree(forged_ca)


def test_fingerprints_as_people_write_them(kits: dict[str, Kit]) -> None:
    known = fingerprint(kits["coordinator"].root_certificate.read_bytes())
    plain = known.replace(":", "").lower()
    for written in (known, plain, f"SHA256:{known}", f" sha256 Fingerprint={known}\n", known.replace(":", " ")):
        assert same_fingerprint(written, known)
    for wrong in ("", "00", plain[:-1], plain[:-1] + ("0" if plain[-1] != "0" else "1"), plain[:20]):
        assert not same_fingerprint(wrong, known)
    assert not same_fingerprint("", "")


# ---------------------------------------------------------------- with NVFlare's processes


@pytest.fixture(scope="module")
def network(kits: dict[str, Kit]) -> Iterator[dict[str, Kit]]:
    """A running coordinator."""
    with running(kits["coordinator"]):
        assert until(lambda: bool(seen(kits["coordinator"], "hospital-a")))
        yield kits


def joined(coordinator: Kit, silo: Kit) -> int:
    """How often the coordinator has let a silo of this name in."""
    return log_of(coordinator).count(f"New client {silo.name}@")


def never_connects(coordinator: Kit, silo: Kit, seconds: float = 8.0) -> None:
    """Start this silo and check that it is never let in, so that it cannot be asked anything either."""
    before = joined(coordinator, silo)
    with running(silo):
        assert not until(lambda: joined(coordinator, silo) > before, seconds)
        with pytest.raises(NetworkError, match="does not run here"):
            status_of(silo)  # the relay only begins once the coordinator has let the silo in


@pytest.mark.slow
def test_a_silo_of_the_network_is_let_in(network: dict[str, Kit]) -> None:
    silo = network["hospital-a"]
    with running(silo) as (child,):
        assert until(lambda: connected(network["coordinator"], "hospital-a"))
        found = {f.name: f for f in examine_kit(silo.path)}
        assert found["connection"].level == found["relay"].level == "ok"
        assert {f.level for f in examine_kit(network["coordinator"].path) if f.name in ("relay", "connection")} == {
            "ok"
        }
        # its key is nowhere where another user of the machine could read it
        assert child.process is not None
        proc = Path(f"/proc/{child.process.pid}")
        if proc.exists():
            secret = silo.key.read_text().splitlines()[1]
            assert secret not in (proc / "cmdline").read_text() + (proc / "environ").read_text()
    assert until(lambda: not connected(network["coordinator"], "hospital-a"), 60.0)


@pytest.mark.slow
def test_another_ca_is_refused_by_both_sides(network: dict[str, Kit], tmp_path: Path) -> None:
    """The same names and address, another root: the silo refuses the coordinator, and the coordinator the silo."""
    port = network["coordinator"].port
    other = demo_network(tmp_path / "other", port)["hospital-a"]
    never_connects(network["coordinator"], other)
    (found,) = [f for f in examine_kit(other.path) if f.name == "connection"]
    assert (found.level, "is not this network's coordinator" in found.value) == ("problem", True)
    # one that trusts the right root, with a certificate of the wrong one
    shutil.copyfile(network["hospital-a"].root_certificate, other.root_certificate)
    never_connects(network["coordinator"], other)
    (found,) = [f for f in examine_kit(other.path) if f.name == "connection"] or [None]
    assert found is not None
    assert "refuses this kit's certificate" in found.value


@pytest.mark.slow
def test_no_certificate_is_refused(network: dict[str, Kit]) -> None:
    import grpc

    kit = network["coordinator"]
    target, root = f"localhost:{kit.port}", kit.root_certificate.read_bytes()
    for credentials in (grpc.ssl_channel_credentials(root_certificates=root), None):
        channel = grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
        with channel:
            stub = channel.stream_stream("/Streamer/Stream")
            with pytest.raises(grpc.RpcError) as caught:
                next(stub(iter([b""]), timeout=5))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    context = ssl.create_default_context(cafile=str(kit.root_certificate))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", kit.port)) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
        context.wrap_socket(plain, server_hostname="localhost") as channel,
    ):
        if not channel.recv(1):  # with a certificate, HTTP/2 begins here
            raise ConnectionError("closed")


@pytest.mark.slow
@pytest.mark.parametrize(("start", "end"), [(-9.0, -1.0), (1.0, 9.0)])
def test_an_expired_or_early_certificate_is_refused(
    network: dict[str, Kit], tmp_path: Path, start: float, end: float
) -> None:
    """By the coordinator: NVFlare's client is started although `fedlm silo start` would refuse."""
    silo = copy_of(network["hospital-a"], tmp_path / "kit")
    silo.certificate.write_bytes(certificate(silo, network["coordinator"].ca, start=start, end=end))
    never_connects(network["coordinator"], silo)
    found = {f.name: f for f in examine_kit(silo.path) if f.level == "problem"}
    assert "expired" in found["certificate"].value or "not valid before" in found["certificate"].value
    assert "refuses this kit's certificate" in found["connection"].value
    silo.certificate.write_bytes(certificate(silo, network["coordinator"].ca, start=-1, end=9))
    with running(silo):  # it was the dates and nothing else
        assert until(lambda: connected(network["coordinator"], "hospital-a"))


@pytest.mark.slow
def test_a_silo_cannot_take_anothers_name(network: dict[str, Kit], tmp_path: Path) -> None:
    liar = copy_of(network["hospital-a"], tmp_path / "liar")
    write_kit(replace(liar, name="hospital-b"))
    never_connects(network["coordinator"], read_kit(liar.path))
    assert "authenticated as 'hospital-a' but claimed" in log_of(network["coordinator"])


@pytest.mark.slow
def test_a_revoked_silo_is_out_at_once_and_stays_out(network: dict[str, Kit]) -> None:
    kit, silo = network["coordinator"], network["hospital-b"]
    with running(silo):
        assert until(lambda: connected(kit, "hospital-b"))
        assert change_access(kit, "hospital-b", restore=False) is True
        assert until(lambda: not connected(kit, "hospital-b"), 5.0)
        assert seen(kit, "hospital-b")["revoked"] is True
        assert not until(lambda: connected(kit, "hospital-b"), 12.0)
    never_connects(kit, silo, seconds=6.0)
    assert change_access(kit, "hospital-b", restore=True) is True
    with running(silo):
        assert until(lambda: connected(kit, "hospital-b"))


@pytest.mark.slow
def test_two_machines_with_one_kit_end_with_one(network: dict[str, Kit], tmp_path: Path) -> None:
    """The later one takes the name. Once one of them ends, the other has it for good."""
    kit, silo = network["coordinator"], network["hospital-a"]
    twin = copy_of(silo, tmp_path / "twin")
    with running(silo):
        assert until(lambda: connected(kit, "hospital-a"))
        before = log_of(kit).count("is evicted for")
        with running(twin):
            assert until(lambda: log_of(kit).count("is evicted for") > before)
        assert until(lambda: connected(kit, "hospital-a") and (seen(kit, "hospital-a")["last_seen"] or 0) < 5, 60.0)


@pytest.mark.slow
def test_a_second_coordinator_of_the_same_network_is_refused(network: dict[str, Kit], tmp_path: Path) -> None:
    twin = copy_of(network["coordinator"], tmp_path / "twin")
    with pytest.raises(NetworkError, match="cannot be listened on: Address already in use"):
        check_port(twin.host, twin.port, patience=0.0)
    with running(twin):  # and NVFlare, started all the same, gets no silo
        assert not until(lambda: connected(twin, "hospital-a"), 6.0)


# ---------------------------------------------------------------- jobs, refused by a silo alone

_JOBS = "nvflare.app_common"
_SERVER_JOBS: list[dict[str, Any]] = [
    {"id": "job_scheduler", "path": f"{_JOBS}.job_schedulers.job_scheduler.DefaultJobScheduler"},
    {"id": "job_store", "path": f"{_JOBS}.storages.filesystem_storage.FilesystemStorage"},
    {"id": "process_launcher", "path": f"{_JOBS}.job_launcher.server_process_launcher.ServerProcessJobLauncher"},
]
_SERVER_JOBS[0]["args"] = {"min_schedule_interval": 0.5, "max_schedule_count": 2}
_SILO_JOBS: list[dict[str, Any]] = [
    {"id": "resource_manager", "path": f"{_JOBS}.resource_managers.gpu_resource_manager.GPUResourceManager"},
    {"id": "resource_consumer", "path": f"{_JOBS}.resource_consumers.gpu_resource_consumer.GPUResourceConsumer"},
    {"id": "process_launcher", "path": f"{_JOBS}.job_launcher.client_process_launcher.ClientProcessJobLauncher"},
]
_SILO_JOBS[0]["args"] = {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0}


def everything_allowed(kit: Kit) -> None:
    def allow(rules: Any) -> None:
        rules["permissions"] = dict.fromkeys(rules["permissions"], "any")

    edit(kit, "authorization.json", allow)


def any_class(kit: Kit) -> None:
    edit(kit, "resources.json", lambda found: found["class_allow_list"].append("*"))


def with_jobs(kit: Kit) -> None:
    """The components that run jobs, and a log that a job's process can write."""
    parts = _SILO_JOBS
    if kit.kind == "coordinator":
        where = {"uri_root": str(kit.path / "jobs"), "job_store_id": "job_store"}
        manager = {"id": "job_manager", "path": "nvflare.apis.impl.job_def_manager.SimpleJobDefManager", "args": where}
        parts = [*_SERVER_JOBS, manager]
    edit(kit, "resources.json", lambda found: found["components"].extend(parts))
    edit(kit, "log_config.json", lambda found: found["handlers"]["file"].update(filename="job.log"))


def job(folder: Path, mark: Path, *, code: bool) -> Path:
    """A job whose code leaves a mark, or one that names an NVFlare class that no kit lists."""
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    meta = {"name": "job", "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}}
    (folder / "meta.json").write_text(json.dumps(meta))
    controller = {"id": "c", "path": f"{_JOBS}.workflows.error_handling_controller.ErrorHandlingController"}
    executor = "mark.Mark" if code else f"{_JOBS}.np.np_trainer.NPTrainer"
    server = {"format_version": 2, "workflows": [controller]}
    client = {"format_version": 2, "executors": [{"tasks": ["*"], "executor": {"path": executor}}]}
    (config / "config_fed_server.json").write_text(json.dumps(server))
    (config / "config_fed_client.json").write_text(json.dumps(client))
    if code:
        (folder / "app" / "custom").mkdir()
        text = (
            "import os\nfrom pathlib import Path\nfrom nvflare.apis.executor import Executor\n"
            f"if 'hospital' in os.getcwd():\n    Path({str(mark)!r}).write_text('ran')\n"
            "class Mark(Executor):\n    def execute(self, *a, **k):\n        pass\n"
        )
        (folder / "app" / "custom" / "mark.py").write_text(text)
    return folder


def submit(coordinator: Kit, folder: Path, known: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What the coordinator knows of a job that the lead operator submitted, once what became of it is `known`.

    That the job has ended is not enough: NVFLARE writes the status first, and why the job failed after it.
    """
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    local = coordinator.operator.parent / "local"
    local.mkdir(exist_ok=True)
    settings = {"idle_timeout": 900.0, "login_timeout": 10.0, "authenticate_msg_timeout": 2.0}
    (local / "resources.json").write_text(json.dumps({"format_version": 1, "admin": settings}))
    session = new_secure_session("ops@example.org", str(coordinator.operator.parent))
    try:
        number = session.submit_job(str(folder))
        found: dict[str, Any] = {}

        def over() -> bool:
            found.update(session.get_job_meta(number))
            return known(found)

        assert until(over, 60.0), found
        return found
    finally:
        session.close()


_REFUSED = {
    "everything": "resource_manager should be of type ResourceManagerSpec",
    "rights": "user 'ops@example.org' is not authorized for 'submit_job'",
    "byoc": "BYOC not permitted",
    "classes": "Component 'nvflare.app_common.np.np_trainer.NPTrainer' at config path 'executors.#1.executor' "
    "is not in allow_list",
}
"""What of a silo's own settings is kept -> how a job fails then."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "code"),
    [("nothing", True), ("nothing", False), ("everything", True), ("rights", True), ("byoc", True), ("classes", False)],
)
def test_a_silo_alone_refuses_jobs(tmp_path: Path, kept: str, code: bool) -> None:
    """The coordinator and its operator allow everything; each of the silo's own rules alone keeps the job out."""
    kits = demo_network(tmp_path, free_port())
    coordinator, silo, mark = kits["coordinator"], kits["hospital-a"], tmp_path / "mark"
    for loosen in (everything_allowed, any_class, with_jobs):
        loosen(coordinator)
    if kept != "everything":
        with_jobs(silo)
    if kept in ("nothing", "byoc", "classes"):
        everything_allowed(silo)
    if kept in ("nothing", "byoc"):
        any_class(silo)
    if kept == "byoc":
        rights = {"submit_job": "any", "byoc": "none"}
        edit(silo, "authorization.json", lambda rules: rules["permissions"].update(lead=rights))

    def logs() -> str:
        return "".join(file.read_text(errors="replace") for file in silo.workspace.rglob("*.log"))

    def ran() -> bool:
        return mark.exists() if code else "__task_check__" in logs()  # a job's process has built its components

    def refused(found: dict[str, Any]) -> bool:
        told = str(found.get("job_deploy_detail")) + str(found.get("schedule_history")) + logs()
        return str(found["status"]).startswith("FINISHED") and _REFUSED[kept] in told

    with running(coordinator, silo):
        assert until(lambda: connected(coordinator, "hospital-a"))
        # Without the silo's rules the job runs, so the other cases prove something.
        submit(
            coordinator,
            job(tmp_path / "job", mark, code=code),
            lambda found: ran() if kept == "nothing" else refused(found),
        )
    assert ran() == (kept == "nothing")
