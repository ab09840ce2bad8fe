"""queue.py: the shortest goes first, nobody waits for ever, peers share fairly, and what is set aside comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queryselect_service.call import Call
from queryselect_service.errors import Busy, Cancelled
from queryselect_service.queue import Job, Queue, Room
from tests.waiting import until


def job(size: float, waited: float = 0.0, peer: str = "") -> Job[None]:
    made = Job(lambda _: None, size, peer)
    made.since = time.monotonic() - waited
    return made


def take(queue: Queue, seconds: float = 0.0) -> Job[None]:
    """The next job, which has had the device for so long."""
    taken = queue.take()
    queue.done(taken, seconds)
    return taken


def order(queue: Queue) -> list[float]:
    return [take(queue).size for _ in range(len(queue))]


def test_the_shortest_goes_first_and_the_older_of_equals():
    queue, first, second = Queue(ageing=60), job(3, waited=2), job(3, waited=1)
    for each in (second, job(9), first, job(1)):
        queue.put(each)
    assert take(queue).size == 1
    assert take(queue) is first
    assert take(queue) is second
    assert take(queue).size == 9


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
    taken = [take(queue) for _ in jobs]
    assert [each.told for each in taken] == list(range(len(jobs)))


def test_a_flood_of_short_ones_does_not_starve_a_long_one():
    queue = Queue(ageing=0.2)
    queue.put(job(1e9))
    started = time.monotonic()
    while True:
        queue.put(job(1))
        if take(queue).size > 1:
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
    assert take(queue) is kept
    assert not queue.withdraw(kept)


def test_take_waits_for_a_job_or_the_end():
    queue, taken = Queue(ageing=60), []

    def serve():
        while (each := queue.take()) is not None:
            taken.append(each)
            queue.done(each, 0.0)

    taker = threading.Thread(target=serve)
    taker.start()
    time.sleep(0.05)
    queue.put(job(7))
    time.sleep(0.05)
    queue.close()
    taker.join(5)
    assert not taker.is_alive()
    assert [each.size for each in taken] == [7]


def test_a_job_hands_over_what_its_work_returned_or_raised():
    good, bad = Job(lambda _: 7, 0), Job(lambda _: 1 // 0, 0)
    good.run()
    bad.run()
    assert good.outcome.result() == 7
    with pytest.raises(ZeroDivisionError):
        bad.outcome.result()


# Peers


def test_a_peer_that_comes_anew_does_not_wait_for_another_that_has_many():
    queue = Queue(ageing=60)
    for _ in range(10):
        queue.put(job(1, peer="many"))
    queue.put(job(1, peer="one"))
    first, second = take(queue, 1.0), take(queue, 1.0)
    assert "one" in {first.peer, second.peer}


def test_a_large_selection_of_one_peer_goes_before_a_flood_that_has_had_as_much():
    queue, taken = Queue(ageing=60), []
    queue.put(job(50, peer="large"))
    for _ in range(200):
        queue.put(job(1, peer="flood"))
    while len(queue):
        each = queue.take()
        queue.done(each, each.size)
        taken.append(each.peer)
    assert 40 <= taken.index("large") <= 60


@pytest.mark.parametrize("seconds", [0.01, 1.0, 100.0])
def test_a_peer_that_comes_now_and_then_is_next_whatever_jobs_were_thought_to_take(seconds):
    queue = Queue(ageing=1e9)
    queue.put(job(1, peer="before"))
    take(queue, 1.0)
    for _ in range(30):
        queue.put(job(1, peer="many"))
    for _ in range(8):
        queue.put(job(1, peer="one"))
        assert "one" in {take(queue, seconds).peer, take(queue, seconds).peer}


SECONDS = st.lists(st.integers(1, 9), min_size=60, max_size=60)


@settings(deadline=None, max_examples=50)
@given(SECONDS, SECONDS)
def test_peers_that_always_want_the_device_get_equal_parts_of_it(some, others):
    """By the seconds that jobs really take, whatever their sizes promise."""
    queue, had, seconds = Queue(ageing=60), {"a": 0, "b": 0}, {}
    for peer, each in (("a", some), ("b", others)):
        for length in each:
            one = job(1, peer=peer)
            seconds[one] = length
            queue.put(one)
    while {each.peer for each in queue._jobs} == {"a", "b"}:
        each = queue.take()
        queue.done(each, seconds[each])
        had[each.peer] += seconds[each]
        assert abs(had["a"] - had["b"]) <= 2 * 9


def test_what_a_peer_had_while_nobody_else_wanted_it_is_not_held_against_it():
    queue = Queue(ageing=60)
    for _ in range(5):
        queue.put(job(1, peer="early"))
        take(queue, 100.0)
    queue.put(job(1, peer="early"))
    queue.put(job(1, peer="late"))
    assert queue._had["early"] == queue._had["late"]


def test_nothing_is_kept_of_peers_that_have_gone():
    queue = Queue(ageing=60)
    for number in range(1000):
        queue.put(job(1, peer=f"{number}"))
        queue.put(job(1, peer=f"{number} again"))
        take(queue, 0.01 * (number % 7))
        take(queue, 0.01)
    assert len(queue._had) < 100
    for number in range(3000):  # and where the device is never free
        queue.put(job(1, peer=f"new {number}"))
        if number > 1:
            take(queue, 0.01)
    assert len(queue._had) < 300


# Rooms


def calls(peer: str, count: int) -> list[Call]:
    return [Call(f"{peer} {number}", peer=peer) for number in range(count)]


def enter_all(room: Room, some: list[Call], nbytes: int = 0) -> None:
    for each in some:
        room.enter(each, nbytes)


def test_a_room_is_as_large_as_it_says():
    room, (one, two, three) = Room("cpu", places=2, capacity=100), calls("", 3)
    room.enter(one, 60)
    with pytest.raises(Busy, match="70 bytes are needed and 40 of 100 are free") as caught:
        room.enter(two, 70)
    assert caught.value.retry_after > 0
    assert (room.taken, room.reserved) == (1, 60)
    room.enter(two, 40)
    with pytest.raises(Busy, match="2 requests are"):
        room.enter(three, 0)
    room.leave(one)
    room.reserve(two, 50)
    with pytest.raises(Busy):
        room.reserve(two, 11)
    room.reserve(two, -50)
    room.leave(two)
    assert (room.taken, room.reserved) == (0, 0)


@contextmanager
def obedient(*some: Call, room: Room) -> Iterator[None]:
    """Calls that leave once they are refused, as they do at work."""

    def work(call: Call) -> None:
        while not stop.is_set():
            if call.stirred.wait(0.01) and call.refused is not None:
                room.leave(call)
                return

    stop = threading.Event()
    threads = [threading.Thread(target=work, args=(each,)) for each in some]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        stop.set()
        for each in threads:
            each.join(5)


def test_the_newest_of_the_peer_that_holds_most_makes_room_for_another():
    room, many, (one, two) = Room("cpu", places=4, capacity=100), calls("many", 4), calls("few", 2)
    enter_all(room, many)
    many[3].begun = True  # the device works for it already
    with obedient(*many, room=room):
        room.enter(one)
        assert [each.refused is not None for each in many] == [False, False, True, False]
        assert many[2].refused[1] > 0
        room.enter(two)
        with pytest.raises(Busy, match="4 requests are waiting"):  # two each: that is fair
            room.enter(Call("third", peer="few"))
        with pytest.raises(Busy):
            room.enter(Call("fifth", peer="many"))
    assert room.taken == 4


def test_bytes_are_shared_as_places_are():
    room, (large, larger), (small,) = Room("cpu", places=9, capacity=100), calls("a", 2), calls("b", 1)
    room.enter(large, 40)
    room.enter(larger, 50)
    with obedient(large, larger, room=room):
        with pytest.raises(Busy, match="95 bytes are needed"):  # more than the other has
            room.enter(small, 95)
        assert large.refused is larger.refused is None
        room.enter(small, 30)
    assert larger.refused is not None
    assert large.refused is None
    assert room.reserved == 70


def test_who_makes_room_has_left_before_the_other_comes():
    room, many, (one,) = Room("cpu", places=3, capacity=100), calls("many", 3), calls("few", 1)
    enter_all(room, many, 30)
    came = threading.Thread(target=room.enter, args=(one, 30))
    came.start()
    assert until(lambda: many[2].refused is not None)
    with pytest.raises(Busy):  # what will be free is not for its peer
        room.enter(Call("again", peer="many"), 30)
    assert came.is_alive()
    assert room.reserved == 120, "the newcomer's bytes are told for, and not used yet"
    room.leave(many[2])
    came.join(5)
    assert not came.is_alive()
    assert (room.taken, room.reserved) == (3, 90)


def test_a_newcomer_that_leaves_or_waits_in_vain_takes_nothing(monkeypatch):
    room, many, (one, two) = Room("cpu", places=3, capacity=100), calls("many", 3), calls("few", 2)
    enter_all(room, many)
    one.leave()
    with pytest.raises(Cancelled):
        room.enter(one)
    monkeypatch.setattr("queryselect_service.queue.MAKING_ROOM", 0.1)
    with pytest.raises(Busy, match="cpu is full"):
        room.enter(two)
    assert room.taken == 3


def test_who_finds_no_room_is_told_when_there_may_be_some():
    queue = Queue(ageing=60)
    room = Room("cpu", places=1, capacity=100, clear_in=queue.clear_in)
    for each in (job(1), job(2)):
        queue.put(each)
    take(queue, 4.0)  # a unit of work takes about 4 seconds
    room.enter(Call("one"))
    with pytest.raises(Busy) as caught:
        room.enter(Call("two"))
    assert 3 < caught.value.retry_after < 9
    queue.put(job(1e6))
    assert queue.clear_in() == 10
    while len(queue):
        take(queue)
    assert queue.clear_in() == 0.3
