"""Pieces of work side by side: in turn, on threads that keep to one core each, with nothing at work after a failure."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from queryselect_service import workers


@pytest.fixture(autouse=True)
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_pieces_come_in_turn_whichever_is_done_first():
    done = []

    def work(piece):
        time.sleep(0.02 * (3 - piece % 4))
        done.append(piece)

    assert list(workers.each(work, range(8))) == list(range(8))
    assert sorted(done) == list(range(8))
    assert done != list(range(8))


def test_as_many_at_a_time_as_torch_has_threads():
    together = threading.Barrier(3)
    assert list(workers.each(lambda _: together.wait(10), range(6))) == list(range(6))


def test_a_piece_has_one_thread_and_leaves_those_of_others_alone():
    found = []
    list(workers.each(lambda _: found.append(torch.get_num_threads()), range(9)))
    assert found == [1] * 9
    assert torch.get_num_threads() == 3
    newcomers = []
    thread = threading.Thread(target=lambda: newcomers.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert newcomers == [3]


def test_inference_mode_is_the_callers():
    found = []
    with torch.inference_mode():
        list(workers.each(lambda _: found.append(torch.is_inference_mode_enabled()), range(3)))
    list(workers.each(lambda _: found.append(torch.is_inference_mode_enabled()), range(3)))
    assert found == [True] * 3 + [False] * 3


def test_a_failure_comes_when_nothing_is_at_work_any_more():
    begun, ended = [], []

    def work(piece):
        begun.append(piece)
        if piece == 1:
            raise ValueError("piece 1")
        time.sleep(0.1)
        ended.append(piece)

    turns = workers.each(work, range(1000))
    assert next(turns) == 0
    with pytest.raises(ValueError, match="piece 1"):
        next(turns)
    assert sorted([*ended, 1]) == sorted(begun)
    assert len(begun) < 20
    assert list(workers.each(lambda _: None, range(3))) == [0, 1, 2]


def test_who_stops_early_waits_for_what_runs():
    ended = []

    def work(piece):
        time.sleep(0.05)
        ended.append(piece)

    turns = workers.each(work, range(1000))
    next(turns)
    turns.close()
    seen = len(ended)
    time.sleep(0.2)
    assert len(ended) == seen < 20
