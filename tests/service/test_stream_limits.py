"""The limits of streams: memory, places, one client's streams, a message's length."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from queryselect.v1 import selection_pb2_grpc, tensor_pb2
from tests.service.streams import (
    MIB,
    POOL_SCORES,
    RNG,
    Code,
    Failure,
    Request,
    Talk,
    ask,
    assert_same,
    chunk,
    cut,
    free,
    long_request,
    refused,
    serves,
    start,
    streamed,
    whole,
)
from tests.service.test_errors import (
    FAR,
    busy,
    request,
    tensor,
)
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("no_bugs")


def refused_for_its_size(serve, max_host_bytes: int) -> Failure:
    """How a server of so much memory refuses an upload of 12 MB, none of which was sent."""
    own, channel = serve(max_host_bytes=max_host_bytes)
    shape = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[30_000, 100], streamed=tensor_pb2.Streamed())
    failure = refused(own, channel, start(request(FAR, embeddings=shape)), end=False)
    assert not failure.admitted
    return failure


def test_a_held_upload_over_the_hosts_memory_is_refused_before_it_is_sent(serve):
    failure = refused_for_its_size(serve, 10_000_000)
    assert failure.code is Code.OUT_OF_RANGE
    metadata = failure.detail(error_details_pb2.ErrorInfo).metadata
    assert metadata == {"setting": "max_host_bytes", "limit": "10000000", "size": "12000000"}


def test_an_estimate_over_the_capacity_is_refused_before_it_is_sent(serve):
    failure = refused_for_its_size(serve, 12_000_100)
    assert failure.code is Code.FAILED_PRECONDITION
    metadata = failure.detail(error_details_pb2.ErrorInfo).metadata
    assert int(metadata["estimate"]) > int(metadata["capacity"]) == 12_000_100
    assert metadata["device"] == "cpu"


def test_memory_that_is_set_aside_for_another_is_busy(serve, running, channel):
    first, data = streamed(long_request("k_center_greedy"))
    chunks = [each for path in data for each in cut(path, data[path], MIB)]
    with Talk(channel, first) as talk:
        reserved = talk.until("admitted").reserved_bytes
    free(running)
    own, channel = serve(max_host_bytes=2 * reserved - 100)
    with Talk(channel, first) as talk:
        assert talk.until("admitted").reserved_bytes == reserved
        busy(lambda: ask(channel, [first, *chunks]), f"{reserved} bytes are needed and {reserved - 100} of")
        busy(lambda: ask(channel, [first]), "are free on cpu now")
        talk.send(*chunks)
        talk.end()
        talk.until("result")
    free(own)
    ask(channel, [first, *chunks])
    free(own)


def halves(path: str, data: bytes, block: int) -> list[Request]:
    """The first half of every block of `block` bytes, then the second halves: no block is full until the end."""
    edges = range(0, len(data), block)
    return [
        chunk(path, at + half, data[at + half : at + half + block // 2]) for half in (0, block // 2) for at in edges
    ]


def test_rows_out_of_order_are_held_while_there_is_memory(serve, running, channel):
    """A pointwise strategy holds blocks until they are full; more than there is room for are refused."""
    rows, row = 4096 * 30, 16
    p = RNG.dirichlet(np.ones(2), rows)
    message = request(probabilities=tensor(p), returns=[POOL_SCORES])
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    first, data = streamed(message)
    path, elements = "pool.probabilities", data["pool.probabilities"]
    with Talk(channel, first) as talk:
        reserved = talk.until("admitted").reserved_bytes
    free(running)
    straight, block = cut(path, elements, 100_001), 4096 * row
    own, tight = serve(max_host_bytes=reserved + 4 * block)
    assert len(elements) > 30 * block - 1
    for chunks in (straight, straight[::-1], cut(path, elements, block)[::-1]):
        assert_same(ask(tight, [first, *chunks]).response, unary)
        free(own)
    failure = refused(own, tight, first, *halves(path, elements, block), end=False)
    assert failure.code is Code.OUT_OF_RANGE
    assert failure.detail(error_details_pb2.ErrorInfo).metadata["setting"] == "max_host_bytes"
    roomy, wide = serve(max_host_bytes=2 * reserved + 21 * block)
    assert_same(ask(wide, [first, *halves(path, elements, block)]).response, unary)
    free(roomy)
    with Talk(wide, first) as talk:
        talk.until("admitted")
        busy(lambda: ask(wide, [first, *halves(path, elements, block)]), f"{block} bytes are needed")
    serves(roomy, wide)


def test_a_client_has_so_many_streams(serve):
    own, channel = serve(max_streams_per_peer=2)
    with ExitStack() as stack:
        first, second = (stack.enter_context(Talk(channel, start(request()))) for _ in range(2))
        first.until("admitted")
        second.until("admitted")
        busy(lambda: ask(channel, whole(request())), "this client has 2 streams open already")
        assert selection_pb2_grpc.SelectionServiceStub(channel).Select(request()).HasField("indices")
        with grpc.insecure_channel(f"127.0.0.1:{own.port}", options=[("grpc.use_local_subchannel_pool", 1)]) as other:
            assert ask(other, whole(request())).response
        first.end()
        first.until("result")
        assert until(lambda: own.frontend._selecting.taken == 1)
        assert ask(channel, whole(request())).response
        second.end()
        second.until("result")
    serves(own, channel)


def test_a_stream_has_its_place_from_the_start(serve):
    """Where all are taken the next is told so before it sends anything."""
    own, channel = serve(max_queue=1)
    with Talk(channel, start(request())) as one, Talk(channel, streamed(request())[0]) as two:
        one.until("admitted")
        two.until("admitted")
        busy(lambda: ask(channel, [streamed(request())[0]]), "2 requests are waiting for cpu already")
        one.end()
        one.until("result")
        assert list(one.call) == []
        assert ask(channel, whole(request())).response
    serves(own, channel)


def test_a_draining_server_finishes_the_streams_that_it_has(serve):
    own, channel = serve()
    first, *chunks = whole(request(), 100)
    with Talk(channel, first) as talk:
        talk.until("admitted")
        drain = threading.Thread(target=own.drain, args=(5.0,))
        drain.start()
        while not own.frontend._draining:
            time.sleep(0.005)
        with Talk(channel, first) as other:
            failure = other.failure()
        assert (failure.code, failure.admitted) == (Code.UNAVAILABLE, False)
        talk.send(*chunks)
        talk.end()
        assert talk.until("result").HasField("indices")
    drain.join()
    free(own)


def test_a_chunk_over_the_limit_of_a_message_is_refused_by_grpc_itself(serve):
    """And one of the recommended length is not, however small the limit."""
    own, channel = serve(max_inline_bytes=1024)
    x = np.zeros((200_000, 2))
    first, data = streamed(request(FAR, embeddings=tensor(x)))
    for size in (2 * MIB, len(data["pool.embeddings"])):
        with Talk(channel, first, *cut("pool.embeddings", data["pool.embeddings"], size)) as talk:
            failure = talk.failure()
        assert failure.code is Code.RESOURCE_EXHAUSTED
        assert failure.status is None
        serves(own, channel)
    with Talk(channel, first) as talk:
        size = talk.until("admitted").recommended_chunk_bytes
        talk.send(*cut("pool.embeddings", data["pool.embeddings"], size))
        talk.end()
        talk.until("result")
    free(own)
