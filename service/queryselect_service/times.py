"""Where the time of one request goes: noted once, for its answer, the metrics, the traces and the log alike."""

from __future__ import annotations

import threading
import time
from types import TracebackType

#: What a request can be at work on. Where it is at several at once (rows are scored while others come, a block is moved
#: within the kernel), the moment counts for the first of these: no moment counts twice.
PHASES = ("transfer", "kernel", "encode", "decode", "queue", "receive")


class Times:
    """The phases of one request, by time.monotonic. Thread-safe: the device's thread notes its own here.

    started: when the request came. spans: the first beginning and the last end of each phase. peak_bytes: the most
    bytes that it held on the device, where that can be told.
    """

    def __init__(self) -> None:
        self.started = self._since = time.monotonic()
        self.spans: dict[str, tuple[float, float]] = {}
        self.peak_bytes: int | None = None
        self._open = dict.fromkeys(PHASES, 0)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._failed_in, self._ended_last = "", "receive"
        self._lock = threading.Lock()

    @property
    def total(self) -> float:
        """The seconds since the request came."""
        return time.monotonic() - self.started

    @property
    def last(self) -> str:
        """Where the request was when it ended: the phase that failed first, else the one that ended last."""
        return self._failed_in or self._ended_last

    def seconds(self, phase: str) -> float:
        """The seconds that count for a phase so far; together they are no more than the total."""
        with self._lock:
            self._settle()
            return self._seconds[phase]

    def begin(self, phase: str) -> None:
        """The request is at it from now on; `end` must follow, in any thread."""
        with self._lock:
            now = self._settle()
            self._open[phase] += 1
            self.spans.setdefault(phase, (now, now))

    def end(self, phase: str, *, failed: bool = False) -> None:
        """The request is at it no more. failed: it will not get further."""
        with self._lock:
            now = self._settle()
            self._open[phase] -= 1
            self.spans[phase] = (self.spans[phase][0], now)
            self._ended_last = phase
            if failed and not self._failed_in:
                self._failed_in = phase

    def phase(self, name: str) -> Phase:
        """What is done inside is of that phase."""
        return Phase(self, name)

    def _settle(self) -> float:
        """Counts the time since this was called last; the time now."""
        now = time.monotonic()
        for phase, count in self._open.items():
            if count:
                self._seconds[phase] += now - self._since
                break
        self._since = now
        return now


class Phase:
    """See Times.phase. A class, since a generator would take longer than what it measures."""

    __slots__ = ("_name", "_times")

    def __init__(self, times: Times, name: str) -> None:
        self._times, self._name = times, name

    def __enter__(self) -> None:
        self._times.begin(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._times.end(self._name, failed=kind is not None)
