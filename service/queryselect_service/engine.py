"""The device, and whose turn it is.

Requirements that the design meets:

- One selection at a time on a device: two would only share its bandwidth and double the memory.
- Waiting is bounded in number and in time; a caller who has gone leaves the line.
- A selection stops at the next check of shards.py's verbs once its caller has gone or its deadline has passed.
- A device that runs out of memory fails one request, never the server.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from queryselect_service.errors import Busy, Cancelled, DeadlineExceeded, OutOfMemory
from queryselect_service.request import Request
from queryselect_service.settings import Settings
from queryselect_service.shards import Whole
from queryselect_service.strategy import Selection

#: How often a waiting caller looks whether it is still wanted, in seconds.
POLL = 0.05
#: When a caller who found no room should come back, in seconds.
RETRY_AFTER = 1.0


@dataclass(eq=False)
class Call:
    """One caller: whether it still wants the answer, until when (time.monotonic), and whom to tell how far it is."""

    request_id: str
    deadline: float | None = None
    gone: threading.Event = field(default_factory=threading.Event)
    report: Callable[[int, int], None] = lambda *_: None

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded."""
        if self.gone.is_set():
            raise Cancelled("the caller has gone")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded("the caller's deadline has passed")


@dataclass
class Times:
    """Seconds that a request spent in each phase."""

    queue: float = 0.0
    receive: float = 0.0
    decode: float = 0.0
    transfer: float = 0.0
    kernel: float = 0.0


class Engine:
    """Runs selections on one device, one at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        name = settings.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        self._line: deque[Call] = deque()
        self._changed = threading.Condition()

    def probe(self) -> None:
        """One tiny operation on the device. Raises RuntimeError where it does not work."""
        try:
            torch.zeros(2, device=self.device).sum().item()
        except Exception as error:  # torch asserts where it was built without CUDA
            raise RuntimeError(f"device {self.device} does not work: {error}") from error

    @property
    def model(self) -> str | None:
        """The maker's name of the device, None for a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def memory(self) -> tuple[int, int]:
        """The free and the total bytes of the device's memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")

    def run(self, request: Request, call: Call, times: Times) -> Selection:
        """Waits for the device and selects there.

        Raises Busy where the line is full or the wait too long, Cancelled or DeadlineExceeded where the caller has
        gone, OutOfMemory where the memory of device or host ends.
        """
        started = time.monotonic()
        with self._turn(call):
            times.queue = time.monotonic() - started
            try:
                with torch.inference_mode():
                    return self._solve(request, call, times)
            except (MemoryError, RuntimeError) as error:
                if not _ran_out(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold the very tensors that filled the memory
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                message = f"{self.device} is out of memory; its caches are empty now"
                raise OutOfMemory(message, retry_after=RETRY_AFTER) from None

    def _solve(self, request: Request, call: Call, times: Times) -> Selection:
        started = time.monotonic()
        problem = request.problem().to(self.device)
        times.transfer = time.monotonic() - started
        started = time.monotonic()
        selection = problem.solve(Whole(problem.size, call.check, call.report))
        times.kernel = time.monotonic() - started
        return selection

    @contextmanager
    def _turn(self, call: Call) -> Iterator[None]:
        """First come, first served; the first in the line has the device."""
        until = time.monotonic() + self.settings.queue_wait
        with self._changed:
            waiting = len(self._line) - 1
            if waiting >= self.settings.max_queue:
                raise Busy(f"{waiting} requests are waiting for {self.device} already", retry_after=RETRY_AFTER)
            self._line.append(call)
        try:
            with self._changed:
                while self._line[0] is not call:
                    call.check()
                    if time.monotonic() > until:
                        wait = self.settings.queue_wait
                        raise Busy(f"{self.device} was not free within {wait:g} s", retry_after=RETRY_AFTER)
                    self._changed.wait(POLL)
            yield
        finally:
            with self._changed:
                self._line.remove(call)
                self._changed.notify_all()


def _ran_out(error: Exception) -> bool:
    """Whether memory ended: of the device, of Python, or of torch's allocator on the host, which has no own error."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
