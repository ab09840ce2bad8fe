"""A plain TCP connection over the loopback: what any transport between two processes can at best be."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

BLOCK = 1 << 20
#: A server on free ports that says which, and nothing else.
QUIETLY = ("--port", "0", "--metrics-port", "0", "--log-level", "WARNING")


@contextmanager
def process(*arguments: str, errors: IO[str] | None = None) -> Iterator[tuple[int, list[int]]]:
    """A Python process of its own that prints its ports after a colon; gives its pid and the ports.

    errors: a file for what it says of itself; where this process has its own, unless told.
    """
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True) as running:
        try:
            assert running.stdout is not None  # asked for above
            line = running.stdout.readline()
            if not line:
                raise RuntimeError(f"{' '.join(arguments)} did not start")
            yield running.pid, [int(number) for number in re.findall(r"\d+", line.partition(":")[2])]
        finally:
            running.terminate()


@contextmanager
def receiver() -> Iterator[tuple[int, int]]:
    """A process that takes what `tcp` sends; gives its pid and its port."""
    with process("-c", f"from {__name__} import receive; receive()") as (pid, (port,)):
        yield pid, port


def receive() -> None:
    """The other end of the connections. The first 9 bytes: whether to keep what follows, and how much it is."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(f":{listener.getsockname()[1]}", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            head = connection.recv(9, socket.MSG_WAITALL)
            keep, size = head[:1] == b"k", int.from_bytes(head[1:], "little")
            buffer = memoryview(np.empty(size if keep else BLOCK, np.uint8).data)
            at = 0
            while size:
                got = connection.recv_into(buffer[at : at + BLOCK] if keep else buffer, min(BLOCK, size))
                if not got:
                    break
                at, size = at + got, size - got
            connection.send(b"!")
            del buffer


def tcp(port: int, pool: np.ndarray[Any, Any], *, keep: bool) -> float:
    """Seconds until the receiver has everything."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        started = time.perf_counter()
        connection.sendall((b"k" if keep else b"d") + pool.nbytes.to_bytes(8, "little"))
        connection.sendall(pool.reshape(-1).view(np.uint8).data)
        connection.recv(1)
        return time.perf_counter() - started
