"""Peers of one server: who has much waiting makes room for who has little, and waits for it no longer than is fair."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from queryselect.v1 import selection_pb2_grpc
from queryselect_service import server, servicer
from tests.service import http2
from tests.service.streams import Talk, ask, serves, start, streamed, waiting, whole
from tests.service.test_errors import FAR, at_work, busy, request, sleepy, tensor
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("no_bugs")


@pytest.fixture
def peers():
    """Connections of their own to a server, each of which is a peer."""
    with ExitStack() as stack:

        def connect(own):
            options = [("grpc.use_local_subchannel_pool", 1)]
            return stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{own.port}", options))

        yield connect


def test_a_full_line_of_one_peer_makes_room_for_another(serve, peers):
    """Its newest request is told to come back; those of equal peers are left alone."""
    own, channel = serve(max_queue=4)
    many, few = (selection_pb2_grpc.SelectionServiceStub(each) for each in (channel, peers(own)))
    running, held = at_work(many, 1.5), []
    for number in range(4):
        held.append(many.Select.future(sleepy(seconds=0.01)))
        waiting(own, number + 1)
    mine = [few.Select.future(sleepy(seconds=0.01)) for _ in range(2)]
    busy(held[3].result, "another client, which has less of it, needs the room")
    busy(held[2].result, "needs the room")
    waiting(own, 4)
    busy(lambda: few.Select(request()), "5 requests are waiting")  # three against two would not be fair
    assert all(each.result().HasField("indices") for each in (running, *held[:2], *mine))
    serves(own, channel)


def test_a_flood_does_not_keep_another_peer_from_its_turn(serve, peers):
    own, channel = serve()
    flood, other = (selection_pb2_grpc.SelectionServiceStub(each) for each in (channel, peers(own)))
    running = at_work(flood, 0.5)
    calls = [flood.Select.future(sleepy(seconds=0.05)) for _ in range(40)]
    waiting(own, 40)
    answer = other.Select(sleepy(seconds=0.05))
    assert answer.HasField("indices")
    assert sum(each.done() for each in calls) <= 5
    for each in (running, *calls):
        each.cancel()
    serves(own, channel)


def test_an_upload_makes_room_for_a_peer_that_has_less_memory(serve, peers):
    message = request(FAR, embeddings=tensor(np.eye(300, dtype=np.float32)))
    first, _ = streamed(message)
    own, channel = serve()
    with Talk(channel, first) as talk:
        reserved = talk.until("admitted").reserved_bytes
    own, channel = serve(max_host_bytes=2 * reserved + 100)
    with ExitStack() as stack:
        one, two = (stack.enter_context(Talk(channel)) for _ in range(2))
        for each in (one, two):
            each.send(first)
            each.until("admitted")
        busy(lambda: ask(channel, [first]), "are free on cpu now")
        assert ask(peers(own), whole(message)).response.HasField("indices")
        failure = two.failure()
        assert (failure.code, failure.words.partition(",")[0]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "cpu is full")
        assert not one.call.done()
    serves(own, channel)


def test_silent_streams_of_one_peer_leave_threads_for_others(serve, peers):
    """All threads that selections may have wait for a client that says nothing: its newest makes room."""
    own, channel = serve(max_queue=2, max_streams_per_peer=100)
    stop = threading.Event()

    def say_nothing():
        stop.wait(20)
        yield from ()

    silent = selection_pb2_grpc.SelectionServiceStub(channel)
    streams = [silent.SelectStream(say_nothing()) for _ in range(10)]
    assert until(lambda: own.frontend._selecting.taken >= 10)
    busy(lambda: list(silent.SelectStream(iter([start(request())]))), "10 requests are waiting for this server")
    other = peers(own)
    assert selection_pb2_grpc.SelectionServiceStub(other).Select(request()).HasField("indices")
    assert ask(other, whole(request())).response.HasField("indices")
    assert sum(each.done() and each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for each in streams) in {1, 2}
    for each in streams:
        each.cancel()
    stop.set()
    serves(own, channel)


def test_a_message_that_is_long_in_coming_makes_room_and_does_not_come_for_ever(serve, peers):
    """A unary request has no chunks to count: it has a time to come in, and its connection's share of the places."""
    own, channel = serve(max_queue=0, upload_grace=3.0)
    slow = channel.stream_unary(
        "/queryselect.v1.SelectionService/Select",
        request_serializer=lambda each: each.SerializeToString(),
        response_deserializer=lambda data: data,
    )

    def later():
        stop.wait(20)
        yield request()

    stop = threading.Event()
    calls = [slow.future(later()) for _ in range(8)]
    assert until(lambda: own.frontend._selecting.taken >= 8)
    began = time.monotonic()
    assert selection_pb2_grpc.SelectionServiceStub(peers(own)).Select(request()).HasField("indices")
    assert time.monotonic() - began < 2.5
    assert {each.code() for each in calls} == {grpc.StatusCode.CANCELLED}
    assert time.monotonic() - began < 8
    stop.set()
    serves(own, channel)


def test_health_answers_while_every_thread_of_selections_is_taken(serve, peers):
    own, channel = serve(max_queue=0)
    stop = threading.Event()

    def say_nothing():
        stop.wait(20)
        yield from ()

    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    streams = [stub.SelectStream(say_nothing()) for _ in range(100)]
    answer = health_pb2_grpc.HealthStub(peers(own)).Check(health_pb2.HealthCheckRequest(), timeout=2)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    for each in streams:
        each.cancel()
    stop.set()
    assert until(lambda: not own.frontend._selecting.taken)
    serves(own, channel)


@pytest.mark.parametrize(
    "method",
    [
        "queryselect.v1.ServerService/GetServerInfo",
        "queryselect.v1.StrategyService/ListStrategies",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_requests_without_a_message_do_not_hold_up_others_for_long(serve, method, monkeypatch):
    """More than there are threads, none of which says what it wants; health elsewhere notices nothing."""
    for module in (server, servicer):
        monkeypatch.setattr(module, "PROMPT", 0.3)
    own, channel = serve(health_port=0)
    with ExitStack() as stack:
        for _ in range(2 * server.THREADS):
            stack.enter_context(http2.begin(own.port, f"/{method}"))
        with grpc.insecure_channel(f"127.0.0.1:{own.health_port}") as plain:
            assert health_pb2_grpc.HealthStub(plain).Check(health_pb2.HealthCheckRequest(), timeout=2).status == 1
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    serves(own, channel)


@pytest.mark.parametrize("method", ["Check", "Watch"])
def test_health_is_told_what_is_missing(serve, method):
    _, channel = serve()
    call = channel.stream_unary(f"/grpc.health.v1.Health/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        call(iter(()), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "needs one message" in caught.value.details()
