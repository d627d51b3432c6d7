"""Making networks and enrolling silos with NVFlare's own tools."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare import enrol
from fedlm.federation.engines.flare.checks import check_certificate, fingerprint, identity, key_matches, may_run
from fedlm.federation.engines.flare.consortium import EXAMPLE, check_consortium, read_consortium, silo
from fedlm.federation.engines.flare.kit import Kit, read_kit
from fedlm.federation.engines.flare.provision import add_silo, new_network
from fedlm.recipe.yamltree import parse_yaml
from tests.federation.flare.parties import consortium, demo_network


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("port: 8002", "prot: 8002", "c.yaml:8: 'coordinator.prot' is not known here. Fix: did you mean 'port'?"),
        ("silos:", "silo:", "'silo' is not known here. Fix: did you mean 'silos'?"),
        ("port: 8002", "port: many", "'coordinator.port': input should be a valid integer"),
        ("port: 8002", "port: 80020", "'coordinator.port'"),
        ("hospital-b,", "Hospital-A,", "the silo name 'Hospital-A' is given twice"),
        ("hospital-b,", "'a b',", "'silos.1.name' cannot be 'a b': it must be letters"),
        ("hospital-b,", "../b,", "'silos.1.name' cannot be"),
        ("hospital-b,", "server,", "'server' means something else"),
        ("hospital_b}", "hospital-b}", "'silos.1.org' cannot be 'hospital-b': it must be letters, digits and '_'"),
        ("role: lead", "role: boss", "c.yaml:12: 'operators.0.role'"),
        ("role: lead", "role: member", "no operator has the role lead"),
        ("ops@example.org", "ops", "'operators.0.name' cannot be 'ops'"),
        ("fl.example.org", "http://x", "'coordinator.host' cannot be 'http://x': it must be a host name"),
        ("  org: university", "", "'coordinator.org' is missing"),
    ],
)
def test_a_faulty_consortium_is_a_sentence(old: str, new: str, said: str) -> None:
    with pytest.raises(NetworkError) as caught:
        check_consortium(parse_yaml(EXAMPLE.replace(old, new, 1), "c.yaml"))
    assert said in str(caught.value)


def test_the_example_is_a_consortium(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(EXAMPLE)
    assert [s.name for s in read_consortium(tmp_path / "c.yaml").silos] == ["hospital-a", "hospital-b", "hospital-c"]
    without = check_consortium(parse_yaml("\n".join(EXAMPLE.splitlines()[:9] + EXAMPLE.splitlines()[14:]), "c"))
    assert [(o.role, o.name) for o in without.everyone()] == [("lead", "operator@university.org")]
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(NetworkError, match="fedlm network new --example"):
        read_consortium(tmp_path / "c.yaml")


def modes(folder: Path) -> set[tuple[str, int]]:
    return {("d" if p.is_dir() else "f", p.stat().st_mode & 0o777) for p in [folder, *folder.rglob("*")]}


def private_keys(folder: Path) -> list[str]:
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    return [str(p.relative_to(folder.parent)) for p in files if b"PRIVATE KEY" in p.read_bytes()]


def test_demo_keys_are_labelled_and_private(tmp_path: Path) -> None:
    kits = demo_network(tmp_path / "out")
    assert set(kits) == {"coordinator", "hospital-a", "hospital-b"}
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    for name, kit in kits.items():
        assert kit.keys == "demo"
        assert "demo keys: all private keys were made in one place" in (kit.path / "kit.yaml").read_text()
        assert modes(kit.path) == {("d", 0o700), ("f", 0o600)}
        owner = check_certificate(kit.certificate.read_bytes(), kit.root_certificate.read_bytes(), name)
        assert owner.name == ("localhost" if name == "coordinator" else name)
        assert key_matches(kit.key, kit.certificate.read_bytes())
        assert kit.root == fingerprint(kit.root_certificate.read_bytes())
        assert not list(kit.path.rglob("*.sh"))
    coordinator = kits["coordinator"]
    root = coordinator.root_certificate.read_bytes()
    assert may_run((coordinator.operator / "client.crt").read_bytes(), root) == "ops@example.org"
    guest = coordinator.path / "operators" / "guest@example.org" / "startup" / "client.crt"
    with pytest.raises(NetworkError, match=r"guest@example.org may not run federations: its role is 'member'"):
        may_run(guest.read_bytes(), root)
    with pytest.raises(NetworkError, match="hospital-a may not run"):
        may_run(kits["hospital-a"].certificate.read_bytes(), root)


def test_every_party_forbids_jobs_code_and_foreign_classes(tmp_path: Path) -> None:
    for kit in demo_network(tmp_path).values():
        rules = json.loads((kit.local / "authorization.json").read_text())["permissions"]
        for role in ("project_admin", "org_admin", "lead", "member"):
            assert {right for right, who in rules[role].items() if who != "none"} == {"view"}
            assert {"submit_job", "byoc", "shell_commands", "operate", "manage_job"} <= set(rules[role])
        resources = json.loads((kit.local / "resources.json").read_text())
        assert [c["id"] for c in resources["components"]] == ["fedlm"]
        assert resources["class_allow_list"] == [resources["components"][0]["path"]]
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert json.loads((kit.local / "comm_config.json").read_text())["allow_adhoc_conns"] is False
        assert "/tmp" not in "".join(p.read_text() for p in kit.local.iterdir())


@pytest.fixture(scope="module")
def invited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with own keys: the coordinator's kit and the silos' invitations."""
    folder = tmp_path_factory.mktemp("own")
    new_network(consortium(port=8002), folder)
    return folder


@pytest.fixture
def network(invited: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(invited, tmp_path / "network")
    return tmp_path / "network"


def coordinator(network: Path) -> Kit:
    return read_kit(network / "coordinator")


@pytest.mark.slow
def test_a_silos_key_is_made_at_the_silo_and_stays_there(network: Path, tmp_path: Path) -> None:
    assert not private_keys(network / "hospital-a.invitation.yaml")
    kit, site = coordinator(network), tmp_path / "site"
    assert modes(kit.path) == {("d", 0o700), ("f", 0o600)}
    asked = enrol.request(network / "hospital-a.invitation.yaml", site, tmp_path)
    assert private_keys(site) == ["site/pending/request/hospital-a.key"]
    with zipfile.ZipFile(asked.file) as archive:
        assert not any(b"PRIVATE KEY" in archive.read(name) for name in archive.namelist())
    signed = enrol.approve(kit, asked.file, tmp_path, days=10)
    assert signed.root == asked.root == kit.root
    assert signed.key == asked.key
    done = enrol.complete(signed.file, site, expected=kit.root.lower())
    assert done == read_kit(site, "silo")
    assert (done.name, done.org, done.host, done.port, done.keys) == (
        "hospital-a",
        "hospital_a",
        "localhost",
        8002,
        "own",
    )
    assert private_keys(site) == ["site/site/startup/client.key"]
    assert modes(site) == {("d", 0o700), ("f", 0o600)}
    pem = done.certificate.read_bytes()
    assert check_certificate(pem, done.root_certificate.read_bytes(), "a").name == "hospital-a"
    assert key_matches(done.key, pem)
    found = identity(pem)
    assert 9.9 < (found.not_after - found.not_before).total_seconds() / 86400 < 10.1
    # only the coordinator has the CA's key; nobody has the silo's
    assert not [k for k in private_keys(network) if "hospital-a" in k]
    check_renewal(kit, network, done, tmp_path)


def check_renewal(kit: Kit, network: Path, silo_kit: Kit, tmp_path: Path) -> None:
    """A second certificate is given only on purpose, for another key, and the silo's state survives."""
    (silo_kit.state / "memory").write_text("kept")
    old_key = silo_kit.key.read_bytes()
    for file in ("hospital-a.request.zip", "hospital-a.signed.zip"):
        (tmp_path / file).unlink()
    asked = enrol.request(network / "hospital-a.invitation.yaml", silo_kit.path, tmp_path)
    assert read_kit(silo_kit.path).key.read_bytes() == old_key  # usable until the new one is there
    with pytest.raises(NetworkError, match="has a certificate already"):
        enrol.approve(kit, asked.file, tmp_path)
    enrol.complete(enrol.approve(kit, asked.file, tmp_path, renew=True).file, silo_kit.path)
    assert silo_kit.key.read_bytes() != old_key
    assert key_matches(silo_kit.key, silo_kit.certificate.read_bytes())
    assert (silo_kit.state / "memory").read_text() == "kept"


def test_requests_that_are_not_this_networks_are_refused(network: Path, tmp_path: Path) -> None:
    kit = coordinator(network)
    text = (network / "hospital-a.invitation.yaml").read_text()

    def asked(old: str, new: str) -> Path:
        folder = tmp_path / new.replace(": ", "-")
        folder.mkdir()
        (folder / "i.yaml").write_text(text.replace(old, new))
        return enrol.request(folder / "i.yaml", folder / "kit", folder).file

    for request, reason in (
        (asked("name: hospital-a", "name: hospital-x"), r"'hospital-x' is not enrolled .* did you mean"),
        (asked("org: hospital_a", "org: mallory"), "belongs to 'hospital_a', the request says 'mallory'"),
        (asked("network: hospitals", "network: banks"), "a request to the network 'banks'"),
    ):
        with pytest.raises(NetworkError, match=reason):
            enrol.approve(kit, request, tmp_path)
    (tmp_path / "junk.zip").write_bytes(b"PK junk")
    with pytest.raises(NetworkError, match="not a request zip"):
        enrol.approve(kit, tmp_path / "junk.zip", tmp_path)
    assert not list(tmp_path.glob("*.signed.zip"))


def test_a_forged_request_is_refused_by_nvflare(network: Path, tmp_path: Path) -> None:
    """The zip says hospital-b, the signed part inside hospital-a: NVFlare's own checks find it."""
    asked = enrol.request(network / "hospital-a.invitation.yaml", tmp_path / "kit", tmp_path)
    forged = tmp_path / "forged.zip"
    with zipfile.ZipFile(asked.file) as old, zipfile.ZipFile(forged, "w") as new:
        for name in old.namelist():
            new.writestr(name.replace("hospital-a", "hospital-b"), old.read(name).replace(b"hospital-a", b"hospital-b"))
            if name == "request.json":
                said = json.loads(old.read(name))
    assert said["name"] == "hospital-a"
    shutil.move(tmp_path / "hospital-a.request.zip", tmp_path / "unused.zip")
    with zipfile.ZipFile(forged) as archive:
        assert json.loads(archive.read("request.json"))["org"] == "hospital_a"
    kit = coordinator(network)
    members = json.loads((kit.ca / "members.json").read_text())
    members["hospital-b"]["org"] = "hospital_a"
    (kit.ca / "members.json").write_text(json.dumps(members))
    with pytest.raises(NetworkError, match="nvflare cert approve"):
        enrol.approve(kit, forged, tmp_path)


def test_a_silo_takes_no_certificate_of_another_network(network: Path, tmp_path: Path) -> None:
    """An attacker who runs a CA of the same names cannot have a silo trust it."""
    site = tmp_path / "site"
    with pytest.raises(NetworkError, match="no request was made"):
        enrol.complete(tmp_path / "hospital-a.signed.zip", site)
    enrol.request(network / "hospital-a.invitation.yaml", site, tmp_path)
    attacker = tmp_path / "attacker"
    demo_network(attacker, port=8002)
    signed = enrol.approve(coordinator(attacker), tmp_path / "hospital-a.request.zip", attacker, renew=True).file
    with pytest.raises(NetworkError, match=r"nvflare package.*fingerprint"):
        enrol.complete(signed, site)
    mine = enrol.approve(coordinator(network), tmp_path / "hospital-a.request.zip", tmp_path).file
    with pytest.raises(NetworkError, match="ask the coordinator which one is right"):
        enrol.complete(mine, site, expected=coordinator(attacker).root)
    with pytest.raises(NetworkError, match="waits for its certificate"):
        read_kit(site)


def test_adding_and_asking_again(network: Path, tmp_path: Path) -> None:
    kit = coordinator(network)
    add_silo(kit, silo("hospital-d", "d"), tmp_path / "d.yaml")
    assert coordinator(network).silos == ("hospital-a", "hospital-b", "hospital-d")
    with pytest.raises(NetworkError, match="enrolled already"):
        add_silo(coordinator(network), silo("Hospital-D", "d"), tmp_path / "e.yaml")
    signed = enrol.approve(kit, enrol.request(tmp_path / "d.yaml", tmp_path / "d", tmp_path).file, tmp_path)
    assert enrol.complete(signed.file, tmp_path / "d").name == "hospital-d"
    with pytest.raises(NetworkError, match="this is the kit of hospital-d"):
        enrol.request(network / "hospital-a.invitation.yaml", tmp_path / "d", tmp_path)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("keep me")
    with pytest.raises(NetworkError, match="holds something else"):
        enrol.request(network / "hospital-a.invitation.yaml", tmp_path / "else", tmp_path)
    (tmp_path / "bad.yaml").write_text("name: hospital-a")
    with pytest.raises(NetworkError, match="no invitation"):
        enrol.request(tmp_path / "bad.yaml", tmp_path / "new", tmp_path)
    with pytest.raises(NetworkError, match="no certificate authority"):
        add_silo(replace(kit, path=tmp_path), silo("hospital-e", "e"), tmp_path / "e.yaml")


def test_nothing_is_overwritten_and_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo_network(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(NetworkError, match="there already"):
        demo_network(tmp_path)
    monkeypatch.setattr("fedlm.federation.engines.flare.tools.sys.executable", "/bin/false")
    with pytest.raises(NetworkError, match="nvflare cert init: ended with code 1"):
        new_network(consortium(), tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "other"])
    assert not list((tmp_path / "other").iterdir())
