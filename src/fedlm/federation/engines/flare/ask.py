"""Asking a running relay through its Unix socket: status, and who is refused."""

from __future__ import annotations

import json
import socket
from typing import Any

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.kit import Kit, socket_path, write_private
from fedlm.federation.engines.lines import ClosedError, Lines, Message

DISABLED = "disabled_clients.json"
"""NVFlare's list of clients that may not connect, in the server's workspace."""


class NotRunningError(NetworkError):
    """Nobody listens at the kit's socket."""


def ask(kit: Kit, message: Message, timeout: float = 10.0) -> Message:
    """Send one message to the kit's relay and return its answer.

    Raises:
        NotRunningError: nobody listens.
        NetworkError: no answer, or a refusal with its reason.
    """
    path, start = socket_path(kit.path), f"fedlm {kit.kind} start"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            raise NotRunningError(
                f"the {kit.kind} of {kit.network} does not run here", where=str(kit.path), fix=f"is `{start}` running?"
            ) from None
        try:
            lines = Lines(connection)
            lines.send(message)
            answer = lines.receive(timeout)
        except ClosedError:
            answer = None
    if answer is None:
        raise NetworkError(
            "the relay does not answer", where=str(kit.path), fix=f"look at {kit.logs}, restart `{start}`"
        )
    if answer.get("type") == "error":
        raise NetworkError(str(answer.get("reason", "refused")), where=kit.network)
    return answer


def status_of(kit: Kit, timeout: float = 10.0) -> dict[str, Any]:
    """What the relay says of itself and, at a coordinator, of each silo. Raises as `ask`."""
    return ask(kit, {"type": "status"}, timeout)


def change_access(kit: Kit, silo: str, restore: bool) -> bool:
    """Refuse a silo from now on, or accept it again: at once when the coordinator runs, else at its next start.

    Returns:
        Whether the coordinator runs.

    Raises:
        NetworkError: no such silo, or the list cannot be written.
    """
    if silo not in kit.silos:
        from fedlm.errors import nearest

        raise NetworkError(
            f"'{silo}' is not enrolled in {kit.network}", where=str(kit.path), fix=nearest(silo, kit.silos)
        )
    try:
        ask(kit, {"type": "restore" if restore else "revoke", "silo": silo})
        return True
    except NotRunningError:
        refused = set(revoked(kit))
        refused = refused - {silo} if restore else refused | {silo}
        write_private(kit.workspace / DISABLED, json.dumps({"disabled_clients": sorted(refused)}).encode())
        return False


def revoked(kit: Kit) -> list[str]:
    """Silos that the coordinator refuses, by its file.

    Raises:
        NetworkError: the file is damaged. NVFlare would not start with it either, rather than let everyone in.
    """
    path = kit.workspace / DISABLED
    try:
        names = json.loads(path.read_text())["disabled_clients"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        names = None
    if not isinstance(names, list):
        raise NetworkError("the list of revoked silos is damaged", where=str(path), fix="restore it from a backup")
    return [str(name) for name in names]
