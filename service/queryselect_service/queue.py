"""Who may wait, for how much memory, and whose turn is next.

Requirements that the design meets:

- What is admitted is bounded, in number and in bytes, before anything large travels.
- Peers share fairly. Of the peers whose jobs are ready the one goes next that would have had the device for the least
  time after its job (fair queueing; Goyal, Vin and Cheng, 1996). Where there is no room for a newcomer, the peer
  that holds the most gives up the newest of what it has waiting, as long as it holds more than the newcomer then will.
- Of one peer's jobs the shortest goes first, so that a large selection does not hold up a hundred small ones; but one
  that has waited for `ageing` seconds goes before every younger one, so that the large one is served too. Of peers that
  have had equally much, such a one goes first.
- A job whose caller has gone leaves at once.
"""

from __future__ import annotations

import heapq
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from queryselect_service.call import Call
from queryselect_service.errors import Busy

Result = TypeVar("Result")

#: When a caller who found no room should come back, in seconds: as soon as what waits is likely to have had the device,
#: within reason. What keeps others away may be an upload, too, of which nothing is known.
RETRY_AFTER, SOONEST, LATEST = 1.0, 0.3, 10.0
#: How long a newcomer waits for those who make room for it, in seconds. They look up ten times in one.
MAKING_ROOM = 5.0
#: Peers who have gone of whom it is known for a while what they had.
PEERS = 200
#: Seconds that a multiply-add takes, as long as nothing is known of this machine; and what a job counts, for what one
#: takes, once the next has ended.
SECONDS_PER_WORK, FADING = 1e-10, 0.99


class Job(Generic[Result]):
    """A piece of work for a device, which it is told, and what becomes of it.

    size: multiply-adds, for the order. peer: whose it is. device: the one that has what the work goes on with; None:
    whichever is free. needs: bytes of a device's own memory.
    """

    def __init__(
        self, work: Callable[[Any], Result], size: float, peer: str = "", *, device: object = None, needs: int = 0
    ) -> None:
        self.size, self.peer, self.since, self.begun = size, peer, time.monotonic(), False
        self.device, self.needs = device, needs
        self.charged = 0.0  # seconds that its peer is thought to have had for it
        self.outcome: Future[Result] = Future()
        self._work: Callable[[Any], Result] | None = work

    def result(self) -> Result:
        """What the work returned; raises what it raised. Once, after it has ended."""
        outcome = self.outcome
        self.forget()
        try:
            return outcome.result()
        finally:
            del outcome

    def forget(self) -> None:
        """Lets go of the outcome.

        An error and a job that hold each other, by the frames that the error came through, would keep every tensor in
        those frames until the garbage collector comes by.
        """
        self.outcome = Future()

    def drop(self) -> None:
        """Lets go of the work, which nobody wants any more."""
        self._work = None

    def run(self, device: object = None) -> None:
        """Does the work, in the thread of the device."""
        self.begun = True
        work, self._work = self._work, None  # whatever it holds on to is let go here, not when the caller looks
        assert work is not None  # a job runs once
        try:
            result = work(device)
        except BaseException as error:  # noqa: BLE001  # handed to whoever asks for the outcome
            del work
            traceback.clear_frames(error.__traceback__)  # they hold tensors, and would for as long as the error lives
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(result)


class Queue:
    """The jobs that are ready for a device, of so many. Thread-safe."""

    def __init__(self, ageing: float, devices: int = 1) -> None:
        self._ageing, self._devices, self._closed = ageing, devices, False
        self._jobs: list[Job[object]] = []
        self._running: list[Job[object]] = []
        self._changed = threading.Condition()
        # Seconds of the device that peers have had; a peer that comes anew starts with as many as whoever was served
        # last had before (start-time fair queueing).
        self._had: dict[str, float] = {}
        self._start = 0.0
        self._work, self._seconds = 1.0, SECONDS_PER_WORK  # of jobs so far, the last ones most: what one will take

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def wait(self) -> float:
        """For how long the job that has waited longest has been waiting, in seconds; 0 where none is."""
        with self._changed:
            return max((time.monotonic() - each.since for each in self._jobs), default=0.0)

    def put(self, job: Job[object]) -> None:
        """Adds a job."""
        with self._changed:
            if not any(each.peer == job.peer for each in self._jobs):
                self._had[job.peer] = max(self._had.get(job.peer, 0.0), self._start)
            self._jobs.append(job)
            self._changed.notify_all()  # it may not be for whoever is free

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
            return next((at for at, each in enumerate(self._order()) if each is job), 0)

    def take(self, may: Callable[[Job[object]], bool] = lambda _: True) -> Job[object] | None:
        """Waits for the next job of those that may be taken and takes it; `done` must follow. None: it is closed."""
        with self._changed:
            while not self._closed and (job := next(filter(may, self._order()), None)) is None:
                self._changed.wait()
            if self._closed:
                return None
            assert job is not None  # or it would wait
            self._jobs.remove(job)
            self._running.append(job)
            self._start = max(self._start, self._had[job.peer])
            job.charged = self._estimate(job)
            self._had[job.peer] += job.charged
            return job

    def done(self, job: Job[object], seconds: float) -> None:
        """The job that was taken has had the device for so long."""
        with self._changed:
            self._running.remove(job)
            self._work = FADING * self._work + max(job.size, 1.0)
            self._seconds = FADING * self._seconds + seconds
            self._had[job.peer] = self._had.get(job.peer, self._start) + seconds - job.charged
            if not self._jobs and not self._running:
                # Nobody wants the device: what peers have had of it was nobody's loss.
                self._start = max(self._start, *self._had.values())
            self._forget()

    def stir(self) -> None:
        """Has those who wait for a job look again which they may take."""
        with self._changed:
            self._changed.notify_all()

    def clear_in(self) -> float:
        """The seconds after which what waits and what runs will have had a device, by estimate and within reason."""
        with self._changed:
            work = sum(map(self._estimate, (*self._jobs, *self._running)))
        return min(max(work / self._devices, SOONEST), LATEST)

    def close(self) -> None:
        """Lets whoever takes jobs go home."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _forget(self) -> None:
        """Keeps what peers have had as long as it says something: of those who have gone, of so many."""
        here = {each.peer for each in (*self._jobs, *self._running)}
        gone = sorted((had, peer) for peer, had in self._had.items() if peer not in here)
        for at, (had, peer) in enumerate(gone):
            if had <= self._start or at < len(gone) - PEERS:
                del self._had[peer]

    def _order(self) -> Iterator[Job[object]]:
        """The jobs in the order in which they will be taken, as things are now."""
        now, queues = time.monotonic(), dict[str, list[Job[object]]]()
        for job in sorted(self._jobs, key=lambda job: self._rank(job, now), reverse=True):
            queues.setdefault(job.peer, []).append(job)

        def turn(peer: str, had: float) -> tuple[float, float, str, float]:
            """When the peer's next job would end if every peer had an equal part of the device."""
            job = queues[peer][-1]
            wait = self._estimate(job) if now - job.since < self._ageing else 0.0
            return (had + wait, job.since, peer, had)

        turns = [turn(peer, self._had[peer]) for peer in queues]
        heapq.heapify(turns)
        while turns:
            *_, peer, had = heapq.heappop(turns)
            job = queues[peer].pop()
            yield job
            if queues[peer]:
                heapq.heappush(turns, turn(peer, had + self._estimate(job)))

    def _rank(self, job: Job[object], now: float) -> tuple[bool, float, float]:
        """Lowest first among a peer's own: those that have waited long by their age, then the others by their size."""
        young = now - job.since < self._ageing
        return (young, job.size if young else 0.0, job.since)

    def _estimate(self, job: Job[object]) -> float:
        """The seconds that the job will take, by those of the jobs before it."""
        return max(job.size, 1.0) * self._seconds / self._work


class Room:
    """A number of places and of bytes, of which calls hold some. Thread-safe."""

    def __init__(
        self,
        where: str,
        places: int,
        capacity: int,
        movable: Callable[[Call], bool] = lambda call: not call.begun,
        clear_in: Callable[[], float] = lambda: RETRY_AFTER,
        limits: tuple[str, str] = ("queue", "host_memory"),
        largest: int | None = None,
    ) -> None:
        """where: its name in messages. movable: whether a call may be made to leave. clear_in: when to come back.

        limits: what refusals for want of places and of bytes are counted under. largest: the bytes that one call may
        ever have, where that is less than the capacity.
        """
        self.where, self.places, self.capacity = where, places, capacity
        self.largest = capacity if largest is None else largest
        self._movable, self._clear_in, self._limits = movable, clear_in, limits
        self._held: dict[Call, int] = {}  # in the order in which they came
        self._leaving: set[Call] = set()  # of these, those who make room for others
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """The places that calls hold."""
        return len(self._held)

    @property
    def reserved(self) -> int:
        """The bytes that calls hold."""
        return sum(list(self._held.values()))

    def enter(self, call: Call, nbytes: int = 0) -> None:
        """Takes a place and sets bytes aside. Raises Busy where there is no room now.

        Where another peer must make room this waits until it has, and raises what `call.check` raises meanwhile.
        """
        with self._changed:
            leaving = self._makers_of_room(call, nbytes)
            fits = len(self._held) < self.places and self.reserved + nbytes <= self.capacity
            self._held[call] = nbytes  # at once, so that nobody else takes what is left for this call
            if fits:
                return
            for each in leaving:
                words = f"{self.where} is full, and another client, which has less of it, needs the room"
                each.refuse(words, self._clear_in())
            self._leaving |= leaving
            leaving = set(self._leaving)
        try:
            self._await(call, leaving)
        except BaseException:
            self.leave(call)
            raise

    def reserve(self, call: Call, nbytes: int) -> None:
        """Sets more bytes aside, or fewer where negative. Raises Busy where there is no room now."""
        with self._changed:
            if nbytes > 0 and self.reserved + nbytes > self.capacity:
                raise self._no_bytes(nbytes)
            self._held[call] += nbytes

    def leave(self, call: Call) -> None:
        """Gives back the place and all of its bytes."""
        with self._changed:
            self._held.pop(call, None)
            self._leaving.discard(call)
            self._changed.notify_all()

    def _await(self, call: Call, leaving: set[Call]) -> None:
        until = time.monotonic() + MAKING_ROOM
        with self._changed:
            while leaving & self._held.keys():
                call.check()
                if time.monotonic() > until:
                    raise Busy(f"{self.where} is full", retry_after=self._clear_in(), limit=self._limits[0])
                self._changed.wait(0.05)

    def _makers_of_room(self, call: Call, nbytes: int) -> set[Call]:
        """Who has to leave so that the call may come: nobody, where there is room. Raises Busy where there is none.

        The newest movable calls of the peer that holds the most, as long as that is more than what the newcomer's will.
        """
        stay = {each: held for each, held in self._held.items() if each not in self._leaving}
        leaving: set[Call] = set()
        while True:
            if len(stay) >= self.places:
                words = f"{self.taken} requests are waiting for {self.where} already"
                refusal = Busy(words, retry_after=self._clear_in(), limit=self._limits[0])
                shares, mine = Counter(each.peer for each in stay), 1
            elif sum(stay.values()) + nbytes > self.capacity:
                refusal, shares, mine = self._no_bytes(nbytes), Counter(), nbytes
                for each, held in stay.items():
                    shares[each.peer] += held
            else:
                return leaving
            movable = [each for each in stay if self._movable(each)]
            newest = max(reversed(movable), key=lambda each: shares[each.peer], default=None)
            if newest is None or shares[newest.peer] <= shares[call.peer] + mine:
                raise refusal
            leaving.add(newest)
            del stay[newest]

    def _no_bytes(self, nbytes: int) -> Busy:
        return Busy(
            f"{nbytes} bytes are needed and {self.capacity - self.reserved} of {self.capacity} are free on "
            f"{self.where} now",
            retry_after=max(RETRY_AFTER, self._clear_in()),
            limit=self._limits[1],
        )
