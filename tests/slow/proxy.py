"""A TCP proxy between client and server that does to a connection what networks do: it delays, throttles, stalls, cuts.

with Proxy(server.port) as proxy, Client(proxy.target) as client:
    proxy.delay = 0.02
    proxy.cut_after(UP, 1_000_000)  # the first connection that has sent so much from now on

UP is what the client sends, DOWN what the server does.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Self

UP, DOWN = "up", "down"
#: The most bytes that go on at a time.
PIECE = 64 << 10
#: How often a thread looks whether anything has changed, in seconds.
TICK = 0.02


class Proxy:
    """Listens on a free port of the loopback and connects every caller to `port`.

    passed: bytes that went on, by direction. delay: seconds that every piece waits. rate: bytes per second in each
    direction of a connection, None for as fast as it goes. The last two count from when they are set.
    """

    def __init__(self, port: int) -> None:
        self._behind, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TICK)
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay, self.rate, self.passed = 0.0, None, {UP: 0, DOWN: 0}
        self._lock, self._closed, self._letting = threading.Lock(), threading.Event(), True
        self._flowing = {UP: threading.Event(), DOWN: threading.Event()}
        self._left: dict[str, tuple[int, bool]] = {}  # until the cut: bytes in a direction, and whether by a reset
        self._links: set[_Link] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        for each in self._flowing.values():
            each.set()

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._accepting.join()
        self._listener.close()
        self.cut()

    def cut(self, *, reset: bool = True) -> int:
        """Ends every connection now, by a reset or by an orderly end; how many there were."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.end(reset)
        for link in links:
            link.join()
        return len(links)

    def cut_after(self, way: str, nbytes: int, *, reset: bool = True) -> None:
        """Cuts once so many more bytes have gone that way, over all connections; once."""
        with self._lock:
            self._left[way] = (nbytes, reset)

    def refuse(self) -> None:
        """Cuts every connection, and takes no other."""
        self._letting = False
        self.cut()

    def let_through(self) -> None:
        """Takes connections again, and lets flow what was stalled."""
        self._letting = True
        for each in self._flowing.values():
            each.set()

    def stall(self, *ways: str) -> None:
        """Nothing goes on that way any more, and nobody is told."""
        for way in ways:
            self._flowing[way].clear()

    def flows(self, way: str) -> bool:
        """Whether pieces go on that way, after a short wait where they don't."""
        return self._flowing[way].wait(TICK)

    def allowed(self, way: str, nbytes: int) -> tuple[int, bool | None]:
        """How many of the bytes may go on, and where that is the end of the connection whether by a reset."""
        with self._lock:
            self.passed[way] += nbytes
            if way not in self._left:
                return nbytes, None
            left, reset = self._left[way]
            if nbytes < left:
                self._left[way] = (left - nbytes, reset)
                return nbytes, None
            del self._left[way]
            return left, reset

    def forget(self, link: _Link) -> None:
        """The connection has ended."""
        with self._lock:
            self._links.discard(link)

    def _accept(self) -> None:
        while not self._closed.is_set():
            with suppress(TimeoutError):
                caller, _ = self._listener.accept()
                try:
                    behind = socket.create_connection(("127.0.0.1", self._behind)) if self._letting else None
                except ConnectionError:
                    behind = None  # whoever is asked has gone
                if behind is None:
                    _close(caller, reset=True)
                    continue
                with self._lock:
                    self._links.add(_Link(self, caller, behind))


class _Link:
    """One connection: a thread for each direction."""

    def __init__(self, proxy: Proxy, caller: socket.socket, behind: socket.socket) -> None:
        self._proxy, self._sockets, self._reset = proxy, (caller, behind), True
        self._ended, self._left = threading.Event(), 2
        for each in self._sockets:
            each.settimeout(TICK)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = ((UP, caller, behind), (DOWN, behind, caller))
        self._threads = [threading.Thread(target=self._run, args=way, daemon=True) for way in ways]
        for each in self._threads:
            each.start()

    def end(self, reset: bool) -> None:
        """Lets the threads go home."""
        self._reset = reset
        self._ended.set()

    def join(self) -> None:
        """Waits until the connection is closed."""
        for each in self._threads:
            each.join()

    def _run(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        try:
            while not self._ended.is_set():
                with suppress(TimeoutError):
                    piece = source.recv(PIECE)
                    if not piece:
                        self.end(reset=False)
                        return
                    self._pass_on(way, piece, sink)
        except OSError:
            self.end(reset=True)  # either side has broken off, so the other learns the same
        finally:
            self._leave()

    def _pass_on(self, way: str, piece: bytes, sink: socket.socket) -> None:
        proxy = self._proxy
        time.sleep(proxy.delay + (len(piece) / proxy.rate if proxy.rate else 0.0))
        while not proxy.flows(way):
            if self._ended.is_set():
                return
        some, reset = proxy.allowed(way, len(piece))
        rest = memoryview(piece)[:some]
        while rest and not self._ended.is_set():
            with suppress(TimeoutError):
                rest = rest[sink.send(rest) :]
        if reset is not None:
            self.end(reset)

    def _leave(self) -> None:
        """The last thread that goes home closes the door."""
        with self._proxy._lock:
            self._left -= 1
            last = not self._left
        if last:
            for each in self._sockets:
                _close(each, reset=self._reset)
            self._proxy.forget(self)


def _close(end: socket.socket, *, reset: bool) -> None:
    if reset:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
