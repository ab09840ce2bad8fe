"""Streams that fall silent, and callers who leave: nothing stays set aside for them."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from queryselect.strategies import v1 as strategies
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2
from queryselect_service import wire
from queryselect_service.call import Call
from queryselect_service.errors import Cancelled
from tests import plugins
from tests.service.streams import (
    LONG_P,
    LONG_X,
    MIB,
    Code,
    Talk,
    ask,
    by_kind,
    chunk,
    counted,
    cut,
    free,
    long_request,
    refused,
    serves,
    start,
    streamed,
    waiting,
    whole,
)
from tests.service.test_errors import (
    FAR,
    P,
    at,
    at_work,
    request,
    sleepy,
    stopped_within,
    tensor,
)
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("no_bugs")


# Silence


@pytest.fixture
def impatient(serve):
    return serve(idle_stream=0.5)


@pytest.mark.parametrize("sent", [0, 1, 3])
def test_silence_ends_a_stream(impatient, sent):
    """Before the start, after it, and between chunks."""
    own, channel = impatient
    began = time.monotonic()
    failure = refused(own, channel, *whole(request(), 100)[:sent], end=False)
    assert 0.4 < time.monotonic() - began < 2.5
    assert failure.code is Code.ABORTED
    assert "silent for 0.5 s" in failure.words
    assert failure.detail(error_details_pb2.ErrorInfo).reason == "IDLE"


def test_a_client_that_is_slow_but_not_silent_is_served(impatient):
    own, channel = impatient
    first, *chunks = whole(request(), 80)
    with Talk(channel) as talk:
        for each in (first, *chunks):
            time.sleep(0.25)
            talk.send(each)
        time.sleep(0.25)
        talk.end()
        talk.until("result")
    free(own)


def test_an_upload_that_is_too_slow_for_too_long_is_aborted(serve):
    """It is never silent, and would keep its memory for hours."""
    own, channel = serve(upload_grace=0.5, min_upload_rate=1000)
    first, *chunks = whole(long_request("margin"), 8)
    aborted = threading.Event()

    def trickle(talk: Talk) -> None:
        for each in chunks:  # 160 bytes a second
            talk.send(each)
            if aborted.wait(0.05):
                return

    with Talk(channel, first) as talk:
        sender = threading.Thread(target=trickle, args=(talk,))
        sender.start()
        failure = talk.failure()
        aborted.set()
        sender.join(5)
    assert failure.code is Code.ABORTED
    assert "fewer than 1000 per second" in failure.words
    assert failure.detail(error_details_pb2.ErrorInfo).reason == "SLOW"
    serves(own, channel)


def test_a_slow_kernel_is_no_silence(impatient):
    """Of a selection, and of blocks of rows: the client waits for the server, not the server for the client."""
    own, channel = impatient
    assert ask(channel, [start(sleepy(seconds=0.9))]).response.HasField("indices")
    scaled = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled", parameters={"seconds": 0.12}))
    p, x = np.tile(LONG_P, (6, 1)), np.tile(LONG_X, (6, 1))  # 14 blocks
    first, data = streamed(request(scaled, probabilities=tensor(p), embeddings=tensor(x)))
    sizes = {path: len(elements) // 20 for path, elements in data.items()}
    columns = zip(*(cut(path, data[path], sizes[path]) for path in data), strict=True)
    assert ask(channel, [first, *itertools.chain(*columns)]).response.HasField("indices")
    free(own)


# Those who leave


def until_seen(before: float) -> None:
    """Waits until a kernel is at work."""
    assert until(lambda: plugins.last_seen["at"] >= before, 10)


@by_kind
def test_a_cancel_during_the_upload_gives_everything_back(running, channel, message, path, data):
    name = message.strategy.WhichOneof("kind")
    before = counted(running, "CANCELLED", name)
    for sent in (0, 50):
        first, _ = streamed(message, path)
        with Talk(channel, first, chunk(path, 0, data[:sent])) as talk:
            talk.until("admitted")
            talk.call.cancel()
            free(running)
        serves(running, channel)
    assert counted(running, "CANCELLED", name) == before + 2


def test_messages_that_break_off_mean_that_their_sender_has_gone(running):
    """gRPC's messages end with an error when a caller leaves, at times before the service is told that it left."""

    def messages(*some):
        yield from some
        raise grpc.RpcError

    first, chunks = request(), [wire.Part("pool.probabilities", 0, memoryview(P[:3].tobytes()))]
    first.pool.probabilities.streamed.SetInParent()
    service = running.frontend.service
    with closing(service.select_stream(messages(), Call("a"))) as stream, pytest.raises(Cancelled):
        stream.start()
    with closing(service.select_stream(messages(first, *chunks), Call("b"))) as stream:
        answers = stream.run(stream.start())
        assert next(answers).HasField("admitted")
        with pytest.raises(Cancelled):
            list(answers)
    free(running)


def test_messages_that_just_end_may_mean_so_too(running):
    """They end, and a moment later the service is told."""

    def messages(call, *some):
        yield from some
        threading.Timer(0.02, call.leave).start()

    service, first = running.frontend.service, request()
    first.pool.probabilities.streamed.SetInParent()
    for said in ([], [first]):
        call = Call("a")
        with closing(service.select_stream(messages(call, *said), call)) as stream, pytest.raises(Cancelled):
            list(stream.run(stream.start()))
    call, context = Call("b"), SimpleNamespace(cancel=None)
    with pytest.raises(Cancelled):
        running.frontend.message(messages(call), call, context, 5)
    free(running)


def test_many_cancels_at_any_moment_give_everything_back(running, channel):
    """Cancels that meet messages on their way."""
    messages = whole(long_request("margin"), 5000)
    for number in range(30):
        with Talk(channel, *messages) as talk:
            time.sleep(number * 0.001)
            talk.call.cancel()
    serves(running, channel)


@by_kind
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_who_leaves_the_queue_leaves_at_once(running, channel, message, path, data, how):
    """The device is busy with another request, which is not disturbed."""
    stub, host = selection_pb2_grpc.SelectionServiceStub(channel), running.frontend.service.engine.host
    working = at_work(stub, 0.9)
    timeout = 30 if how == "cancel" else 0.3
    with Talk(channel, *whole(message), timeout=timeout) as talk:
        talk.end()
        waiting(running, 1)
        if how == "cancel":
            talk.call.cancel()
        failure = talk.failure()
    assert failure.code is (Code.CANCELLED if how == "cancel" else Code.DEADLINE_EXCEEDED)
    waiting(running, 0)
    assert until(lambda: host.taken == 1, 0.5), "its place is free while the other is still at work"
    assert not working.done()
    assert working.result().HasField("indices")
    serves(running, channel)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_who_leaves_a_kernel_stops_it(running, channel, how):
    before = time.monotonic()
    with Talk(channel, start(sleepy(seconds=30)), timeout=30 if how == "cancel" else 0.5) as talk:
        talk.end()
        until_seen(before)
        if how == "cancel":
            talk.call.cancel()
        failure = talk.failure()
        assert stopped_within(0.25)
    assert failure.code is (Code.CANCELLED if how == "cancel" else Code.DEADLINE_EXCEEDED)
    serves(running, channel)


def test_a_cancel_while_rows_are_scored_stops_after_the_block(running, channel):
    scaled = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled", parameters={"seconds": 0.1}))
    p, x = np.tile(LONG_P, (10, 1)), np.tile(LONG_X, (10, 1))  # 22 blocks, which is more than 2 seconds
    first, data = streamed(request(scaled, probabilities=tensor(p), embeddings=tensor(x)))
    before = time.monotonic()
    with Talk(channel, first, *(each for path in data for each in cut(path, data[path], MIB))) as talk:
        talk.end()
        until_seen(before)
        talk.call.cancel()
        assert stopped_within(0.25)
    serves(running, channel)


def test_a_stream_that_fails_while_rows_are_scored_stops_the_kernel(running, channel):
    """Its memory is free when nothing reads it any more."""
    scaled = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled", parameters={"seconds": 0.1}))
    p, x = np.tile(LONG_P, (10, 1)), at(np.tile(LONG_X, (10, 1)), 50_000, 0, np.nan)
    first, data = streamed(request(scaled, probabilities=tensor(p), embeddings=tensor(x)))
    border, before = 12 * 4096 * 10, time.monotonic()  # 10 blocks, which are scored in one go
    plugins.scaled_rows.clear()
    with Talk(channel, first, *cut("pool.probabilities", data["pool.probabilities"], MIB)) as talk:
        talk.send(chunk("pool.embeddings", 0, data["pool.embeddings"][:border]))
        until_seen(before)
        talk.send(chunk("pool.embeddings", border, data["pool.embeddings"][border:]))
        failure = talk.failure()
        ended = time.monotonic()
    assert failure.field == "pool.embeddings"
    serves(running, channel)
    time.sleep(0.3)
    assert plugins.last_seen["at"] < ended
    assert len(plugins.scaled_rows) < 10


def test_a_cancel_stops_a_real_kernel(running, channel):
    """k_center_greedy on 60,000 rows with 5,000 picks to go: minutes, unless it hears the caller leave."""
    x = np.random.default_rng(0).normal(size=(60_000, 200)).astype(np.float32)
    with Talk(channel, *whole(request(FAR, embeddings=tensor(x), budget=5000))) as talk:
        talk.end()
        talk.until("admitted")
        while (progress := next(talk.call).progress).phase != selection_pb2.PHASE_SELECTING:
            pass
        assert 0 < progress.done < progress.total == 5000
        talk.call.cancel()
        free(running, 1.0)  # 250 ms, and the rest for a busy machine
    serves(running, channel)


CLIENT = """
import sys, time
import grpc
from queryselect.v1 import selection_pb2, selection_pb2_grpc

def messages():
    while size := int.from_bytes(sys.stdin.buffer.read(4), "big"):
        yield selection_pb2.SelectStreamRequest.FromString(sys.stdin.buffer.read(size))
    if sys.argv[2] == "hold":
        time.sleep(60)

stub = selection_pb2_grpc.SelectionServiceStub(grpc.insecure_channel(sys.argv[1]))
for message in stub.SelectStream(messages()):
    print(message.WhichOneof("message"), flush=True)
"""


@pytest.mark.parametrize("where", ["upload", "kernel"])
def test_a_client_that_is_killed_gives_everything_back(running, target, channel, where):
    messages = whole(long_request("k_center_greedy"), 5000)[:10] if where == "upload" else [start(sleepy(seconds=60))]
    before = time.monotonic()
    command = [sys.executable, "-c", CLIENT, target, "hold" if where == "upload" else "end"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for each in messages:
            data = each.SerializeToString()
            process.stdin.write(len(data).to_bytes(4, "big") + data)
        process.stdin.write(bytes(4))
        process.stdin.flush()
        assert process.stdout.readline() == b"admitted\n"
        assert running.frontend.service.engine.host.taken == 1
        if where == "kernel":
            until_seen(before)
        process.kill()
        free(running, 3.0)
        assert where == "upload" or stopped_within(0.25)
    serves(running, channel)
