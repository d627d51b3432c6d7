"""A kit: the folder that makes a machine one party of a network. Reading it, and where its processes meet.

Imports neither torch nor NVFlare: relays read kits too.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from fedlm.errors import NetworkError, RecipeError
from fedlm.recipe.yamltree import parse_yaml

FORMAT = 1
"""Version of the kit's layout; a kit of another one is refused."""

KIT_FILE = "kit.yaml"
DEMO_LABEL = "demo keys: all private keys were made in one place"
_SOCKET = "relay.sock"
_LONGEST_SOCKET = 100  # sun_path holds 108 bytes on Linux, 104 on macOS, with the final zero

Kind = Literal["coordinator", "silo"]
Keys = Literal["own", "demo"]


@dataclass(frozen=True)
class Kit:
    """What kit.yaml says, and where things lie."""

    path: Path
    """The kit's folder, absolute."""
    kind: Kind
    network: str
    name: str
    """The silo's name, or 'coordinator'."""
    org: str
    fedlm: str
    """Version of fedlm that made the kit."""
    host: str
    """Where the coordinator listens."""
    port: int
    keys: Keys
    """'demo': all private keys were made in one place."""
    created: str
    silos: tuple[str, ...] = ()
    """Names enrolled; only a coordinator's kit knows them."""
    root: str = ""
    """SHA-256 of the root certificate (hex)."""

    @property
    def workspace(self) -> Path:
        """NVFlare's own folder (`startup/`, `local/`)."""
        return self.path / ("server" if self.kind == "coordinator" else "site")

    @property
    def startup(self) -> Path:
        return self.workspace / "startup"

    @property
    def local(self) -> Path:
        return self.workspace / "local"

    @property
    def certificate(self) -> Path:
        return self.startup / ("server.crt" if self.kind == "coordinator" else "client.crt")

    @property
    def key(self) -> Path:
        return self.startup / ("server.key" if self.kind == "coordinator" else "client.key")

    @property
    def root_certificate(self) -> Path:
        return self.startup / "rootCA.pem"

    @property
    def operator(self) -> Path:
        """Folder with client.crt, client.key, rootCA.pem of who may run federations."""
        return self.path / "operator" / "startup"

    @property
    def ca(self) -> Path:
        return self.path / "ca"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def logs(self) -> Path:
        return self.path / "logs"


def read_kit(path: Path | str, kind: Kind | None = None) -> Kit:
    """The kit in this folder.

    Args:
        path: the kit's folder.
        kind: what kind of kit is wanted, when only one will do.

    Raises:
        NetworkError: no kit, not readable, of another format, incomplete, or of the other kind.
    """
    folder = Path(path).resolve()  # one kit has one name, or two starts would not see each other
    file = folder / KIT_FILE
    fix = "give the folder that holds kit.yaml, made by `fedlm network new` or `fedlm network join`"
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if (folder / "pending").is_dir():
            fix = "wait for the coordinator's answer, then `fedlm network join NAME.signed.zip --out KIT`"
            raise NetworkError("this kit waits for its certificate", where=str(folder), fix=fix) from None
        raise NetworkError("this is not a kit: it has no kit.yaml", where=str(folder), fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise NetworkError(f"kit.yaml cannot be read: {reason}", where=str(folder), fix=fix) from None
    try:
        data = parse_yaml(text, str(file)).data
    except RecipeError:
        raise NetworkError("kit.yaml is damaged", where=str(file), fix="make the kit again") from None
    kit = parse_kit(folder, data)
    if kind is not None and kit.kind != kind:
        raise NetworkError(
            f"this is the kit of a {kit.kind}, not of a {kind}",
            where=str(folder),
            fix=f"give a {kind}'s kit, or use the command for a {kit.kind}",
        )
    return kit


def parse_kit(folder: Path, data: dict[str, Any]) -> Kit:
    """The kit that kit.yaml's data describes. Raises NetworkError: another format, something missing or not valid."""
    where = str(folder / KIT_FILE)
    if data.get("format") != FORMAT:
        raise NetworkError(
            f"this kit has format {data.get('format')!r}, this fedlm reads format {FORMAT}",
            where=where,
            fix="make the kit again with this version of fedlm, or install the version that made it: "
            f"{data.get('fedlm', 'unknown')}",
        )
    words = {key: data.get(key) for key in ("network", "name", "org", "fedlm", "host", "created")}
    root, port, silos = data.get("root", ""), data.get("port"), data.get("silos", [])
    faulty = [key for key, value in words.items() if not isinstance(value, str) or not value]
    if data.get("kind") not in ("coordinator", "silo"):
        faulty.append("kind")
    if data.get("keys") not in ("own", "demo"):
        faulty.append("keys")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        faulty.append("port")
    if not isinstance(silos, list) or not all(isinstance(s, str) for s in silos):
        faulty.append("silos")
    if not isinstance(root, str):
        faulty.append("root")
    if faulty:
        raise NetworkError(
            f"kit.yaml is damaged: {', '.join(faulty)} missing or not valid", where=where, fix="make the kit again"
        )
    known = {**words, "kind": data["kind"], "keys": data["keys"], "port": port, "root": root}
    return Kit(path=folder, silos=tuple(silos), **known)


def write_kit(kit: Kit) -> None:
    """Write the kit's kit.yaml (0600), atomically."""
    data: dict[str, Any] = {"format": FORMAT, "kind": kit.kind, "network": kit.network, "name": kit.name}
    data |= {"org": kit.org, "fedlm": kit.fedlm, "host": kit.host, "port": kit.port, "root": kit.root}
    data |= {"keys": kit.keys, "created": kit.created}
    if kit.kind == "coordinator":
        data["silos"] = list(kit.silos)
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 200
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    if kit.keys == "demo":
        text.write(f"# {DEMO_LABEL}\n")
    yaml.dump(data, text)
    write_private(kit.path / KIT_FILE, text.getvalue().encode())


def socket_path(kit: Path | str) -> Path:
    """The Unix socket of the kit's relay: KIT/run/relay.sock, or a short path where that one would be too long.

    The folder exists afterwards, private to this user.

    Raises:
        NetworkError: the folder for short paths is someone else's.
    """
    path = Path(kit).resolve() / "run" / _SOCKET
    if len(os.fsencode(path)) <= _LONGEST_SOCKET:
        private_folder(path.parent)
        return path
    folder = Path(tempfile.gettempdir()) / f"fedlm-{os.getuid()}"
    private_folder(folder)
    return folder / (hashlib.sha256(os.fsencode(path)).hexdigest()[:32] + ".sock")


def private_folder(folder: Path) -> Path:
    """Make the folder, or tighten it, so that only this user may enter (0700).

    Raises:
        NetworkError: it exists and belongs to someone else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise NetworkError(
            "this folder must be this user's own, and no link", where=str(folder), fix="remove it, or own it"
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user may read (0600), whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
