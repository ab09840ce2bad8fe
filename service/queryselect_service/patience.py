"""Ends what keeps the server waiting: RPCs whose callers say nothing, and requests to stores that do not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from queryselect_service.call import Call

#: How often it is looked for those, in seconds.
EVERY = 0.1
#: What is refused while its message is coming can say so once the message is here; after so many seconds it just ends.
WORD = 1.0


class Context(Protocol):
    """What can be ended: a grpc.ServicerContext."""

    def cancel(self) -> object:
        """Ends it."""


class Patience:
    """One thread that looks after all that wait: a timer for each would be a thread for each."""

    def __init__(self) -> None:
        self._waiting: dict[object, tuple[Callable[[], bool], Callable[[], object]]] = {}
        self._changed, self._closed = threading.Condition(), False
        threading.Thread(target=self._look, name="patience", daemon=True).start()

    @contextmanager
    def ending(self, over: Callable[[], bool], end: Callable[[], object]) -> Iterator[None]:
        """Calls `end` once it is over, and again as long as what is done inside goes on; never after it."""
        mine = object()
        with self._changed:
            self._waiting[mine] = (over, end)
            if len(self._waiting) == 1:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                del self._waiting[mine]

    @contextmanager
    def ended_after(self, seconds: float, context: Context, call: Call | None = None) -> Iterator[None]:
        """Ends the RPC where what is done inside takes longer, or soon where the call is refused meanwhile."""
        since = time.monotonic()

        def over() -> bool:
            refused = call is not None and call.refused is not None
            return time.monotonic() - since > (min(WORD, seconds) if refused else seconds)

        with self.ending(over, context.cancel):
            yield

    def close(self) -> None:
        """Looks no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _look(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._end_late()
            time.sleep(EVERY)

    def _end_late(self) -> None:
        """Apart from the loop, whose variables would hold on to the last of them for as long as there is none."""
        for over, end in self._waiting.values():
            if over():
                end()
