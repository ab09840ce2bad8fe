"""Requests that are ended from outside, for HTTP's own timeouts are of single bytes.

A server that sends a byte of its handshake or its headers now and then would keep who reads it for days. Of requests
that take too long, or whose caller has gone, the connection is shut down, and whoever waits for it is told that it has
ended.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from queryselect_service.errors import ServiceError
from queryselect_service.patience import Patience

PATIENCE = Patience()
#: `request`: what the thread is at.
_THREAD = threading.local()


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

    def end(self) -> None:
        """Shuts its connection down."""
        if self.line is not None:
            with suppress(OSError):  # it has just ended
                self.line.shutdown(socket.SHUT_RDWR)


@contextmanager
def watched(seconds: float, check: Callable[[], None]) -> Iterator[Request]:
    """A request of this thread, which is to end within so many seconds, and once `check` raises."""
    request = _THREAD.request = Request(time.monotonic() + seconds, check)
    try:
        with PATIENCE.ending(request.over, request.end):
            yield request
    finally:
        _THREAD.request = None


def _has(line: socket.socket) -> None:
    """The request of this thread has that connection now."""
    request: Request | None = getattr(_THREAD, "request", None)
    if request is not None:
        request.line = line


class Spare:
    """Of a connection of urllib3: a second handle on its line, which TLS does not take away."""

    _spare: socket.socket | None = None

    def _new_conn(self) -> socket.socket:
        made: socket.socket = super()._new_conn()  # type: ignore[misc]
        self._drop()
        self._spare = made.dup()
        _has(self._spare)
        return made

    def request(self, *arguments: Any, **more: Any) -> None:
        """As urllib3's own."""
        if self._spare is not None:  # a line that was there
            _has(self._spare)
        super().request(*arguments, **more)  # type: ignore[misc]

    def close(self) -> None:
        """As urllib3's own."""
        self._drop()
        super().close()  # type: ignore[misc]

    def _drop(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None
