"""Where the time of a request goes: no moment counts twice, and every answer tells."""

from __future__ import annotations

from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from queryselect import Client
from queryselect.v1 import selection_pb2, selection_pb2_grpc
from queryselect_service import times as module
from queryselect_service.errors import Cancelled
from queryselect_service.times import PHASES, Times
from tests.service.streams import LONG_P, ask, whole
from tests.service.test_errors import FAR, MARGIN, request
from tests.service.test_server import P, margin

PARTS = ("queue", "receive", "decode", "transfer", "kernel")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def seconds(times: Times) -> dict[str, float]:
    return {name: took for name in PHASES if (took := times.seconds(name))}


def test_a_moment_counts_for_one_phase_only(clock):
    times = Times()
    clock.now += 1  # for none
    with times.phase("receive"):
        clock.now += 2
        with times.phase("decode"):
            clock.now += 3
            times.begin("kernel")
        clock.now += 4
    clock.now += 5
    times.end("kernel")
    clock.now += 6
    assert seconds(times) == {"receive": 2, "decode": 3, "kernel": 9}
    assert times.total == 21
    assert times.spans == {"receive": (101, 110), "decode": (103, 106), "kernel": (106, 115)}


def test_a_phase_may_come_again_and_within_itself(clock):
    times = Times()
    for _ in range(2):
        with times.phase("transfer"), times.phase("transfer"):
            clock.now += 1
        clock.now += 10
    assert seconds(times) == {"transfer": 2}
    assert times.spans == {"transfer": (100, 112)}


def test_what_goes_on_counts_up_to_now(clock):
    times = Times()
    times.begin("queue")
    clock.now += 1
    assert times.seconds("queue") == 1
    clock.now += 1
    assert times.seconds("queue") == 2


def test_the_phase_that_failed_first_is_the_last():
    times = Times()
    assert times.last == "receive"
    with times.phase("decode"):
        pass
    assert times.last == "decode"
    with pytest.raises(Cancelled), times.phase("receive"), times.phase("kernel"):
        raise Cancelled("gone")
    with times.phase("encode"):
        pass
    assert times.last == "kernel"


def sane(info: selection_pb2.RunInfo) -> dict[str, int]:
    """The parts in nanoseconds; all six are set, and together the parts are no more than the total."""
    assert all(info.HasField(name) for name in (*PARTS, "total"))
    parts = {name: getattr(info, name).ToNanoseconds() for name in PARTS}
    assert all(each >= 0 for each in parts.values())
    assert sum(parts.values()) <= info.total.ToNanoseconds()
    assert info.version
    assert info.device
    assert info.compute_dtype
    return parts


def parts_of(picks) -> dict[str, float]:
    parts = {name: getattr(picks.info, name) for name in PARTS}
    assert sum(parts.values()) <= picks.info.total + 1e-9
    return {name for name, each in parts.items() if each > 0}


def test_every_answer_tells_where_its_time_went(channel: grpc.Channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    assert all(sane(stub.Select(margin()).info).values())
    checked = sane(stub.Select(margin(validate_only=True)).info)
    assert {name for name, each in checked.items() if each} == {"queue", "receive", "decode"}


@pytest.mark.parametrize("size", [1000, 10_000_000])
@pytest.mark.parametrize("strategy", [MARGIN, FAR])
def test_so_does_every_stream_though_rows_are_scored_while_others_come(channel, strategy, size):
    message = request(strategy)
    message.validate_only = False
    parts = sane(ask(channel, whole(message, size)).response.info)
    assert all(parts.values())
    message.validate_only = True
    parts = sane(ask(channel, whole(message, size)).response.info)
    assert parts["kernel"] == parts["transfer"] == 0


def test_a_long_stream_is_sane_too(remote: Client):
    picks = remote.select("margin", 5, probabilities=np.tile(LONG_P, (70, 1)))  # 5 MB: a stream
    assert parts_of(picks) == set(PARTS)


def test_in_this_process_nothing_is_received():
    with Client("local:") as local:
        assert parts_of(local.select("margin", 2, probabilities=P)) == {"queue", "decode", "transfer", "kernel"}
        assert parts_of(local.select("margin", 2, probabilities=P, validate_only=True)) <= {"queue", "decode"}
