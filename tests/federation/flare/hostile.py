"""An enrolled silo turned hostile: a component of its NVFlare process that sends what no relay would send.

It knows NVFlare as well as fedlm does and has a valid certificate; it writes what came back to HOSTILE_NOTES.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.message import Message

from fedlm.federation.engines.flare.envelope import pack
from fedlm.federation.engines.flare.site import CHANNEL, TOPIC

FORGED = "forged-origin"


def forge(message: Any) -> None:
    """NVFlare writes the sender's own name last, but asks filters after that."""
    if name := message.get_header(FORGED):
        message.set_header(MessageHeaderKey.ORIGIN, name)


class Trap:
    """Unpickling it leaves a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(os.environ["HOSTILE_MARK"]),)


def payloads() -> dict[str, tuple[dict[str, Any], Any]]:
    trap = Shareable()
    trap["trap"] = "x" * 1000
    words = {"silo": os.environ["HOSTILE_TARGET"], "verb": "train", "run": "r", "round": 0, "attempt": 0, "fields": {}}
    ask: dict[str, Any] = {"op": "ask", "id": "1", "request": words, "retries": 0, "patience": 60.0}
    ask["tensors"] = {"sha256": "0" * 64, "size": 100}
    return {
        "pickle as bytes": ({}, pickle.dumps(Trap())),
        "pickle that claims to be fobs": ({MessageHeaderKey.PAYLOAD_ENCODING: "fobs"}, pickle.dumps(Trap())),
        "fobs object": ({}, trap),
        "a header that claims gigabytes": ({}, b"\xff\xff\xff\xff" + b"{}"),
        "a large message": ({}, bytes(45 * 2**20)),
        "a call of the coordinator's": ({}, pack({"op": "status"})),
        "in the coordinator's name": ({FORGED: "server"}, pack(ask, b"x" * 10)),
    }


class Hostile(FLComponent):  # type: ignore[misc]
    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type == EventType.SYSTEM_START:
            self._core = fl_ctx.get_engine().get_cell().core_cell
            for own in self._core.out_req_filter_reg.find(CHANNEL, TOPIC):  # NVFlare's, which adds the token
                self._core.out_req_filter_reg.append(CHANNEL, TOPIC, own)
            self._core.add_outgoing_request_filter(CHANNEL, TOPIC, forge)
            threading.Thread(target=self._attack, daemon=True).start()

    def _attack(self) -> None:
        notes = {}
        for target in ("server", os.environ["HOSTILE_TARGET"]):
            for name, (headers, payload) in payloads().items():
                reply = self._core.send_request(
                    channel=CHANNEL, topic=TOPIC, target=target, request=Message(dict(headers), payload), timeout=3.0
                )
                body = reply.payload
                notes[f"{name} to {target}"] = {
                    "code": str(reply.get_header(MessageHeaderKey.RETURN_CODE)),
                    "body": len(body) if isinstance(body, bytes | bytearray | memoryview) else str(type(body)),
                }
        Path(os.environ["HOSTILE_NOTES"]).write_text(json.dumps(notes))
