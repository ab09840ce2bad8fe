"""queue.py: the shortest goes first, nobody waits for ever, and what is set aside comes back."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queryselect_service.errors import Busy
from queryselect_service.queue import Job, Queue, Room


def job(size: float, waited: float = 0.0) -> Job[None]:
    made = Job(lambda: None, size)
    made.since = time.monotonic() - waited
    return made


def order(queue: Queue) -> list[float]:
    return [queue.take().size for _ in range(len(queue))]


def test_the_shortest_goes_first_and_the_older_of_equals():
    queue, first, second = Queue(ageing=60), job(3, waited=2), job(3, waited=1)
    for each in (second, job(9), first, job(1)):
        queue.put(each)
    assert queue.take().size == 1
    assert queue.take() is first
    assert queue.take() is second
    assert queue.take().size == 9


def test_who_has_waited_long_goes_before_every_shorter_one_that_came_later():
    queue = Queue(ageing=5)
    for each in (job(1), job(100, waited=6), job(2), job(1000, waited=7), job(0, waited=5.5)):
        queue.put(each)
    assert order(queue) == [1000, 100, 0, 1, 2]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=20))
def test_ahead_is_how_many_are_taken_before(pairs):
    queue = Queue(ageing=5)
    jobs = [job(size, waited + at * 1e-3) for at, (size, waited) in enumerate(pairs)]  # no two of one age
    for each in jobs:
        queue.put(each)
    for each in jobs:
        each.told = queue.ahead(each)
    taken = [queue.take() for _ in jobs]
    assert [each.told for each in taken] == list(range(len(jobs)))


def test_a_flood_of_short_ones_does_not_starve_a_long_one():
    queue = Queue(ageing=0.2)
    queue.put(job(1e9))
    started = time.monotonic()
    while True:
        queue.put(job(1))
        if queue.take().size > 1:
            break
        assert time.monotonic() - started < 5
    assert 0.19 <= time.monotonic() - started < 1


def test_what_is_withdrawn_is_not_taken_and_lets_go_of_its_work():
    queue = Queue(ageing=60)
    gone, kept = job(1), job(2)
    queue.put(gone)
    queue.put(kept)
    assert queue.withdraw(gone)
    assert not queue.withdraw(gone)
    assert gone._work is None
    assert queue.take() is kept
    assert not queue.withdraw(kept)


def test_take_waits_for_a_job_or_the_end():
    queue, taken = Queue(ageing=60), []
    taker = threading.Thread(target=lambda: taken.extend(iter(queue.take, None)))
    taker.start()
    time.sleep(0.05)
    queue.put(job(7))
    time.sleep(0.05)
    queue.close()
    taker.join(5)
    assert not taker.is_alive()
    assert [each.size for each in taken] == [7]


def test_a_job_hands_over_what_its_work_returned_or_raised():
    good, bad = Job(lambda: 7, 0), Job(lambda: 1 // 0, 0)
    good.run()
    bad.run()
    assert good.outcome.result() == 7
    with pytest.raises(ZeroDivisionError):
        bad.outcome.result()


def test_a_room_is_as_large_as_it_says():
    room = Room("cpu", places=2, capacity=100)
    room.enter(60)
    with pytest.raises(Busy, match="70 bytes are needed and 40 of 100 are free") as caught:
        room.enter(70)
    assert caught.value.retry_after > 0
    assert (room.taken, room.reserved) == (1, 60)
    room.enter(40)
    with pytest.raises(Busy, match="2 requests are"):
        room.enter(0)
    room.leave(60)
    room.reserve(50)
    with pytest.raises(Busy):
        room.reserve(11)
    room.reserve(-50)
    room.leave(40)
    assert (room.taken, room.reserved) == (0, 0)
