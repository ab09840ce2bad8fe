"""Stores to read from: web servers on the loopback that answer ranges, and some that do not answer as they should."""

from __future__ import annotations

import io
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@dataclass
class Answer:
    """One answer to a range request: what a server that lies may change."""

    status: int
    headers: dict[str, str]
    body: bytes
    pause: float = 0.0  # seconds between its bytes


@dataclass
class Store:
    """A web server. objects: by path. bend: changes the answers of a path. asked: the requests that came."""

    objects: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    bend: dict[str, Callable[[Answer, int], Answer]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    def start(self, context: ssl.SSLContext | None = None) -> Callable[[], None]:
        """Starts it; what stops it."""
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                store.asked.append(
                    (self.command, self.path, {name.lower(): text for name, text in self.headers.items()})
                )
                asked = sum(path == self.path for _, path, _ in store.asked)
                answer = store.answer(self.path, self.headers)
                bend = store.bend.get(self.path)
                answer = answer if bend is None else bend(answer, asked)
                self.send_response(answer.status)
                for name, text in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                try:
                    if not answer.pause:
                        self.wfile.write(answer.body)
                        return
                    for each in answer.body:
                        self.wfile.write(bytes([each]))
                        self.wfile.flush()
                        time.sleep(answer.pause)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        server = Server(("127.0.0.1", 0), Handler)
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop

    def answer(self, path: str, headers) -> Answer:
        """As it should be."""
        data = self.objects.get(path)
        if data is None:
            return Answer(404, {}, b"")
        etag = self.etags.get(path, '"one"')
        about = {"ETag": etag} if etag else {}
        if headers.get("If-Match", etag) != etag:
            return Answer(412, about, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        if wanted is None:
            return Answer(200, about, data)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first >= len(data):
            return Answer(416, about, b"")
        return Answer(206, {**about, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1])
