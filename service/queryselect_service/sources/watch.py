"""Requests that are ended from outside, for HTTP's own timeouts are of single bytes.

A server that sends a byte of its handshake or its headers now and then would keep who reads it for days. One thread
looks after all requests: of those that take too long, or whose caller has gone, it shuts the connection down, and
whoever waits for it is told that it has ended.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from queryselect_service.engine import POLL
from queryselect_service.errors import ServiceError


class Request:
    """One that is under way: until when it may be, whether it is still wanted, and the connection that it has.

    late: whether it was ended because it took too long.
    """

    def __init__(self, until: float, check: Callable[[], None]) -> None:
        self._until, self._check = until, check
        self.line: socket.socket | None = None
        self.late = False

    def over(self) -> bool:
        """Whether it has to end."""
        try:
            self._check()
        except ServiceError:
            return True
        self.late = time.monotonic() > self._until
        return self.late


class Watch:
    """The requests that are under way, by the thread that makes each."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._changed = threading.Lock()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    @contextmanager
    def over(self, seconds: float, check: Callable[[], None]) -> Iterator[Request]:
        """A request of this thread, which is to end within so many seconds, and once `check` raises."""
        me, request = threading.get_ident(), Request(time.monotonic() + seconds, check)
        with self._changed:
            self._requests[me] = request
        try:
            yield request
        finally:
            with self._changed:
                del self._requests[me]

    def has(self, line: socket.socket) -> None:
        """The request of this thread has that connection now."""
        with self._changed:
            request = self._requests.get(threading.get_ident())
            if request is not None:
                request.line = line

    def _look(self) -> None:
        while True:
            time.sleep(2 * POLL)
            with self._changed:  # a connection that is given back meanwhile must not be the next one's
                for each in self._requests.values():
                    if each.line is not None and each.over():
                        with suppress(OSError):  # it has just ended
                            each.line.shutdown(socket.SHUT_RDWR)


WATCH = Watch()


class Spare:
    """Of a connection of urllib3: a second handle on its line, which TLS does not take away."""

    _spare: socket.socket | None = None

    def _new_conn(self) -> socket.socket:
        made: socket.socket = super()._new_conn()  # type: ignore[misc]
        self._drop()
        self._spare = made.dup()
        WATCH.has(self._spare)
        return made

    def request(self, *arguments: Any, **more: Any) -> None:
        """As urllib3's own."""
        if self._spare is not None:  # a line that was there
            WATCH.has(self._spare)
        super().request(*arguments, **more)  # type: ignore[misc]

    def close(self) -> None:
        """As urllib3's own."""
        self._drop()
        super().close()  # type: ignore[misc]

    def _drop(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None
