"""Archives from strangers: members by glob, and everything unsafe is refused."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from fedlm.data import archives
from fedlm.data.archives import extract_member, glob_regex, list_members, open_members
from fedlm.errors import PackageError

FILES = {"pkg/a.txt": b"one", "pkg/sub/b.txt": b"two", "pkg/sub/deep/c.json": b"{}", "top.txt": b"three"}


def make(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, content in files.items():
                opened.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as opened:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                opened.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(params=["x.whl", "x.tgz"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path / request.param, FILES)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("pkg/*.txt", {"pkg/a.txt"}),
        ("pkg/**/*.txt", {"pkg/a.txt", "pkg/sub/b.txt"}),
        ("**", set(FILES)),
        ("**/[bc].*", {"pkg/sub/b.txt", "pkg/sub/deep/c.json"}),
        ("pkg/**/[!b].json", {"pkg/sub/deep/c.json"}),
        ("???.txt", {"top.txt"}),
    ],
)
def test_glob(archive: Path, pattern: str, names: set[str]) -> None:
    read = {name: stream.read() for name, stream in open_members(archive, pattern)}
    assert read == {name: FILES[name] for name in names}


def test_brackets_that_are_no_glob(archive: Path) -> None:
    with pytest.raises(PackageError, match=r"\[z-a\]\.txt: this is no glob"):
        list(open_members(archive, "[z-a].txt"))


def test_glob_specials_are_literal() -> None:
    assert glob_regex("a+(b).txt").fullmatch("a+(b).txt")
    assert not glob_regex("a.txt").fullmatch("aXtxt")
    assert not glob_regex("[!x].txt").fullmatch("/.txt")


def test_nothing_matches_names_the_nearest(archive: Path) -> None:
    with pytest.raises(PackageError, match=r"pkg/sub/b\.txt"):
        list(open_members(archive, "pkg/sub/bb.txt"))
    assert list_members(archive) == sorted(FILES)


def test_extract(archive: Path, tmp_path: Path) -> None:
    path = extract_member(archive, "pkg/sub/b.txt", tmp_path / "out")
    assert path == tmp_path / "out/pkg/sub/b.txt"
    assert path.read_bytes() == b"two"
    with pytest.raises(PackageError, match="no member"):
        extract_member(archive, "pkg/*.txt", tmp_path / "out")


@pytest.mark.parametrize("suffix", ["whl", "tgz"])
@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/etc/evil.txt", "..\\evil.txt", "C:/evil.txt"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, suffix: str, name: str) -> None:
    bad = make(tmp_path / f"bad.{suffix}", {name: b"x", "good.txt": b"y"})
    for action in (
        lambda: extract_member(bad, name, tmp_path / "out"),
        lambda: extract_member(bad, "good.txt", tmp_path / "out"),
        lambda: list(open_members(bad, "**")),
        lambda: list_members(bad),
    ):
        with pytest.raises(PackageError, match="unsafe path"):
            action()
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    bad = tmp_path / "bad.tgz"
    with tarfile.open(bad, "w:gz") as opened:
        info = tarfile.TarInfo("data.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        opened.addfile(info)
    with pytest.raises(PackageError, match="link or a device"):
        extract_member(bad, "data.txt", tmp_path / "out")


def test_symlink_in_zip_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.whl"
    with zipfile.ZipFile(bad, "w") as opened:
        info = zipfile.ZipInfo("data.txt")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(info, "/etc/passwd")
    with pytest.raises(PackageError, match="link or a device"):
        extract_member(bad, "data.txt", tmp_path / "out")


@pytest.mark.parametrize("suffix", ["whl", "tgz"])
def test_bombs_are_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = make(tmp_path / f"bad.{suffix}", {"data.txt": b"0" * 3_000_000})
    monkeypatch.setattr(archives, "RATIO_FLOOR", 1_000_000)
    with pytest.raises(PackageError, match="beyond what is accepted"):
        extract_member(bad, "data.txt", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 2_000_000)
    with pytest.raises(PackageError, match="beyond what is accepted"):
        list(open_members(bad, "**"))


def test_lie_about_the_size_stops(tmp_path: Path) -> None:
    """The central directory declares 10 bytes, the member inflates to a million."""
    bad = make(tmp_path / "bad.whl", {"data.txt": b"0" * 1_000_000})
    raw = bytearray(bad.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = raw.index(signature) + offset
        raw[at : at + 4] = (10).to_bytes(4, "little")
    bad.write_bytes(raw)
    with pytest.raises(PackageError, match="cannot be read"):
        extract_member(bad, "data.txt", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.txt"))


def test_cut_and_garbage_archives(tmp_path: Path) -> None:
    for suffix in ("whl", "tgz"):
        whole = make(tmp_path / f"x.{suffix}", {"data.txt": bytes(range(256)) * 4000})
        whole.write_bytes(whole.read_bytes()[:500])
        with pytest.raises(PackageError):
            extract_member(whole, "data.txt", tmp_path / "out")
        (tmp_path / f"y.{suffix}").write_bytes(b"not an archive")
        with pytest.raises(PackageError, match="cannot be read"):
            list(open_members(tmp_path / f"y.{suffix}", "**"))
