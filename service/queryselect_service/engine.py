"""The devices, and how a selection gets its turn on one.

Requirements that the design meets:

- One job at a time on a device: two would only share its bandwidth and double the memory. A thread of its own runs
  them, in the order of `queue.py`; nothing else waits for it. Small pointwise jobs side by side were tried: on two
  cores they made no request faster and took a fifth more, since what they wait for is Python's lock.
- One line for all devices: whichever is free takes the next job, so that none idles while another has a line. What has
  begun on one, rows of a stream that are scored as they come, goes on there.
- A request is admitted before its bytes travel: it has a place, and the memory that it will need is set aside.
- A selection stops at the next check of shards.py's verbs once its caller has gone or its deadline has passed.
- A device that runs out of memory fails one request, never the server.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from queryselect_service.call import Call
from queryselect_service.device import Device, find
from queryselect_service.errors import Busy, DeviceLost, DoesNotFit, OutOfMemory, OverLimit, ServiceError, out_of_memory
from queryselect_service.queue import RETRY_AFTER, Job, Queue, Room
from queryselect_service.request import Problem, Request
from queryselect_service.settings import Settings
from queryselect_service.shards import Whole
from queryselect_service.strategy import Selection

Result = TypeVar("Result")

#: How often who waits for a client's next message looks whether it is still wanted, in seconds.
POLL = 0.05


class Engine:
    """Runs selections on its devices, one at a time on each."""

    def __init__(self, settings: Settings) -> None:
        """Raises RuntimeError for a GPU that does not work, ValueError for a device that can't be one."""
        self.settings = settings
        names = find(settings.device)
        self.queue = Queue(settings.queue_ageing, len(names))
        self.devices: list[Device] = []
        self.devices += [Device(each, self.queue, self.devices) for each in names]
        where = "the host" if any(each.is_gpu for each in self.devices) else "cpu"
        places, clear_in = settings.max_queue + len(names), self.queue.clear_in
        self.host = Room(where, places, settings.max_host_bytes, clear_in=clear_in)
        #: Memory of the devices' own, where they have some that is not the host's.
        self.own_memory: Room | None = None
        own = [each.capacity for each in self.devices if each.capacity is not None]
        if own:
            limits = ("queue", "device_memory")
            self.own_memory = Room(self.name, places, sum(own), clear_in=clear_in, limits=limits, largest=max(own))
        self._starting = threading.Lock()
        weakref.finalize(self, self.queue.close)

    @property
    def name(self) -> str:
        """The names of its devices."""
        return ", ".join(map(str, self.devices))

    def probe(self) -> None:
        """One tiny operation on every device. Raises RuntimeError where none works."""
        failed: list[str] = []
        for each in self.devices:
            try:
                each.probe()
            except RuntimeError as error:
                failed.append(str(error))
        if len(failed) == len(self.devices):
            raise RuntimeError("; ".join(failed))

    @contextmanager
    def admit(self, request: Request, call: Call, *, held: int, resident: bool = True) -> Iterator[Place]:
        """A place for the request, with memory set aside, for as long as the context lasts.

        held: bytes of the request's tensors that this process keeps for it. resident: whether the kernel has its inputs
        as a whole, not a block of rows at a time.
        Raises OverLimit or DoesNotFit where the request is too large for ever, Busy where there is no room now,
        DeviceLost where no device works.
        """
        if all(each.lost.is_set() for each in self.devices):  # before anything large travels
            try:
                self.probe()
            except RuntimeError as error:
                raise DeviceLost(str(error)) from None
        place = Place(self, request, call, held=held, resident=resident)
        try:
            with call.times.phase("queue"):  # others may have to make room
                place.enter()
            yield place
        finally:
            place.leave()

    def put(self, job: Job[Any]) -> None:
        """Lets the job wait for its turn."""
        with self._starting:
            for each in self.devices:
                each.serve()
        self.queue.put(job)


class Place:
    """An admitted request: its memory, and its turns on the device."""

    def __init__(self, engine: Engine, request: Request, call: Call, *, held: int, resident: bool) -> None:
        self._engine, self._request, self.call, self.times = engine, request, call, call.times
        self._held, self._resident = held, resident
        self._host, self._own = self._needs()
        self._rooms: list[tuple[Room, int]] = []  # entered, and the bytes set aside there
        self._job: Job[Any] | None = None
        self._device: Device | None = None  # that has begun to work for it

    @property
    def device(self) -> Device:
        """Where its work is done; asked for by that work."""
        assert self._device is not None  # it has begun
        return self._device

    @property
    def reserved(self) -> int:
        """The bytes that are set aside, on host and device."""
        return sum(nbytes for _, nbytes in self._rooms)

    def _needs(self) -> tuple[int, int]:
        """The bytes that the request will need on the host, and on the device where that has memory of its own."""
        request = self._request
        working = 0 if request.validate_only else request.working_bytes
        host = self._held + request.extra_bytes + 2 * request.answer_bytes  # as tensors, and as a message
        if self._engine.own_memory is None:
            return host + working, 0
        return host, working + request.moved_bytes + (request.sizes.inputs if self._resident else 0)

    def enter(self) -> None:
        """See Engine.admit."""
        engine, request = self._engine, self._request
        limit = engine.settings.max_host_bytes
        if self._held > limit:
            raise OverLimit("bytes of host memory", self._held, limit, name="max_host_bytes", field="pool")
        self.call.caller.check_bytes(self._host)
        needs = [(engine.host, self._host)]
        if engine.own_memory is not None:
            needs.append((engine.own_memory, self._own))
        for room, need in needs:
            if need > room.largest:
                raise DoesNotFit(request.strategy.name, need, room.where, room.largest)
        for room, need in needs:
            room.enter(self.call, need)
            self._rooms.append((room, need))
        self.call.reserved, self.call.admitted = self.reserved, True

    def reserve(self, nbytes: int) -> None:
        """Sets more host memory aside, or less where negative. Raises Busy or, where it can never be, OverLimit."""
        room, had = self._rooms[0]
        if had + nbytes > room.largest:
            raise OverLimit("bytes of host memory", had + nbytes, room.largest, name="max_host_bytes", field="pool")
        self.call.caller.check_bytes(had + nbytes)
        room.reserve(self.call, nbytes)
        self._rooms[0] = (room, had + nbytes)

    def settle(self) -> None:
        """Gives back what was set aside for lists of rows that turned out shorter than they might have been.

        Sets more aside where there are more items than rows. Raises DoesNotFit or Busy where there is no such room.
        """
        needs = self._needs()
        self.call.caller.check_bytes(needs[0])
        changes = (needs[0] - self._host, needs[1] - self._own)
        self._host, self._own = needs
        for at, ((room, had), by) in enumerate(zip(self._rooms, changes, strict=False)):
            if by > 0 and had + by > room.largest:
                raise DoesNotFit(self._request.strategy.name, had + by, room.where, room.largest)
            room.reserve(self.call, by)
            self._rooms[at] = (room, had + by)

    def leave(self) -> None:
        """Gives everything back, once nothing runs any more."""
        if self._job is not None and not self._withdraw(self._job):
            self.call.leave()
            self._job.outcome.exception()  # waits
            self._job.forget()
        if self._device is not None:
            self._device.release(self)
        for room, _ in self._rooms:
            room.leave(self.call)

    # Turns

    def run(self, problem: Callable[[], Problem]) -> Selection:
        """Waits for the device and selects there.

        Raises Busy where the wait was too long, Cancelled or DeadlineExceeded where the caller has gone, OutOfMemory
        where the memory of device or host ends.
        """
        job = self.start_selection(problem)
        while not self.wait(job, 1.0):
            pass
        return self.result(job)

    def start_selection(self, problem: Callable[[], Problem], work: float | None = None) -> Job[Selection]:
        """Puts the selection itself in the line. work: multiply-adds, where not all that the strategy needs is left."""
        if work is None:
            work = self._request.strategy.work(self._request.sizes)

        def select() -> Selection:
            with self.times.phase("transfer"):
                ready = problem().moved(self.move)
            with self.times.phase("kernel"):
                return ready.solve(Whole(ready.size, self.call.check, self.call.report))

        return self.start(select, work)

    def start(self, work: Callable[[], Result], size: float) -> Job[Result]:
        """Puts work in the line, one job at a time; all on the device that has the first. size: multiply-adds."""
        self._job = job = Job(
            lambda device: self._guarded(work, device), size, self.call.peer, device=self._device, needs=self._own
        )
        stirred = self.call.stirred  # and not self: an outcome must hold on to nothing
        job.outcome.add_done_callback(lambda _: stirred.set())
        self.times.begin("queue")
        self._engine.put(job)
        return job

    def wait(self, job: Job[Any], seconds: float) -> bool:
        """Waits for at most about so long; whether the job has ended (then ask its outcome).

        Raises Cancelled, DeadlineExceeded or Busy where the job has not begun and will not.
        """
        until, queue, call = time.monotonic() + seconds, self._engine.queue, self.call
        patience = self._engine.settings.queue_wait
        last = min(job.since + patience, math.inf if call.deadline is None else call.deadline)  # to begin
        while True:
            left = (until if job.begun else min(until, last)) - time.monotonic()
            call.stirred.wait(max(0.0, left))
            call.stirred.clear()
            if job.outcome.done():
                return True
            now = time.monotonic()
            if (now > last or self._unwanted()) and self._withdraw(job):
                self._job = None
                self.call.check()
                words = f"{self._engine.name} was not free within {patience:g} s"
                raise Busy(words, retry_after=queue.clear_in(), limit="queue_wait")
            if now >= until:
                return False

    def result(self, job: Job[Result]) -> Result:
        """What the job returned; raises what it raised. It has ended."""
        self._job = None
        return job.result()

    def move(self, x: Tensor) -> Tensor:
        """`x` on the device; stops where the caller has gone."""
        with self.times.phase("transfer"):
            return self.device.move(x, self.call.check)

    def ahead(self, job: Job[Any]) -> int:
        """How many jobs stand between this one and the device."""
        return self._engine.queue.ahead(job)

    def _withdraw(self, job: Job[Any]) -> bool:
        """Takes a job out of the line. False: it has begun."""
        waiting = self._engine.queue.withdraw(job)
        if waiting:
            self.times.end("queue")
        return waiting

    def _unwanted(self) -> bool:
        try:
            self.call.check()
        except ServiceError:
            return True
        return False

    def _guarded(self, work: Callable[[], Result], device: Device) -> Result:
        """The work, in the device's thread."""
        self.times.end("queue")
        self._device, self.call.device, self.call.begun = device, str(device), True
        device.hold(self, self._own)
        try:
            self.call.check()
            if device.is_gpu:
                torch.cuda.reset_peak_memory_stats(device.where)
            with torch.inference_mode():
                result = work()
            if device.is_gpu:
                peak = torch.cuda.max_memory_allocated(device.where)
                self.times.peak_bytes = max(peak, self.times.peak_bytes or 0)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                if str(error).startswith("CUDA error"):  # every later use of the device may fail too
                    device.lose()
                    raise DeviceLost(f"{device} is lost") from error
                raise
            if device.is_gpu:
                traceback.clear_frames(error.__traceback__)  # they hold the very tensors that filled the memory
                torch.cuda.empty_cache()
            raise OutOfMemory(f"{device} is out of memory; its caches are empty now", retry_after=RETRY_AFTER) from None
        return result
