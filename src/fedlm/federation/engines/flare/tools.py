"""NVFlare's own certificate and packaging tools, run as subprocesses: their answers as data, their errors as ours."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedlm.errors import MissingExtra, NetworkError
from fedlm.federation.engines.flare.kit import private_folder

_SECONDS = 300


def need_nvflare() -> None:
    """Raises MissingExtra when NVFlare is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise MissingExtra("a network between organisations", "network")


def nvflare(*words: str, records: Path) -> dict[str, Any]:
    """Run one of NVFlare's commands.

    Args:
        words: the command, e.g. 'cert', 'approve', ...; never a secret, since everyone on the machine can read it.
        records: folder for what NVFlare notes about the certificates it handled; it would be the home folder.

    Returns:
        What the command says of its result.

    Raises:
        NetworkError: it refuses, with its own reason.
        MissingExtra: NVFlare is not installed.
    """
    need_nvflare()
    private_folder(records)
    command = [sys.executable, "-m", "nvflare.cli", *words, "--output", "json"]
    done = run(command, records)
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise _unclear(words, done) from None
    if done.returncode != 0 or not isinstance(answer, dict) or answer.get("status") != "ok":
        if not isinstance(answer, dict) or "message" not in answer:
            raise _unclear(words, done)
        detail = f" ({answer['detail']})" if answer.get("detail") else ""
        raise NetworkError(f"{answer['message'].rstrip('.')}{detail}", where=" ".join(("nvflare", *words[:2])))
    data = answer.get("data")
    return data if isinstance(data, dict) else {}


def provision(project: Path, workspace: Path) -> Path:
    """Make every party's keys at once with NVFlare's provisioner: for demonstrations.

    Returns:
        The folder with one folder per party.

    Raises:
        NetworkError: it refuses.
    """
    need_nvflare()
    command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", str(project), "-w", str(workspace), "--force"]
    done = run(command, workspace)
    found = sorted(workspace.glob("*/prod_00"))
    if done.returncode != 0 or not found:
        raise _unclear(("provision",), done)
    return found[0]


def run(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run a tool that reads no keyboard and writes its notes under `home`."""
    environment = {**os.environ, "HOME": str(home)}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=home,
        )
    except subprocess.TimeoutExpired:
        raise NetworkError(f"did not finish in {_SECONDS} s", where=" ".join(command[2:5])) from None


def _unclear(words: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> NetworkError:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return NetworkError(
        f"ended with code {done.returncode}: {lines[-1] if lines else 'no word why'}",
        where=" ".join(("nvflare", *words[:2])),
    )


def take_startup(source: Path, target: Path) -> None:
    """Copy a party's `startup/` (certificates, key, where to connect) without its shell scripts; files become 0600."""
    shutil.rmtree(target, ignore_errors=True)
    private_folder(target)
    for file in sorted(source.iterdir()):
        if file.suffix in (".crt", ".key", ".pem", ".json") and file.is_file() and not file.is_symlink():
            copy = target / file.name
            copy.touch(mode=0o600)
            shutil.copyfile(file, copy)


def tighten(kit: Path) -> None:
    """Make everything below a kit readable by this user alone."""
    for folder, _, files in os.walk(kit):
        Path(folder).chmod(0o700)
        for name in files:
            file = Path(folder) / name
            if not file.is_symlink():
                file.chmod(0o600)
