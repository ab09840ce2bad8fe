"""Threads that a server can't do without: all there from the start, and none of them dies alone.

gRPC has one thread for everything. It hands RPCs to pools, which start their threads when they are first needed; where
the system has none left then, or no memory, that one thread dies, and the server listens and never answers again.
"""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

#: What a process ends with where it can't go on: EX_SOFTWARE of sysexits.h.
CANNOT_GO_ON = 70

log = logging.getLogger(__name__)


def started(count: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are there already, and for which torch uses no others.

    torch would give each of them helpers, which go on turning for a while after each operation that they took part in.
    Whom it meets first later on is not told the same.
    """
    before, ready = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # or torch would ask for its usual number later, in the thread's first operation
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(count, name, begin)
    for _ in range(count):
        pool.submit(int)  # a thread each, as none is ready yet
    ready.wait()
    torch.set_num_threads(before)
    return pool


def end_with_threads() -> None:
    """Ends this process where a thread of it dies of an error: whoever watches it starts another."""

    def end(died: threading.ExceptHookArgs) -> None:
        try:
            name = died.thread.name if died.thread is not None else "unknown"
            log.critical("thread %s died, and the server with it", name, exc_info=died.exc_value)
        finally:
            os._exit(CANNOT_GO_ON)

    threading.excepthook = end
