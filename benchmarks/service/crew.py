"""Processes that start work together, as clients on as many machines would.

They are forked from a server of forks, which has imported what they need and never used gRPC: 64 start within seconds,
where as many interpreters would import for half a minute. Never fork from a process that serves, or that has called.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Found = TypeVar("Found")

#: Makes itself ready, calls what it is given to wait for the others, works until the time.monotonic() that this
#: returns, and says what it found. The number is its own, from 0.
Work = Callable[[int, Callable[[], float]], Found]

#: What is waited for at most beyond the time that was agreed: to be ready, and to say what was found, in seconds.
PATIENCE = 60.0

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["benchmarks.service.load", "benchmarks.service.health"])


class Crew(Generic[Found]):
    """So many processes that do the same. A context manager: they are there when it begins, and gone when it ends.

    nice: by how much they step back, so that what they load is measured and not who is given a core.
    """

    def __init__(self, count: int, work: Work[Found], *, nice: int = 0) -> None:
        pipes = [_forks.Pipe() for _ in range(count)]
        self._ends = [end for end, _ in pipes]
        self._processes = [
            _forks.Process(target=_work, args=(other, work, number, nice), daemon=True)
            for number, (_, other) in enumerate(pipes)
        ]
        self._others = [other for _, other in pipes]
        self._until = 0.0

    def __enter__(self) -> Self:
        for each, other in zip(self._processes, self._others, strict=True):
            each.start()
            other.close()  # so that the end of the process is the end of the pipe
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._processes:
            if error is not None:
                each.terminate()
        for each in self._processes:
            each.join(PATIENCE)
        for end in self._ends:
            end.close()

    def begin(self, seconds: float) -> None:
        """Waits until all are ready, and lets them work for so long."""
        for end in self._ends:
            _receive(end, PATIENCE)
        self._until = time.monotonic() + seconds
        for end in self._ends:
            end.send(self._until)

    def found(self) -> list[Found]:
        """Waits for the end; what each found. Raises RuntimeError where one has failed."""
        return [_receive(end, self._until + PATIENCE - time.monotonic()) for end in self._ends]


def _receive(end: Connection, seconds: float) -> Any:
    try:
        if not end.poll(max(0.0, seconds)):
            raise RuntimeError(f"a process said nothing for {seconds:.0f} s")
        said, failure = end.recv()
    except EOFError:
        raise RuntimeError("a process ended before it said what it found") from None
    if failure:
        raise RuntimeError(f"a process has failed:\n{failure}")
    return said


def _work(end: Connection, work: Work[Found], number: int, nice: int) -> None:
    """What each process does."""

    def start() -> float:
        end.send((None, ""))
        until: float = end.recv()
        return until

    os.nice(nice)
    with end:
        try:
            end.send((work(number, start), ""))
        except Exception:  # noqa: BLE001  # whoever waits is told
            end.send((None, traceback.format_exc()))
