"""The device, and how a selection gets its turn there.

Requirements that the design meets:

- One job at a time on a device: two would only share its bandwidth and double the memory. A thread of its own runs
  them, in the order of `queue.py`; nothing else waits for it. Small pointwise jobs side by side were tried: on two
  cores they made no request faster and took a fifth more, since what they wait for is Python's lock.
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
from queryselect_service.errors import Busy, DeviceLost, DoesNotFit, OutOfMemory, OverLimit, ServiceError, out_of_memory
from queryselect_service.host import host_memory
from queryselect_service.queue import RETRY_AFTER, Job, Queue, Room
from queryselect_service.request import Problem, Request
from queryselect_service.settings import Settings
from queryselect_service.shards import Whole
from queryselect_service.strategy import Selection

Result = TypeVar("Result")

#: How often who waits for a client's next message looks whether it is still wanted, in seconds.
POLL = 0.05
#: The part of a GPU's memory that requests may fill; the rest is for its libraries.
DEVICE_PART = 0.9
#: Bytes that travel to a GPU at once.
STAGE_BYTES = 32 << 20


class Engine:
    """Runs selections on one device, one at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        name = settings.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        #: Set when a selection or a probe found the device lost, until a probe finds it at work again.
        self.lost = threading.Event()
        #: When a probe found the device at work last (time.monotonic), and the bytes of its memory then, by kind.
        self.seen: tuple[float, dict[str, int]] = (-math.inf, {})
        self.queue = Queue(settings.queue_ageing)
        where = "cpu" if self.device.type == "cpu" else "the host"
        clear_in = self.queue.clear_in
        self.host = Room(where, settings.max_queue + 1, settings.max_host_bytes, clear_in=clear_in)
        self.own_memory: Room | None = None  # the device's own, where it has some that is not the host's
        if self.device.type == "cuda":
            self.probe()  # a device that is not there is told of as such
            _, total = self.memory()
            capacity = int(DEVICE_PART * total)
            limits = ("queue", "device_memory")
            self.own_memory = Room(str(self.device), self.host.places, capacity, clear_in=clear_in, limits=limits)
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self.queue.close)

    def probe(self) -> None:
        """One tiny operation on the device. Raises RuntimeError where it does not work."""
        try:
            torch.zeros(2, device=self.device).sum().item()
            free, total = self.memory()
            memory = {"total": total, "free": free}
            if self.device.type == "cuda":
                memory["allocated"] = torch.cuda.memory_allocated(self.device)
                memory["reserved"] = torch.cuda.memory_reserved(self.device)
        except Exception as error:  # torch asserts where it was built without CUDA
            self.lost.set()
            raise RuntimeError(f"device {self.device} does not work: {error}") from error
        self.seen = (time.monotonic(), memory)
        self.lost.clear()

    @property
    def model(self) -> str | None:
        """The maker's name of the device, None for a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def memory(self) -> tuple[int, int]:
        """The free and the total bytes of the device's memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)
        return host_memory()

    @contextmanager
    def admit(self, request: Request, call: Call, *, held: int, resident: bool = True) -> Iterator[Place]:
        """A place for the request, with memory set aside, for as long as the context lasts.

        held: bytes of the request's tensors that this process keeps for it. resident: whether the kernel has its inputs
        as a whole, not a block of rows at a time.
        Raises OverLimit or DoesNotFit where the request is too large for ever, Busy where there is no room now,
        DeviceLost where the device does not work.
        """
        if self.lost.is_set():  # before anything large travels
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

    def move(self, x: Tensor, check: Callable[[], None]) -> Tensor:
        """`x` on the device.

        To a GPU by two pieces of page-locked memory in turn: one is filled while the other travels, little memory is
        locked, and `check` may stop it in between.
        """
        if self.device.type != "cuda":
            return x
        source = x.contiguous().reshape(-1).view(torch.uint8)
        moved = torch.empty(x.shape, dtype=x.dtype, device=self.device)
        target, size = moved.reshape(-1).view(torch.uint8), min(STAGE_BYTES, len(source))
        with torch.cuda.device(self.device):
            stages = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            sent = [torch.cuda.Event() for _ in stages]  # type: ignore[no-untyped-call]
            try:
                for number, start in enumerate(range(0, len(source), STAGE_BYTES)):
                    check()
                    at, piece = number % 2, source[start : start + STAGE_BYTES]
                    sent[at].synchronize()  # returns at once where nothing was recorded
                    staged = stages[at][: len(piece)].copy_(piece)
                    target[start : start + STAGE_BYTES].copy_(staged, non_blocking=True)
                    sent[at].record()
            finally:
                torch.cuda.synchronize(self.device)  # what is locked may be used again, and times are what they say
        return moved

    def put(self, job: Job[Any]) -> None:
        """Lets the job wait for its turn."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=_serve, args=(self.queue,), name=str(self.device), daemon=True)
                self._thread.start()
        self.queue.put(job)


def _serve(queue: Queue) -> None:
    """What the device's thread does. It knows the queue only, so that an engine nobody holds can go."""
    while (job := queue.take()) is not None:
        started = time.monotonic()
        job.run()
        queue.done(job, time.monotonic() - started)
        del job  # or its outcome would live until the next one comes


class Place:
    """An admitted request: its memory, and its turns on the device."""

    def __init__(self, engine: Engine, request: Request, call: Call, *, held: int, resident: bool) -> None:
        self._engine, self._request, self.call, self.times = engine, request, call, call.times
        self._held, self._resident = held, resident
        self._host, self._own = self._needs()
        self._rooms: list[tuple[Room, int]] = []  # entered, and the bytes set aside there
        self._job: Job[Any] | None = None

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
            if need > room.capacity:
                raise DoesNotFit(request.strategy.name, need, room.where, room.capacity)
        for room, need in needs:
            room.enter(self.call, need)
            self._rooms.append((room, need))
        self.call.reserved, self.call.admitted = self.reserved, True

    def reserve(self, nbytes: int) -> None:
        """Sets more host memory aside, or less where negative. Raises Busy or, where it can never be, OverLimit."""
        room, had = self._rooms[0]
        if had + nbytes > room.capacity:
            raise OverLimit("bytes of host memory", had + nbytes, room.capacity, name="max_host_bytes", field="pool")
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
            if by > 0 and had + by > room.capacity:
                raise DoesNotFit(self._request.strategy.name, had + by, room.where, room.capacity)
            room.reserve(self.call, by)
            self._rooms[at] = (room, had + by)

    def leave(self) -> None:
        """Gives everything back, once nothing runs any more."""
        if self._job is not None and not self._withdraw(self._job):
            self.call.leave()
            self._job.outcome.exception()  # waits
            self._job.forget()
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
        """Puts work in the line, one job at a time. size: multiply-adds."""
        self._job = job = Job(lambda: self._guarded(work), size, self.call.peer)
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
                words = f"{self._engine.device} was not free within {patience:g} s"
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
            return self._engine.move(x, self.call.check)

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

    def _guarded(self, work: Callable[[], Result]) -> Result:
        """The work, in the device's thread."""
        self.times.end("queue")
        self.call.begun = True
        cuda = self._engine.device.type == "cuda"
        try:
            self.call.check()
            if cuda:
                torch.cuda.reset_peak_memory_stats(self._engine.device)
            with torch.inference_mode():
                result = work()
            if cuda:
                peak = torch.cuda.max_memory_allocated(self._engine.device)
                self.times.peak_bytes = max(peak, self.times.peak_bytes or 0)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                if str(error).startswith("CUDA error"):  # every later use of the device may fail too
                    self._engine.lost.set()
                    raise DeviceLost(f"{self._engine.device} is lost") from error
                raise
            if cuda:
                traceback.clear_frames(error.__traceback__)  # they hold the very tensors that filled the memory
                torch.cuda.empty_cache()
            message = f"{self._engine.device} is out of memory; its caches are empty now"
            raise OutOfMemory(message, retry_after=RETRY_AFTER) from None
        return result
