"""NVFlare's own exchange of arrays, without fedlm: the yardstick of the wire.

Two components that stand beside fedlm's relays in the same NVFlare processes. The coordinator's one serves a Unix
socket: {"megabytes": n, "silos": [...]} makes it send one array dictionary to every silo with `send_aux_request` (one
thread each) and answer with the seconds until all came back and were compared.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any

import numpy as np
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.shareable import Shareable
from nvflare.app_common.decomposers.numpy_decomposers import NumpyArrayDecomposer
from nvflare.fuel.utils import fobs

TOPIC = "bare"


def arrays(megabytes: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {f"layer.{i}": draw.standard_normal(2**18, dtype=np.float32) for i in range(megabytes)}


class BareSilo(FLComponent):  # type: ignore[misc]
    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type == EventType.SYSTEM_START:
            fobs.register(NumpyArrayDecomposer)
            fl_ctx.get_engine().register_aux_message_handler(TOPIC, self.on_message)

    def on_message(self, topic: str, request: Any, fl_ctx: Any) -> Any:  # noqa: ARG002  # NVFlare passes by keyword
        answer = Shareable()
        answer["arrays"] = request["arrays"]
        return answer


class BareCoordinator(FLComponent):  # type: ignore[misc]
    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type == EventType.SYSTEM_START:
            fobs.register(NumpyArrayDecomposer)
            self._engine = fl_ctx.get_engine()
            root = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()
            path = os.environ["BARE_SOCKET"]
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(path)
            self._listener.listen(1)
            threading.Thread(target=self._serve, name=f"bare {root}", daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rw") as stream:
                for line in stream:
                    wish = json.loads(line)
                    stream.write(json.dumps({"seconds": self._exchange(wish["megabytes"], wish["silos"])}) + "\n")
                    stream.flush()

    def _exchange(self, megabytes: int, silos: list[str]) -> float:
        sent = arrays(megabytes)
        wrong: list[str] = []

        def one(silo: str) -> None:
            request = Shareable()
            request["arrays"] = sent
            with self._engine.new_context() as fl_ctx:
                answers = self._engine.send_aux_request([silo], TOPIC, request, 300.0, fl_ctx, optional=True)
            got = answers[silo].get("arrays", {})
            if sent.keys() != got.keys() or not all(np.array_equal(sent[n], got[n]) for n in sent):
                wrong.append(silo)

        started = time.perf_counter()
        threads = [threading.Thread(target=one, args=[silo]) for silo in silos]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        return seconds if not wrong else float("nan")
