"""A small HTTP server for whoever watches a process: /metrics for Prometheus, /health for everything else.

It holds counts and durations, never text. It has no password, so it listens on this machine only unless told otherwise,
and serves a bounded number of watchers at a time. Imports no torch: any process may use it.
"""

from __future__ import annotations

import http.server
import json
import logging
import socketserver
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedlm.errors import MissingExtra, RunError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = logging.getLogger(__name__)

Health = Callable[[], tuple[bool, dict[str, Any]]]
"""Whether the process is healthy, and plain JSON to say why."""

WATCHERS = 16
"""Connections served at a time; others are closed at once."""

PATIENCE = 10.0
"""Seconds that a watcher may be silent for."""


def new_registry(feature: str = "--metrics-port") -> CollectorRegistry:
    """A registry that already holds this process's memory, CPU time, open files and threads.

    Raises:
        MissingExtra: prometheus_client isn't installed.
    """
    try:
        from prometheus_client import (
            CollectorRegistry,
            Gauge,
            PlatformCollector,
            ProcessCollector,
            disable_created_metrics,
        )
    except ImportError as error:
        raise MissingExtra(feature, "network") from error
    import psutil

    # else each counter has a second series, with the time of its birth
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)  # process_resident_memory_bytes, process_cpu_seconds_total, process_open_fds
    PlatformCollector(registry=registry)  # the version of Python
    threads = Gauge("fedlm_process_threads", "Threads of this process, C libraries' included.", registry=registry)
    threads.set_function(psutil.Process().num_threads)
    return registry


def serve_metrics(registry: CollectorRegistry, port: int, host: str = "127.0.0.1", *, health: Health) -> Endpoint:
    """Serve a registry and a health check until `close`, from a thread of its own.

    Args:
        port: 0 takes any free one; `Endpoint.port` says which.
        host: the address to listen on; "0.0.0.0" lets other machines read the figures.
        health: asked at every GET /health; 200 when it says True, else 503.

    Raises:
        RunError: the port is taken, or the address is not this machine's.
    """
    try:
        return Endpoint(registry, port, host, health)
    except OSError as error:
        raise RunError(
            f"metrics cannot be served on {host}:{port} ({error.strerror or error})",
            where="--metrics-port",
            fix="choose a free port, and an address of this machine",
        ) from error


class Endpoint:
    """The server that `serve_metrics` started. Use as a context manager, or call `close`.

    Attributes:
        host, port: where it listens.
    """

    def __init__(self, registry: CollectorRegistry, port: int, host: str, health: Health) -> None:
        self._server = _Server((host, port), _Handler)
        self._server.registry, self._server.health = registry, health
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="fedlm-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(http.server.ThreadingHTTPServer):
    registry: CollectorRegistry
    health: Health
    daemon_threads = True
    request_queue_size = 4 * WATCHERS
    # closing must not wait for a watcher that sends its request letter by letter
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(WATCHERS)
        super().__init__(*arguments)

    def server_bind(self) -> None:
        # HTTPServer's own would look up this machine's name, which takes seconds where no name server answers
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        if not isinstance(sys.exception(), OSError):  # a watcher that goes away in the middle is nobody's fault
            log.error("a request for metrics failed", exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = PATIENCE

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            from prometheus_client.exposition import choose_encoder

            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, kind, encode(self.server.registry))
        elif path == "/health":
            healthy, facts = self.server.health()
            body = json.dumps(facts, allow_nan=False) + "\n"
            self._answer(200 if healthy else 503, "application/json", body.encode())
        else:
            self._answer(404, "text/plain; charset=utf-8", b"There are /metrics and /health.\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "fedlm"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a watcher asks every few seconds."""
