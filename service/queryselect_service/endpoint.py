"""/metrics over HTTP: in Prometheus' text format, or in OpenMetrics where that is asked for."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler

#: Connections at a time. Where one more comes, the oldest goes: who says nothing keeps no scraper away.
CONNECTIONS = 16
#: Silence after which a connection is closed, in seconds.
SILENCE = 10.0
#: How long to wait where a connection can't be taken, in seconds.
PAUSE = 0.1

log = logging.getLogger(__name__)


class Handler(MetricsHandler):
    """One connection."""

    timeout = SILENCE


class Endpoint(ThreadingHTTPServer):
    """The endpoint, listening once it is made; port 0 takes a free one (`server_port`)."""

    daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        """Raises OSError where the address is taken."""
        self._open: dict[Any, None] = {}  # in the order in which they came
        self._changed = threading.Lock()
        (self.address_family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        super().__init__(address[:2], type("Handler", (Handler,), {"registry": registry}))  # type: ignore[arg-type]
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Listens no more."""
        self.shutdown()
        self.server_close()

    def get_request(self) -> Any:
        """The next connection. Where there are no descriptors left it stays there, and is not asked for at once."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread of its own."""
        with self._changed:
            while len(self._open) >= CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):  # it has just ended
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Every connection's end."""
        with self._changed:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Where a scraper broke off."""
        log.debug("a scrape failed: %s", sys.exception())
