"""Reading kits, and where a kit's processes meet."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.kit import (
    Kit,
    private_folder,
    read_kit,
    socket_path,
    write_kit,
    write_private,
)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    made = Kit(
        path=private_folder(tmp_path / "kit"),
        kind="coordinator",
        network="hospitals",
        name="coordinator",
        org="university",
        fedlm="0.1.0",
        host="fl.example.org",
        port=8002,
        keys="own",
        created="2026-01-01T00:00:00+00:00",
        silos=("hospital-a", "hospital-b"),
        root="AB:" * 31 + "CD",
    )
    write_kit(made)
    return made


def test_a_kit_is_read_as_it_was_written(kit: Kit) -> None:
    assert read_kit(kit.path) == kit
    silo = replace(kit, kind="silo", name="hospital-a", silos=(), keys="demo")
    write_kit(silo)
    assert read_kit(kit.path, "silo") == silo
    assert "demo keys" in (kit.path / "kit.yaml").read_text()


def test_kit_files_are_private(kit: Kit) -> None:
    os.umask(0)
    try:
        write_kit(kit)
        write_private(kit.path / "more", b"x")
    finally:
        os.umask(0o022)
    assert (kit.path / "kit.yaml").stat().st_mode & 0o777 == 0o600
    assert (kit.path / "more").stat().st_mode & 0o777 == 0o600
    assert kit.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("format: 2", "format 2"),
        ("- a", "damaged"),
        ("format: 1\nkind: coordinator", "network, name, org, fedlm, host, created, keys, port missing"),
        ("a: [", "damaged"),
        ("", "damaged"),
        ("!!python/object/apply:os.system ['true']", "damaged"),
    ],
)
def test_a_damaged_kit_is_a_sentence(kit: Kit, text: str, reason: str) -> None:
    (kit.path / "kit.yaml").write_text(text)
    with pytest.raises(NetworkError, match=reason):
        read_kit(kit.path)


def test_no_kit_another_kind_and_a_kit_that_waits(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="not a kit"):
        read_kit(tmp_path)
    with pytest.raises(NetworkError, match="the kit of a coordinator, not of a silo"):
        read_kit(kit.path, "silo")
    (tmp_path / "pending").mkdir()
    with pytest.raises(NetworkError, match="waits for its certificate"):
        read_kit(tmp_path)


def test_one_kit_has_one_socket_whatever_it_is_called(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(kit.path)
    monkeypatch.chdir(tmp_path)
    assert read_kit(tmp_path / "link").path == kit.path
    long = tmp_path / ("x" * 90)
    assert socket_path("link") == socket_path(kit.path)
    assert len(os.fsencode(socket_path(long))) <= 100
    assert socket_path(long) != socket_path(tmp_path / ("y" * 90))
    assert socket_path(long).parent.stat().st_mode & 0o777 == 0o700


def test_a_short_path_stays_in_the_kit() -> None:
    folder = Path(f"/tmp/fedlm-test-{os.getpid()}")
    try:
        assert socket_path(folder) == folder / "run" / "relay.sock"
    finally:
        (folder / "run").rmdir()
        folder.rmdir()


def test_a_private_folder_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(NetworkError, match="no link"):
        private_folder(tmp_path / "link")
    (tmp_path / "real").chmod(0o755)
    assert private_folder(tmp_path / "real").stat().st_mode & 0o777 == 0o700


def test_relays_and_supervisors_need_no_torch() -> None:
    """A silo's relay and supervisor stay small; the relay's own imports too."""
    code = (
        "import sys\n"
        "import fedlm.federation.engines.flare.launch, fedlm.federation.engines.flare.start\n"
        "import fedlm.federation.engines.flare.checks, fedlm.federation.engines.flare.examine\n"
        "import fedlm.federation.engines.flare.enrol, fedlm.federation.engines.flare.site\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
