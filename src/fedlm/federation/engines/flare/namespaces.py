"""Network namespaces on one machine: parties that can reach nothing but each other's one port (Linux, root)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType

from fedlm.errors import NetworkError

_NET = "10.77.0."


class Namespaces:
    """One namespace per party, joined by a bridge that lies in the first party's namespace; removed at the end.

    Attributes:
        host: the first party's address.

    Raises:
        NetworkError: the system does not allow namespaces.
    """

    host = f"{_NET}1"

    def __init__(self, parties: Sequence[str]) -> None:
        self._names = {party: f"fedlm-{os.getpid()}-{number}" for number, party in enumerate(parties)}

    def prefix(self, party: str) -> list[str]:
        """What a command begins with to run in a party's namespace."""
        return ["ip", "netns", "exec", self._names[party]]

    def __enter__(self) -> Namespaces:
        first, *others = self._names.values()
        try:
            for space in self._names.values():
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", first, "link", "add", "bridge", "type", "bridge")
            _ip("-n", first, "addr", "add", f"{self.host}/24", "dev", "bridge")
            _ip("-n", first, "link", "set", "bridge", "up")
            for number, space in enumerate(others, start=2):
                _ip("-n", first, "link", "add", f"to-{number}", "type", "veth", "peer", "name", "up0", "netns", space)
                _ip("-n", first, "link", "set", f"to-{number}", "master", "bridge", "up")
                _ip("-n", space, "addr", "add", f"{_NET}{number}/24", "dev", "up0")
                _ip("-n", space, "link", "set", "up0", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for space in self._names.values():
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)


def possible() -> bool:
    """Whether this user may make namespaces here."""
    if shutil.which("ip") is None:
        return False
    try:
        with Namespaces(["a", "b"]):
            return True
    except NetworkError:
        return False


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(
            f"network namespaces are not possible here ({done.stderr.strip()})",
            where=" ".join(["ip", *words]),
            fix="run as root on Linux, or leave --namespaces out",
        )
