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
from dataclasses import dataclass, field

import torch

from queryselect_service.errors import Busy, Cancelled, DeadlineExceeded, OutOfMemory
from queryselect_service.request import Problem
from queryselect_service.settings import Settings
from queryselect_service.shards import Whole
from queryselect_service.strategy import Selection

#: How often a waiting caller looks whether it is still wanted, in seconds.
POLL = 0.05
#: When a caller who found the line full should come back, in seconds.
RETRY_AFTER = 1.0


@dataclass
class Call:
    """One caller: whether it still wants the answer, and until when (time.monotonic)."""

    request_id: str
    deadline: float | None = None
    gone: threading.Event = field(default_factory=threading.Event)

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
    """Runs problems on one device, one at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        name = settings.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        self._turn = threading.Lock()
        self._count = threading.Lock()
        self._waiting = 0

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

    def run(self, problem: Problem, call: Call, times: Times) -> Selection:
        """Waits for the device and solves the problem there.

        Raises Busy where the line is full or the wait too long, Cancelled or DeadlineExceeded where the caller has
        gone, OutOfMemory where the device's memory ends.
        """
        started = time.monotonic()
        self._wait(call)
        times.queue = time.monotonic() - started
        try:
            with torch.inference_mode():
                return self._solve(problem, call, times)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the very tensors that filled the device
            torch.cuda.empty_cache()
            raise OutOfMemory(
                f"{self.device} is out of memory; its caches are empty now", retry_after=RETRY_AFTER
            ) from None
        finally:
            self._turn.release()

    def _solve(self, problem: Problem, call: Call, times: Times) -> Selection:
        started = time.monotonic()
        moved = problem.to(self.device)
        times.transfer = time.monotonic() - started
        started = time.monotonic()
        selection = moved.solve(Whole(problem.size, call.check))
        times.kernel = time.monotonic() - started
        return selection

    def _wait(self, call: Call) -> None:
        if self._turn.acquire(blocking=False):
            return
        with self._count:
            if self._waiting >= self.settings.max_queue:
                raise Busy(f"{self._waiting} requests are waiting for {self.device} already", retry_after=RETRY_AFTER)
            self._waiting += 1
        try:
            until = time.monotonic() + self.settings.queue_wait
            while not self._turn.acquire(timeout=POLL):
                call.check()
                if time.monotonic() > until:
                    raise Busy(
                        f"{self.device} was not free within {self.settings.queue_wait:g} s", retry_after=RETRY_AFTER
                    )
        finally:
            with self._count:
                self._waiting -= 1
