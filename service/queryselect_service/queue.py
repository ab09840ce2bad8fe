"""Who may wait, for how much memory, and whose turn is next.

Requirements that the design meets:

- What is admitted is bounded, in number and in bytes, before anything large travels.
- Of the jobs that are ready the shortest goes first, so that a large selection does not hold up a hundred small ones;
  but one that has waited for `ageing` seconds goes before every younger one, so that the large one is served too.
- A job whose caller has gone leaves at once.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from queryselect_service.errors import Busy

Result = TypeVar("Result")

#: When a caller who found no room should come back, in seconds.
RETRY_AFTER = 1.0


class Job(Generic[Result]):
    """A piece of work for a device, and what becomes of it. work_size: multiply-adds, for the order."""

    def __init__(self, work: Callable[[], Result], size: float) -> None:
        self.size, self.since, self.begun = size, time.monotonic(), False
        self.outcome: Future[Result] = Future()
        self._work: Callable[[], Result] | None = work

    def result(self) -> Result:
        """What the work returned; raises what it raised. Once, after it has ended.

        The job forgets it: an error and a job that hold each other, by the frames that the error came through, would
        keep every tensor in those frames until the garbage collector comes by.
        """
        outcome, self.outcome = self.outcome, Future()
        try:
            return outcome.result()
        finally:
            del outcome

    def drop(self) -> None:
        """Lets go of the work, which nobody wants any more."""
        self._work = None

    def run(self) -> None:
        """Does the work, in the thread of the device."""
        self.begun = True
        work, self._work = self._work, None  # whatever it holds on to is let go here, not when the caller looks
        assert work is not None  # a job runs once
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # handed to whoever asks for the outcome
            del work
            traceback.clear_frames(error.__traceback__)  # they hold tensors, and would for as long as the error lives
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(result)


class Queue:
    """The jobs that are ready for one device. Thread-safe."""

    def __init__(self, ageing: float) -> None:
        self._ageing, self._closed = ageing, False
        self._jobs: list[Job[object]] = []
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job[object]) -> None:
        """Adds a job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def withdraw(self, job: Job[object]) -> bool:
        """Takes a job out. False: it has begun."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
        job.drop()
        return True

    def ahead(self, job: Job[object]) -> int:
        """How many jobs would go before this one, as things are now."""
        with self._changed:
            mine = self._rank(job)
            return sum(self._rank(each) < mine for each in self._jobs)

    def take(self) -> Job[object] | None:
        """Waits for the next job and takes it. None: the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._closed:
                return None
            job = min(self._jobs, key=self._rank)
            self._jobs.remove(job)
            return job

    def close(self) -> None:
        """Lets whoever takes jobs go home."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _rank(self, job: Job[object]) -> tuple[bool, float, float]:
        """Lowest first: those that have waited long by their age, then the others by their size."""
        young = time.monotonic() - job.since < self._ageing
        return (young, job.size if young else 0.0, job.since)


class Room:
    """A number of places and of bytes, of which callers hold some. Thread-safe."""

    def __init__(self, where: str, places: int, capacity: int) -> None:
        """where: its name in messages."""
        self.where, self.places, self.capacity = where, places, capacity
        self.taken, self.reserved = 0, 0
        self._lock = threading.Lock()

    def enter(self, nbytes: int) -> None:
        """Takes a place and sets bytes aside. Raises Busy where there is no room now."""
        with self._lock:
            if self.taken >= self.places:
                message = f"{self.taken} requests are waiting for {self.where} already"
                raise Busy(message, retry_after=RETRY_AFTER)
            self._reserve(nbytes)
            self.taken += 1

    def reserve(self, nbytes: int) -> None:
        """Sets more bytes aside, or fewer where negative. Raises Busy where there is no room now."""
        with self._lock:
            self._reserve(nbytes)

    def leave(self, nbytes: int) -> None:
        """Gives back a place and its bytes."""
        with self._lock:
            self.taken -= 1
            self.reserved -= nbytes

    def _reserve(self, nbytes: int) -> None:
        if nbytes > 0 and self.reserved + nbytes > self.capacity:
            raise Busy(
                f"{nbytes} bytes are needed and {self.capacity - self.reserved} of {self.capacity} are free on "
                f"{self.where} now",
                retry_after=RETRY_AFTER,
            )
        self.reserved += nbytes
