"""The one file that knows NVFlare from inside: the relays as components of its server and client processes.

NVFlare gives identities, mutual TLS and the connection that each silo opens to the coordinator. A component named in a
kit's `local/resources.json` is made when such a process starts, and hears of it once the connection stands. From then
on relays exchange plain bytes over the process's cell (`core_cell`: whole messages, no serialisation, no pickle, no
streams with timers). No NVFlare job is ever run. Written for and tested with NVFlare 2.9.0, which the extra pins.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.fuel.f3.cellnet.defs import Encoding, MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.coordinator_relay import CoordinatorRelay as Relay
from fedlm.federation.engines.flare.envelope import MAX_MESSAGE
from fedlm.federation.engines.flare.kit import Kit, read_kit, socket_path
from fedlm.federation.engines.flare.session import UnreachableError
from fedlm.federation.engines.flare.silo_relay import SiloRelay as SiloSide
from fedlm.federation.engines.flare.silo_relay import listen

CHANNEL, TOPIC = "fedlm", "relay"

LOST_SECONDS = 30.0
"""A silo that was not heard for this long counts as not connected, whatever its connection looks like."""


def _kit(fl_ctx: Any) -> Kit:
    """The kit that this process's workspace lies in."""
    return read_kit(Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()).parent)


def _or_end(start: Callable[[Any], None], fl_ctx: Any) -> None:
    """Start a relay, or end the process: NVFlare would only log the fault and go on without a relay."""
    try:
        start(fl_ctx)
    except Exception as error:
        print(f"fedlm relay: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _raw_only(message: Any) -> Any:
    """Refuse a message on our channel that is anything but plain bytes, before NVFlare would decode it."""
    encoding = message.get_header(MessageHeaderKey.PAYLOAD_ENCODING)
    size = len(message.payload) if message.payload is not None else 0
    if encoding not in (Encoding.BYTES, Encoding.NONE) or size > MAX_MESSAGE:
        return make_reply(ReturnCode.INVALID_REQUEST, "only plain bytes of bounded size travel here")
    return None


def _own_only(message: Any, own: str) -> Any:
    """Refuse a request for anybody but this process, which would pass it on: silos say nothing to one another.

    NVFlare checks whose name a message bears, but not that of a silo it has removed; a silo's relay must be able to
    believe that what comes in the coordinator's name comes from the coordinator.
    """
    if message.get_header(MessageHeaderKey.DESTINATION) == own:
        return None
    return make_reply(ReturnCode.INVALID_REQUEST, "nothing is passed on from silo to silo")


def _guard(core: Any) -> None:
    """Let only authentic plain bytes of bounded size arrive on our channel.

    NVFlare asks the filters of a channel in place of those of all channels: its own authentication is among the latter
    and must be repeated, or ours would switch it off.
    """
    for own in core.in_filter_reg.find(CHANNEL, TOPIC) or []:
        core.add_incoming_filter(CHANNEL, TOPIC, own.cb, *own.args, **own.kwargs)
    core.add_incoming_filter(CHANNEL, TOPIC, _raw_only)


class SiloRelay(FLComponent):  # type: ignore[misc]  # NVFlare has no types
    """In a silo's NVFlare client: hears the coordinator and nobody else."""

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type == EventType.SYSTEM_START:
            _or_end(self._start, fl_ctx)

    def _start(self, fl_ctx: Any) -> None:
        kit, engine = _kit(fl_ctx), fl_ctx.get_engine()
        self._client = engine.client
        self._network = kit.network
        self._relay = SiloSide(kit.name, kit.run / "spool", listen(socket_path(kit.path)), self._facts)
        core = engine.get_cell().core_cell
        _guard(core)
        core.register_request_cb(CHANNEL, TOPIC, self._answer)

    def _facts(self) -> dict[str, Any]:
        return {"network": self._network, "connected": bool(self._client.cell.is_cell_connected("server"))}

    def _answer(self, message: Any) -> Any:
        if message.get_header(MessageHeaderKey.ORIGIN) != "server":
            return make_reply(ReturnCode.INVALID_REQUEST, "only the coordinator may ask")
        return make_reply(ReturnCode.OK, body=self._relay.handle(bytes(message.payload or b"")))


class CoordinatorRelay(FLComponent):  # type: ignore[misc]
    """In the coordinator's NVFlare server."""

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type == EventType.SYSTEM_START:
            _or_end(self._start, fl_ctx)

    def _start(self, fl_ctx: Any) -> None:
        self._kit = _kit(fl_ctx)
        self._engine = fl_ctx.get_engine()
        self._core = self._engine.get_cell().core_cell
        _guard(self._core)
        self._core.set_message_interceptor(_own_only, self._core.get_fqcn())
        self._relay = Relay(
            self._kit.network,
            lambda: list(read_kit(self._kit.path).silos),  # read anew: a silo may be enrolled while this runs
            self,
            listen(socket_path(self._kit.path)),
            self._kit.root_certificate.read_bytes(),
        )

    # ---------------------------------------------------------------- what the relay needs of the network

    def send(self, silo: str, message: bytes, timeout: float) -> bytes:
        client = self._engine.get_client_from_name(silo)
        if client is None:
            raise UnreachableError("it is not connected")
        reply = self._core.send_request(
            channel=CHANNEL,
            topic=TOPIC,
            target=client.get_fqcn(),
            request=Message({}, message),
            timeout=timeout,
            optional=True,
        )
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        if code != ReturnCode.OK or not isinstance(reply.payload, bytes | bytearray | memoryview):
            raise UnreachableError(f"it does not answer ({code})")
        return bytes(reply.payload)

    def connected(self) -> dict[str, float]:
        now, found = time.time(), {}
        for client in self._engine.get_clients():
            age = max(0.0, now - client.last_connect_time)
            if age < LOST_SECONDS and self._core.is_cell_connected(client.get_fqcn()):
                found[client.name] = age
        return found

    def revoked(self) -> list[str]:
        return sorted(self._engine.client_manager.disabled_clients)

    def revoke(self, silo: str, restore: bool) -> None:
        if silo not in read_kit(self._kit.path).silos:
            raise NetworkError(f"there is no silo '{silo}' in this network")
        change = self._engine.enable_clients if restore else self._engine.disable_clients
        result = change([silo])
        if isinstance(result, dict) and result.get("errors"):
            raise NetworkError(f"NVFlare refused: {result['errors']}")
