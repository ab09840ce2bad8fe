"""SelectStream by raw calls: the answer is the unary one however the bytes come, and whatever goes wrong is named.

After every fault the server serves the next stream, and nothing stays set aside for the last.
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from queryselect.strategies import v1 as strategies
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2, tensor_pb2
from queryselect_service import server, wire
from queryselect_service import strategy as registry
from queryselect_service.engine import Call
from queryselect_service.errors import Cancelled
from queryselect_service.request import INTEGER_INPUTS
from queryselect_service.settings import Settings
from queryselect_service.stream import READ_AHEAD, Inbox
from tests import plugins
from tests.service.test_errors import (
    FAR,
    INVALID,
    MARGIN,
    OVER,
    RANDOM,
    UNSERVED,
    P,
    X,
    at,
    at_work,
    busy,
    detail,
    fail,
    request,
    sleepy,
    stopped_within,
    tensor,
)

registry.load()
Code, Request = grpc.StatusCode, selection_pb2.SelectStreamRequest
MIB = 1 << 20
POOL_SCORES = selection_pb2.RETURN_POOL_SCORES
RNG = np.random.default_rng(0)
#: Pools of several blocks of rows.
LONG_P = RNG.dirichlet(np.ones(2), 9000).astype(np.float32)
LONG_X = RNG.normal(size=(9000, 3)).astype(np.float32)


# One stream: what is sent


def start(message: selection_pb2.SelectRequest) -> Request:
    return Request(start=message)


def chunk(path: str, offset: int, data: bytes, **more) -> Request:
    return Request(chunk=selection_pb2.Chunk(path=path, offset=offset, data=data, **more))


def cut(path: str, data: bytes, size: int) -> list[Request]:
    """A tensor's bytes in chunks of `size`."""
    return [chunk(path, offset, data[offset : offset + size]) for offset in range(0, len(data), size)]


def at_path(message, path: str):
    for name in path.split("."):
        message = getattr(message, name)
    return message


def streamed(message: selection_pb2.SelectRequest, *paths: str) -> tuple[Request, dict[str, bytes]]:
    """The start of the same request with the tensors at `paths`, by default all, marked as streamed; their bytes."""
    copy, data = selection_pb2.SelectRequest(), {}
    copy.CopyFrom(message)
    if not paths:
        pool = copy.pool
        paths = tuple(f"pool.{each.name}" for each, value in pool.ListFields() if isinstance(value, tensor_pb2.Tensor))
        paths += ("pool.ids.integers",) * (pool.ids.WhichOneof("kind") == "integers")
    for path in paths:
        each = at_path(copy, path)
        data[path] = each.data
        each.streamed.SetInParent()
    return start(copy), data


def whole(message: selection_pb2.SelectRequest, size: int = MIB) -> list[Request]:
    """Every message of a good stream."""
    first, data = streamed(message)
    return [first, *(each for path in data for each in cut(path, data[path], size))]


# What comes back


@dataclass
class Answer:
    """What a stream answered. response: its tensors put together. apart: paths of those that came in chunks."""

    admitted: selection_pb2.Admitted | None = None
    progress: list[selection_pb2.Progress] = field(default_factory=list)
    response: selection_pb2.SelectResponse | None = None
    apart: dict[str, bytearray] = field(default_factory=dict)
    largest: int = 0


def read(responses) -> Answer:
    """The messages of a stream, in the order that is promised: admitted, progress, result, its chunks."""
    answer = Answer()
    for message in responses:
        answer.largest = max(answer.largest, message.ByteSize())
        kind = message.WhichOneof("message")
        if kind == "admitted":
            assert answer == Answer(largest=answer.largest), "admitted comes once, and first"
            answer.admitted = message.admitted
            continue
        assert answer.admitted is not None
        if kind == "chunk":
            data = answer.apart.setdefault(message.chunk.path, bytearray())
            assert message.chunk.offset == len(data)
            data += message.chunk.data
        else:
            assert answer.response is None
            if kind == "progress":
                answer.progress.append(message.progress)
            else:
                answer.response = message.result
    for path, data in answer.apart.items():
        each = at_path(answer.response, path)
        assert each.WhichOneof("source") == "streamed"
        each.data = bytes(data)
    return answer


def ask(channel: grpc.Channel, messages, **options) -> Answer:
    """The answer to a stream that sends everything at once."""
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    return read(stub.SelectStream(iter(messages), **{"timeout": 30, **options}))


class Talk:
    """A stream that sends what a test says, when the test says so."""

    def __init__(self, channel: grpc.Channel, *messages, **options) -> None:
        self._out = queue.SimpleQueue()
        method = channel.stream_stream(
            "/queryselect.v1.SelectionService/SelectStream",
            request_serializer=lambda each: each if isinstance(each, bytes) else each.SerializeToString(),
            response_deserializer=selection_pb2.SelectStreamResponse.FromString,
        )
        self.call = method(iter(self._out.get, None), **{"timeout": 15, **options})
        self.send(*messages)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.end()
        self.call.cancel()

    def send(self, *messages) -> None:
        for each in messages:
            self._out.put(each)

    def end(self) -> None:
        self._out.put(None)

    def until(self, kind: str):
        """The next message of that kind; those before it are passed over."""
        message = next(each for each in self.call if each.WhichOneof("message") == kind)
        return getattr(message, kind)

    def failure(self) -> Failure:
        """How the stream failed. It must, and without a result."""
        admitted = False
        try:
            for message in self.call:
                assert message.WhichOneof("message") in {"admitted", "progress"}
                admitted |= message.HasField("admitted")
        except grpc.RpcError as error:
            return Failure(error, admitted)
        raise AssertionError("the stream did not fail")


class Failure:
    """How a stream failed. admitted: whether it was admitted before, as far as it was read."""

    def __init__(self, error: grpc.RpcError, admitted: bool) -> None:
        self.admitted, self.code, self.words = admitted, error.code(), error.details()
        self.status, self.trailers = rpc_status.from_call(error), dict(error.trailing_metadata())

    def detail(self, kind):
        return detail(self.status, kind)

    @property
    def field(self) -> str:
        (violation,) = self.detail(error_details_pb2.BadRequest).field_violations
        return violation.field


def refused(running: server.Server, channel: grpc.Channel, *messages, end: bool = True, **options) -> Failure:
    """How a stream of these messages fails; the server serves the next one, and nothing stays set aside.

    end: whether the client says that this was all.
    """
    with Talk(channel, *messages, **options) as talk:
        if end:
            talk.end()
        failure = talk.failure()
    assert failure.code is Code.DEADLINE_EXCEEDED or failure.trailers["x-request-id"]
    serves(running, channel)
    return failure


def serves(running: server.Server, channel: grpc.Channel) -> None:
    assert len(ask(channel, whole(request())).response.indices.data) == 16
    free(running)


def free(running: server.Server, seconds: float = 2.0) -> None:
    """Whatever was set aside, and every thread that read a stream, is back within so many seconds."""
    frontend = running.frontend
    engine, until = frontend.service.engine, time.monotonic() + seconds

    def held():
        inboxes = [each for each in threading.enumerate() if each.name == "inbox"]
        rooms = (engine.host.taken, engine.host.reserved, len(engine.queue))
        return rooms, frontend._running, frontend._selecting, dict(frontend._streams), len(inboxes)

    while held() != ((0, 0, 0), 0, 0, {}, 0) and time.monotonic() < until:
        time.sleep(0.005)
    assert held() == ((0, 0, 0), 0, 0, {}, 0)


def counted(running: server.Server, code: str, strategy: str = "margin") -> float:
    """How many streams ended with that code."""
    return running.frontend.metrics.requests.labels("SelectStream", strategy, code)._value.get()


def assert_same(streamed: selection_pb2.SelectResponse, unary: selection_pb2.SelectResponse) -> None:
    """Bit for bit, but for times and the request's id."""
    one, two = selection_pb2.SelectResponse(), selection_pb2.SelectResponse()
    one.CopyFrom(streamed)
    two.CopyFrom(unary)
    for name in ("device", "compute_dtype", "seed", "version"):
        assert getattr(one.info, name) == getattr(two.info, name)
    for each in (one, two):
        assert each.request_id
        each.ClearField("info")
        each.ClearField("request_id")
    assert one == two


@pytest.fixture(autouse=True)
def no_bugs(caplog):
    """A caller's fault, or its leaving, is no bug of the server: none is logged."""
    yield
    assert [each for each in caplog.get_records("call") if each.levelno >= logging.ERROR] == []


@pytest.fixture
def serve():
    """Starts servers of their own settings: server and channel."""
    with ExitStack() as stack:

        def begin(**options):
            started = server.start(Settings(port=0, metrics_port=-1, **options))
            stack.callback(started.drain, 0.1)
            return started, stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{started.port}"))

        yield begin


# The good stream


def test_admitted_comes_before_any_chunk_is_sent(running, channel):
    first, data = streamed(request(request_id="job-3"))
    with Talk(channel, first) as talk:
        admitted = talk.until("admitted")
        assert admitted.request_id == "job-3"
        assert admitted.reserved_bytes > 0
        assert running.frontend.service.engine.host.reserved == admitted.reserved_bytes
        assert MIB <= admitted.recommended_chunk_bytes <= 4 * MIB
        talk.send(*cut("pool.probabilities", data["pool.probabilities"], 100))
        talk.end()
        result = talk.until("result")
        assert list(talk.call) == []
        assert dict(talk.call.trailing_metadata())["x-request-id"] == result.request_id == "job-3"
    info = result.info
    parts = [getattr(info, name).ToNanoseconds() for name in ("queue", "receive", "decode", "transfer", "kernel")]
    assert 0 < sum(parts) <= info.total.ToNanoseconds()
    assert info.receive.ToNanoseconds() > 0
    free(running)


def test_a_request_id_may_come_as_metadata_and_is_made_up_otherwise(channel):
    named = ask(channel, whole(request()), metadata=(("x-request-id", "abc"),))
    assert named.admitted.request_id == named.response.request_id == "abc"
    one, two = (ask(channel, whole(request())).admitted.request_id for _ in range(2))
    assert one != two
    assert len(one) == 32


def typed(x: torch.Tensor) -> tensor_pb2.Tensor:
    data = x.contiguous().view(torch.uint8).numpy().tobytes()
    return tensor_pb2.Tensor(dtype=wire.NUMBERS[x.dtype], shape=x.shape, data=data)


def some_request(name: str, dtype: torch.dtype, rows: int) -> selection_pb2.SelectRequest:
    """A request for any strategy, with lists of rows of both kinds and ids."""
    strategy, message = registry.STRATEGIES[name], strategy_pb2.Strategy()
    getattr(message, name).SetInParent()
    letters = {"N": rows, "D": 3, "C": 4, "K": 2, "P": 5, "L": 2}
    pool = {}
    for each in strategy.inputs:
        shape = [letters[letter] for letter in each.shape.split()]
        if not each.required:
            continue
        if each.name in INTEGER_INPUTS:
            pool[each.name] = typed(torch.from_numpy(RNG.integers(0, 3, shape)))
        elif each.name in ("probabilities", "samples"):
            pool[each.name] = typed(torch.from_numpy(RNG.dirichlet(np.ones(shape[-1]), shape[:-1])).to(dtype))
        else:
            pool[each.name] = typed(torch.from_numpy(RNG.normal(size=shape)).to(dtype))
    mask = np.zeros(rows, bool)
    mask[[4, 5]] = True
    return request(
        message,
        budget=5,
        **pool,
        num_rows=rows,
        labeled=tensor(np.array([1, 3])),
        excluded=tensor(mask),
        ids=selection_pb2.Ids(integers=tensor(np.arange(rows) + 10**9)),
        seed=7,
        returns=[POOL_SCORES] if strategy.pool_scores else [],
    )


LISTS = ("pool.labeled", "pool.pending", "pool.excluded", "pool.candidates")


def ordered(chunks: list[Request], order: str) -> list[Request]:
    if order == "shuffled":
        return [chunks[place] for place in np.random.default_rng(1).permutation(len(chunks))]
    last = "lists last" in order
    return sorted(chunks[:: -1 if "reversed" in order else 1], key=lambda each: (each.chunk.path in LISTS) == last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_the_answer_is_the_unary_one_however_the_bytes_come(running, channel, name, dtype):
    """Cut anywhere, within elements and within rows, in any order, the tensors one after the other or mixed."""
    message = some_request(name, dtype, 13)
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    assert len(unary.ids.integers.data) == 5 * 8
    first, data = streamed(message)
    assert {*LISTS[::2], "pool.ids.integers"} <= set(data)
    ways = [(1, "shuffled"), (7, "reversed"), (7, "lists last"), (37, "reversed, lists last"), (37, "shuffled")]
    for size, order in [*ways, (MIB, "straight"), (MIB, "lists last")]:
        chunks = [each for path in data for each in cut(path, data[path], size)]
        answer = ask(channel, [first, *ordered(chunks, order)])
        assert_same(answer.response, unary)
    free(running)


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_some_tensors_may_come_inside_the_start(channel, name):
    message = some_request(name, torch.float32, 50)
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    _, every = streamed(message)
    for path in every:
        first, data = streamed(message, path)
        assert_same(ask(channel, [first, *cut(path, data[path], 99)]).response, unary)
    assert_same(ask(channel, [start(message)]).response, unary)


@cache
def long_request(name: str) -> selection_pb2.SelectRequest:
    strategy = strategy_pb2.Strategy()
    getattr(strategy, name).SetInParent()
    inputs = {"embeddings": tensor(LONG_X)} if name == "k_center_greedy" else {"probabilities": tensor(LONG_P)}
    lists = {"labeled": tensor([8999, 18]), "excluded": tensor(np.arange(9000) % 7 == 3)}
    return request(strategy, budget=20, **inputs, **lists, returns=[POOL_SCORES])


@cache
def long_answer(target: str, name: str) -> selection_pb2.SelectResponse:
    with grpc.insecure_channel(target) as channel:
        return selection_pb2_grpc.SelectionServiceStub(channel).Select(long_request(name))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_borders_and_order_of_chunks_change_nothing(running, target, channel, data):
    """Over several blocks of rows, with and without checksums."""
    name = data.draw(st.sampled_from(["margin", "entropy", "k_center_greedy"]))
    first, tensors = streamed(long_request(name))
    pieces = []
    for path, whole_bytes in tensors.items():
        borders = data.draw(st.lists(st.integers(0, len(whole_bytes)), max_size=12))
        pieces += [
            (path, at, whole_bytes[at:to])
            for at, to in itertools.pairwise(sorted([0, len(whole_bytes), *borders]))  # some are empty
        ]
    crc = data.draw(st.booleans())
    chunks = [
        chunk(*piece, crc32=zlib.crc32(piece[2])) if crc else chunk(*piece)
        for piece in data.draw(st.permutations(pieces))
    ]
    assert_same(ask(channel, [first, *chunks]).response, long_answer(target, name))


def test_rows_of_many_entries_are_scored_in_the_same_blocks(channel):
    """A block has fewer than 4096 rows where they are wide: also where chunks don't end with rows."""
    wide = torch.from_numpy(RNG.normal(size=(900, 3000))).half()
    message = request(strategy_pb2.Strategy(entropy=strategies.Entropy()), logits=typed(wide), returns=[POOL_SCORES])
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    first, data = streamed(message)
    chunks = cut("pool.logits", data["pool.logits"], 1_000_003)
    for order in (chunks, chunks[::-1]):
        assert_same(ask(channel, [first, *order]).response, unary)


@pytest.mark.parametrize("paths", [("pool.probabilities",), ("pool.embeddings",), ()], ids=["one", "other", "both"])
def test_a_pointwise_kernel_of_two_inputs_may_have_one_inside_the_start(running, channel, paths):
    """Rows meet, whichever of their inputs came in which way."""
    custom = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled"))
    inputs = {"probabilities": tensor(LONG_P), "embeddings": tensor(LONG_X)}
    message = request(custom, **inputs, returns=[POOL_SCORES])
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    first, data = streamed(message, *paths)
    chunks = [each for path in data for each in cut(path, data[path], 10_001)]
    assert_same(ask(channel, [first, *chunks]).response, unary)
    serves(running, channel)


@pytest.mark.parametrize("paths", [("pool.probabilities",), ("pool.embeddings",), ()], ids=["one", "other", "both"])
def test_blocks_of_rows_are_the_same_whichever_inputs_are_streamed(channel, paths):
    """Their size follows from the widest input, also where that came inside the start."""
    x = torch.from_numpy(RNG.normal(size=(900, 3000))).half()
    custom = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled"))
    message = request(custom, probabilities=tensor(LONG_P[:900]), embeddings=typed(x))
    first, data = streamed(message, *paths)
    plugins.scaled_rows.clear()
    ask(channel, [first, *(each for path in data for each in cut(path, data[path], MIB))])
    assert list(plugins.scaled_rows) == [349, 349, 202]


@pytest.mark.parametrize("paths", [("pool.candidates",), ("pool.labeled", "pool.candidates")], ids=["one", "both"])
def test_candidates_that_are_labeled_may_be_streamed(running, channel, paths):
    """Labelled rows may be chosen where they are listed as candidates: the list may still be on its way."""
    lists = {"labeled": tensor(np.arange(9)), "candidates": tensor(np.arange(6))}
    message = request(FAR, budget=6, **lists)
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    first, data = streamed(message, *paths)
    chunks = [each for path in data for each in cut(path, data[path], 20)]
    for order in (chunks, chunks[::-1]):
        assert_same(ask(channel, [first, *order]).response, unary)
    free(running)


def test_an_input_that_is_not_read_may_be_streamed_and_hold_anything(running, channel):
    message = request(embeddings=tensor(np.full((10, 3), np.nan)))
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    assert unary.warnings
    assert_same(ask(channel, whole(message, 13)).response, unary)
    first, data = streamed(message)
    failure = refused(running, channel, first, *cut("pool.probabilities", data["pool.probabilities"], 50))
    assert failure.code is Code.DATA_LOSS, "what was announced must come, read or not"


def test_an_empty_list_of_rows_needs_no_chunk(channel):
    message = request(excluded=tensor(np.empty(0, np.int64)), labeled=tensor(np.empty(0, np.int32).astype(np.int64)))
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    assert_same(ask(channel, whole(message)).response, unary)


def test_messages_are_read_ahead_but_not_without_end():
    """A client that is faster than the device does not fill the host's memory."""
    pulled = []

    def messages():
        for number in range(100):
            pulled.append(number)
            yield number

    inbox = Inbox(messages())
    assert inbox.wait(1.0)
    time.sleep(0.1)
    assert len(pulled) == 2  # one that waits and one in hand, before anything is admitted
    inbox.admit()
    time.sleep(0.1)
    assert len(pulled) == READ_AHEAD + 1
    taken = []
    while (number := inbox.take() if inbox.wait(1.0) else None) is not None:
        taken.append(number)
        assert len(pulled) <= number + READ_AHEAD + 2
    assert taken == list(range(100))
    stuck = Inbox(messages())
    stuck.close()
    until = time.monotonic() + 2
    while any(each.name == "inbox" for each in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.005)
    assert not any(each.name == "inbox" for each in threading.enumerate()), "nobody reads, so its thread goes"


# What is wrong with the messages


NO_START = [
    ("nothing", []),
    ("a chunk first", [chunk("pool.probabilities", 0, P.tobytes()), *whole(request())]),
    ("an empty message first", [b"", *whole(request())]),
    ("a message of a newer client first", [bytes([0x7A, 0x00])]),
]


@pytest.mark.parametrize("messages", [each[1] for each in NO_START], ids=[each[0] for each in NO_START])
def test_a_stream_begins_with_a_start(running, channel, messages):
    failure = refused(running, channel, *messages)
    assert failure.code is Code.INVALID_ARGUMENT
    assert not failure.admitted
    assert failure.field == "start"
    assert "needs a start as its first message" in failure.words


#: The same fault of an upload that goes into blocks of rows, and of one that is held whole.
KINDS = {
    "in blocks": (request(labeled=tensor([3])), "pool.probabilities", P.tobytes()),
    "whole": (request(FAR, labeled=tensor([3])), "pool.embeddings", X.tobytes()),
}
by_kind = pytest.mark.parametrize(("message", "path", "data"), KINDS.values(), ids=KINDS)
FAULTS = [
    # what, messages after the start, field (None: the tensor's path), words
    ("another start", lambda *_: [start(request())], "start", "one start and then chunks"),
    ("an empty message", lambda *_: [b""], "start", "one start and then chunks"),
    ("an unknown path", lambda _, data: [chunk("pool.colors", 0, data)], "pool.colors",
     "there is a chunk of 'pool.colors'; streamed are: pool."),
    ("the path of an inline tensor", lambda *_: [chunk("pool.labeled", 0, b"12345678")], "pool.labeled",
     "streamed are: pool."),
    ("a negative offset", lambda path, data: [chunk(path, -1, data[:4])], None, "there is a chunk of bytes -1 to 3"),
    ("the most negative offset", lambda path, data: [chunk(path, -(2**63), data)], None, "there is a chunk of bytes -"),
    ("past the end", lambda path, data: [chunk(path, 1, data)], None, "there is a chunk of bytes 1 to "),
    ("far past the end", lambda path, data: [chunk(path, 2**63 - 1, data)], None, "there is a chunk of bytes 9223"),
    ("nothing past the end", lambda path, data: [chunk(path, len(data) + 1, b"")], None, "there is a chunk of bytes"),
    ("one byte of the chunk before", lambda path, data: [chunk(path, 0, data[:50]), chunk(path, 49, data[49:])], None,
     "bytes 49 to "),
    ("one byte of the chunk after", lambda path, data: [chunk(path, 50, data[50:]), chunk(path, 0, data[:51])], None,
     "bytes 0 to 51 of "),
    ("a chunk twice", lambda path, data: [chunk(path, 8, data[8:40])] * 2, None, "bytes 8 to 40 of "),
    ("within a chunk", lambda path, data: [chunk(path, 0, data[:-1]), chunk(path, 5, b"x")], None, "came before"),
    ("all over again", lambda path, data: [chunk(path, 0, data), chunk(path, 0, data)], None, "came before"),
]  # fmt: skip


@by_kind
@pytest.mark.parametrize(
    ("messages", "field", "words"), [each[1:] for each in FAULTS], ids=[each[0] for each in FAULTS]
)
def test_a_chunk_that_can_not_be_is_named_at_once(running, channel, message, path, data, messages, field, words):
    """The client need not send the rest to learn of it."""
    first, _ = streamed(message, path)
    failure = refused(running, channel, first, *messages(path, data), end=False)
    assert failure.code is Code.INVALID_ARGUMENT
    assert words in failure.words
    assert failure.field == (field or path)
    assert failure.detail(error_details_pb2.ErrorInfo).reason == "INVALID_INPUT"


LOSSES = [
    ("nothing", lambda path, data: [], "did not come"),
    ("a gap", lambda path, data: [chunk(path, 0, data[:40]), chunk(path, 41, data[41:])], "1 of "),
    ("no beginning", lambda path, data: [chunk(path, 8, data[8:])], "8 of "),
    ("a short last chunk", lambda path, data: [chunk(path, 0, data[:64]), chunk(path, 64, data[64:-3])], "3 of "),
    ("only empty chunks", lambda path, data: [chunk(path, 0, b""), chunk(path, len(data), b"")], "did not come"),
    ("a checksum of other bytes", lambda path, data: [chunk(path, 0, data, crc32=zlib.crc32(data[1:]))], "CRC-32"),
    ("one bit of a checksum", lambda path, data: [chunk(path, 0, data, crc32=zlib.crc32(data) ^ 1 << 31)], "CRC-32"),
    ("a checksum of 0", lambda path, data: [chunk(path, 0, data, crc32=0)], "CRC-32"),
]  # fmt: skip


@by_kind
@pytest.mark.parametrize(("messages", "words"), [each[1:] for each in LOSSES], ids=[each[0] for each in LOSSES])
def test_bytes_that_do_not_come_or_change_are_a_loss(running, channel, message, path, data, messages, words):
    first, _ = streamed(message, path)
    failure = refused(running, channel, first, *messages(path, data))
    assert failure.code is Code.DATA_LOSS
    assert words in failure.words
    assert path in failure.words
    assert failure.detail(error_details_pb2.ErrorInfo).reason == "DATA_LOSS"


def test_a_path_of_any_length_does_not_hide_what_went_wrong(running, channel):
    """Errors travel in headers, which hold 8 KiB."""
    for path in ("x" * 9000, "漢" * 3000, "", "pool.\n\0"):
        failure = refused(running, channel, streamed(request())[0], chunk(path, 0, b"1"), end=False)
        assert failure.code is Code.INVALID_ARGUMENT
        assert "there is a chunk of '" in failure.words
        assert not path or failure.field[:60] == path[:60]


@pytest.mark.parametrize("name", ["labeled", "excluded"])
def test_a_list_of_rows_that_does_not_come_is_a_loss(running, channel, name):
    for strategy in (MARGIN, FAR):
        first, data = streamed(request(strategy, **{name: tensor([3, 4])}))
        chunks = [each for path in data for each in cut(path, data[path], 50) if path != f"pool.{name}"]
        failure = refused(running, channel, first, *chunks)
        assert failure.code is Code.DATA_LOSS
        assert f"16 of 16 bytes of pool.{name} did not come" in failure.words


@pytest.mark.parametrize("broken", [b"\x12\x05\x0a", b"\x12\x0c\x10" + b"\x80" * 10 + b"\x00", b"\xff"])
@pytest.mark.parametrize("admitted", [False, True])
def test_bytes_that_are_no_message_end_the_stream(running, channel, caplog, broken, admitted):
    """gRPC says so itself."""
    first, _ = streamed(request())
    with Talk(channel, *[first] * admitted, broken) as talk:
        assert talk.failure().code is Code.INTERNAL
    serves(running, channel)
    assert not [each for each in caplog.records if each.name.startswith("queryselect")]
    caplog.clear()


# What is wrong with the request


BEFORE = [
    *((what, message, Code.INVALID_ARGUMENT) for what, message, *_ in INVALID if "streamed" not in what),
    *((what, message, Code.UNIMPLEMENTED) for what, message, *_ in UNSERVED),
    *((what, message, Code.OUT_OF_RANGE) for what, message, *_ in OVER if "one message" not in what),
]


@pytest.mark.parametrize(
    ("message", "code"), [each[1:] for each in BEFORE], ids=[each[0].replace(" ", "-") for each in BEFORE]
)
def test_what_the_start_tells_is_refused_before_it_is_admitted(running, channel, message, code):
    """As a unary call of the same request is."""
    unary, _, _ = fail(channel, message)
    failure = refused(running, channel, start(message), end=False)
    assert failure.code is unary.code() is code
    assert failure.words == unary.details()
    assert not failure.admitted


def fits(value) -> bool:
    return isinstance(value, tensor_pb2.Tensor) and value.dtype in wire.DTYPES and 0 <= np.prod(value.shape) < 1e9


#: Of those whose tensors could be streamed: what can be seen without their elements, and what can't.
UNSEEN = [
    "sum", "negative", "NaN", "NaN in embeddings", "+inf logits", "a label over 1", "row out of range", "negative row",
    "row listed twice", "a mask of twos", "labeled and pending", "candidates and excluded", "budget over candidates",
    "budget over listed candidates",
]  # fmt: skip
STREAMABLE = [
    (what, message, what in UNSEEN)
    for what, message, *_ in INVALID
    if any(fits(value) for _, value in message.pool.ListFields())
    and all(
        fits(value) and len(value.data) == np.prod(value.shape) * wire.DTYPES[value.dtype].itemsize
        for _, value in message.pool.ListFields()
        if isinstance(value, tensor_pb2.Tensor)
    )
]


@pytest.mark.parametrize(("message", "unseen"), [each[1:] for each in STREAMABLE], ids=[e[0] for e in STREAMABLE])
def test_what_is_wrong_with_a_streamed_tensor_is_told_as_of_any_other(running, channel, message, unseen):
    """Its header before it is admitted, its elements as they come: the field and the words are the unary call's."""
    unary, status, _ = fail(channel, message)
    first, data = streamed(message)
    chunks = [each for path in data for each in cut(path, data[path], 33)]
    for order in (chunks, chunks[::-1]):
        failure = refused(running, channel, first, *(order if unseen else []), end=False)
        assert (failure.code, failure.words) == (unary.code(), unary.details())
        assert failure.status.details == status.details
        assert failure.admitted == unseen


def test_the_cases_that_are_not_seen_before_admission_are_all_among_them():
    assert set(UNSEEN) <= {each[0] for each in STREAMABLE}


BAD_ROWS = {
    "in blocks": ("probabilities", LONG_P, MARGIN),
    "whole": ("embeddings", LONG_X, FAR),
}


@pytest.mark.parametrize(("name", "good", "strategy"), BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_named_while_the_upload_goes_on(running, channel, name, good, strategy, value):
    """The rest need not be sent."""
    message = request(strategy, **{name: tensor(at(good, 4100, 1, value))})
    first, data = streamed(message)
    path, elements = f"pool.{name}", data[f"pool.{name}"]
    sent = 8192 * len(elements) // 9000
    failure = refused(running, channel, first, *cut(path, elements[:sent], 1000), end=False)
    assert failure.admitted
    assert failure.code is Code.INVALID_ARGUMENT
    assert failure.field == path
    assert f"{path} must be finite; row 4100 has {value}" in failure.words


def test_probabilities_that_do_not_sum_to_1_are_named_while_the_upload_goes_on(running, channel):
    first, data = streamed(request(probabilities=tensor(at(LONG_P, 5000, 0, 0.9999) + at(LONG_P * 0, 5000, 1, 0.5))))
    sent = cut("pool.probabilities", data["pool.probabilities"][: 8192 * 8], 4096)
    failure = refused(running, channel, first, *sent, end=False)
    assert failure.field == "pool.probabilities"
    assert "must sum to 1 within 0.001; row 5000 sums to" in failure.words


@pytest.mark.parametrize("order", ["straight", "lists last", "shuffled"])
@pytest.mark.parametrize(("name", "good", "strategy"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_excluded_rows_may_hold_anything(running, channel, name, good, strategy, order):
    """Also where the list of them comes after the rows."""
    dirty = at(at(good, 4100, 1, np.nan), 8999, 0, np.inf)
    mask = np.isin(np.arange(9000), [4100, 8999, 5])
    clean = at(at(good, 4100, 1, 0.5), 8999, 0, 0.5)
    clean[[4100, 8999]] = 0.5
    for excluded in (tensor(mask), tensor(np.flatnonzero(mask))):
        message, same = (
            request(strategy, budget=9, **{name: tensor(each)}, excluded=excluded, returns=[POOL_SCORES])
            for each in (dirty, clean)
        )
        first, data = streamed(message)
        chunks = ordered([each for path in data for each in cut(path, data[path], 7001)], order)
        unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(same)
        assert_same(ask(channel, [first, *chunks]).response, unary)
    first, data = streamed(request(strategy, **{name: tensor(dirty)}, excluded=tensor([4100])))
    chunks = ordered([each for path in data for each in cut(path, data[path], 7001)], order)
    failure = refused(running, channel, first, *chunks)
    assert failure.field == f"pool.{name}"
    assert "row 8999 has inf" in failure.words


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_mask_of_other_bytes_than_0_and_1_is_refused_as_it_comes(running, channel, byte):
    """In any chunk, and before the rows come."""
    mask = bytearray(9000)
    mask[8000] = byte
    excluded = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BOOL, shape=[9000], data=bytes(mask))
    for strategy, inputs in ((MARGIN, {"probabilities": tensor(LONG_P)}), (FAR, {"embeddings": tensor(LONG_X)})):
        first, data = streamed(request(strategy, **inputs, excluded=excluded))
        failure = refused(running, channel, first, *cut("pool.excluded", data["pool.excluded"], 1000), end=False)
        assert failure.field == "pool.excluded"
        assert "needs truth values of 0 or 1" in failure.words


def test_a_budget_over_the_candidates_is_refused_as_soon_as_it_is_known(running, channel):
    for lists in ({"labeled": tensor(np.arange(9))}, {"candidates": tensor([4])}):
        for strategy in (MARGIN, FAR):
            message = request(strategy, **lists)
            inline, _ = streamed(message, *(["pool.probabilities"] if strategy is MARGIN else ["pool.embeddings"]))
            failure = refused(running, channel, inline, end=False)
            assert (failure.admitted, failure.field) == (False, "stop.max_items")
            assert "budget 2 but 1 candidates" in failure.words
            first, data = streamed(message)
            (path,) = (f"pool.{name}" for name in lists)
            failure = refused(running, channel, first, *cut(path, data[path], 5), end=False)
            assert (failure.admitted, failure.field) == (True, "stop.max_items")
            assert "budget 2 but 1 candidates" in failure.words


def test_a_kernel_that_fails_fails_one_stream(running, channel, caplog):
    """While rows come, and in the selection: a bug is told by an id that the log repeats."""
    scaled = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled", parameters={"fail": True}))
    early = whole(request(scaled, probabilities=tensor(LONG_P), embeddings=tensor(LONG_X)))
    for messages, end in ((early, False), ([start(sleepy(fail="bug"))], True)):
        failure = refused(running, channel, *messages, end=end)
        assert failure.code is Code.INTERNAL
        assert "secret" not in str(failure.status)
        assert failure.detail(error_details_pb2.ErrorInfo).metadata["error_id"] in caplog.text
    for memory in ("device", "host", "allocator"):
        failure = refused(running, channel, start(sleepy(fail=memory)))
        assert failure.code is Code.RESOURCE_EXHAUSTED
        assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
    caplog.clear()


# Frames by hand


DATA, HEADERS, RESET, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, payload: bytes, number: int = 1) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", number) + payload


def message_frame(message: Request, flags: int = 0) -> bytes:
    data = message.SerializeToString()
    return frame(DATA, flags, b"\0" + struct.pack(">I", len(data)) + data)


def opening(target: str) -> bytes:
    """What a connection and a stream begin with."""
    fields = {
        ":method": "POST", ":scheme": "http", ":path": "/queryselect.v1.SelectionService/SelectStream",
        ":authority": target, "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    literal = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, b"", 0) + frame(HEADERS, END_HEADERS, literal)


def over(connection: socket.socket) -> bool:
    """Reads until the server has ended the stream, or the connection; whether it has."""
    buffer = b""
    with suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            buffer += data
            while len(buffer) >= 9 and len(buffer) >= 9 + int.from_bytes(buffer[:3], "big"):
                kind, flags = buffer[3], buffer[4]
                if kind in (RESET, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
                    return True
                buffer = buffer[9 + int.from_bytes(buffer[:3], "big") :]
    return True


@pytest.mark.parametrize("ending", ["with a chunk", "by itself"])
def test_a_chunk_after_the_end_is_no_part_of_the_stream(running, target, channel, ending):
    """A client that breaks HTTP/2's rules: what came too late does not complete an upload, and hurts nobody."""
    first, data = streamed(request())
    one, two = cut("pool.probabilities", data["pool.probabilities"], 160)
    end = [message_frame(one, END_STREAM)]
    if ending == "by itself":
        end = [message_frame(one), frame(DATA, END_STREAM, b"")]
    before = counted(running, "OK")
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(b"".join([opening(target), message_frame(first), *end, message_frame(two)]))
        assert over(connection)
        free(running)
        assert counted(running, "OK") == before
    serves(running, channel)


def test_frames_by_hand_make_a_good_stream(running, target, channel):
    """So that the test above tests what it says."""
    before = counted(running, "OK")
    *messages, last = whole(request(), 160)
    frames = [*map(message_frame, messages), message_frame(last, END_STREAM)]
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(opening(target) + b"".join(frames))
        assert over(connection)
        free(running)
    assert counted(running, "OK") == before + 1


@pytest.mark.parametrize("how", ["reset", "cut off", "garbage"])
def test_a_connection_that_breaks_within_a_chunk_holds_nothing(running, target, channel, how):
    first, data = streamed(request())
    (piece,) = cut("pool.probabilities", data["pool.probabilities"], 320)
    host = running.frontend.service.engine.host
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(opening(target) + message_frame(first) + message_frame(piece)[:100])
        until = time.monotonic() + 5
        while not host.taken and time.monotonic() < until:
            time.sleep(0.005)
        assert host.taken == 1
        if how == "reset":
            rest = message_frame(piece)[100:]
            connection.sendall(rest + frame(RESET, 0, struct.pack(">I", 8)))
        elif how == "garbage":
            connection.sendall(b"\xff" * 4000)
        else:
            connection.shutdown(socket.SHUT_RDWR)
        free(running)
    serves(running, channel)


# Limits


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
        until = time.monotonic() + 2
        while sum(own.frontend._streams.values()) > 1 and time.monotonic() < until:
            time.sleep(0.005)
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


# A pool that is never held


def memory_of(process: subprocess.Popen, name: str) -> int:
    """Bytes, as the kernel counts them."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@contextmanager
def server_process(*flags: str):
    """A server in a process of its own."""
    command = [sys.executable, "-m", "queryselect_service", "--port", "0", "--metrics-port", "-1", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process
        process.terminate()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell a process's memory")
def test_a_pool_larger_than_the_hosts_memory_is_scored_as_it_comes(local):
    """200 MB through a server that may hold 100 MB, and holds far less; the picks are those of the whole pool."""
    rows, classes = 500_000, 100
    header = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[rows, classes], streamed=tensor_pb2.Streamed())
    with server_process("--max-host-bytes", "100000000") as process:
        p = np.random.default_rng(1).random((rows, classes), np.float32)
        p /= p.sum(1, keepdims=True)
        here = local.select("margin", 50, probabilities=p)
        flat = p.reshape(-1).view(np.uint8)

        def messages():
            yield start(request(probabilities=header, budget=50))
            for offset in range(0, len(flat), MIB):
                yield chunk("pool.probabilities", offset, flat[offset : offset + MIB].tobytes())

        address = process.stdout.readline().split(" on ")[1].split(",")[0]
        with grpc.insecure_channel(address) as channel:
            ask(channel, whole(request(probabilities=tensor(p[:20_000]))))  # what a first call takes
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the highest so far is forgotten
            before = memory_of(process, "VmRSS")
            answer = ask(channel, messages(), timeout=60)
            grown = memory_of(process, "VmHWM") - before
    assert answer.admitted.reserved_bytes < 100_000_000 < flat.nbytes
    assert answer.response.indices.data == here.indices.tobytes()
    assert answer.response.scores.data == here.scores.tobytes()
    assert grown < flat.nbytes / 2, f"the server grew by {grown / 1e6:.0f} MB"


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
    until = time.monotonic() + 10
    while plugins.last_seen["at"] < before:
        assert time.monotonic() < until
        time.sleep(0.005)


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


def test_many_cancels_at_any_moment_give_everything_back(running, channel):
    """Cancels that meet messages on their way."""
    messages = whole(long_request("margin"), 5000)
    for number in range(30):
        with Talk(channel, *messages) as talk:
            time.sleep(number * 0.001)
            talk.call.cancel()
    serves(running, channel)


def waiting(running: server.Server, jobs: int) -> None:
    """Waits until so many jobs wait for the device."""
    until = time.monotonic() + 5
    while len(running.frontend.service.engine.queue) != jobs:
        assert time.monotonic() < until
        time.sleep(0.005)


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
    until = time.monotonic() + 0.5
    while host.taken > 1 and time.monotonic() < until:
        time.sleep(0.005)
    assert host.taken == 1, "its place is free while the other is still at work"
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


# Large answers


def test_scores_of_a_million_rows_come_in_chunks(running, channel, local):
    message = request(RANDOM, num_rows=1_000_000, budget=5, seed=3, returns=[POOL_SCORES])
    answer = ask(channel, [start(message)])
    here = local.select("random", 5, num_rows=1_000_000, seed=3, return_pool_scores=True)
    assert set(answer.apart) == {"pool_scores"}
    assert answer.largest <= 4 * MIB
    assert list(answer.response.pool_scores.shape) == [1_000_000]
    assert answer.response.pool_scores.data == here.pool_scores.tobytes()
    assert answer.response.indices.data == here.indices.tobytes()
    assert answer.response.scores.data == here.scores.tobytes()
    free(running)


def test_every_large_tensor_of_an_answer_comes_in_chunks(running, channel, local):
    ids = np.random.default_rng(0).permutation(300_000)
    pool = {"num_rows": 300_000, "ids": selection_pb2.Ids(integers=tensor(ids))}
    answer = ask(channel, whole(request(RANDOM, budget=200_000, **pool)))
    here = local.select("random", 200_000, num_rows=300_000)
    assert set(answer.apart) == {"indices", "scores", "ids.integers"}
    assert answer.largest <= 4 * MIB
    assert answer.response.indices.data == here.indices.tobytes()
    assert answer.response.scores.data == here.scores.tobytes()
    assert answer.response.ids.integers.data == ids[here.indices].tobytes()
    free(running)


def test_a_client_that_leaves_a_large_answer_unread_holds_nothing(running, channel):
    message = request(RANDOM, num_rows=3_000_000, budget=5, returns=[POOL_SCORES])
    with Talk(channel, start(message)) as talk:
        talk.end()
        talk.until("result")
        talk.call.cancel()
        free(running)
    serves(running, channel)


# Only checked


@by_kind
def test_validate_only_looks_at_every_value_and_selects_nothing(running, channel, message, path, data):
    checked = selection_pb2.SelectRequest()
    checked.CopyFrom(message)
    checked.validate_only = True
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(checked)
    first, _ = streamed(checked, path)
    answer = ask(channel, [first, *cut(path, data, 33)])
    assert not answer.response.HasField("indices")
    assert not answer.response.HasField("stop_reason")
    assert_same(answer.response, unary)
    free(running)
    assert refused(running, channel, first).code is Code.DATA_LOSS
    bad = np.frombuffer(data, np.float64 if "probabilities" in path else np.float32).copy()
    bad[-1] = np.nan
    failure = refused(running, channel, first, chunk(path, 0, bad.tobytes()), end=False)
    assert (failure.code, failure.field) == (Code.INVALID_ARGUMENT, path)
    assert "row 9 has nan" in failure.words


def test_validate_only_holds_no_pool(serve):
    """Whatever the strategy: its rows are looked at and let go."""
    own, channel = serve(max_host_bytes=4_000_000)
    x = np.zeros((100_000, 16), np.float32)
    message = request(FAR, embeddings=tensor(x), validate_only=True)
    answer = ask(channel, whole(message, 100_001))
    assert answer.admitted.reserved_bytes < 4_000_000 < x.nbytes
    assert not answer.response.HasField("indices")
    serves(own, channel)


@by_kind
def test_validate_only_does_not_wait_for_the_device(running, channel, message, path, data):
    """Nothing is computed there; a unary call does not wait either."""
    working = at_work(selection_pb2_grpc.SelectionServiceStub(channel), 0.8)
    checked = selection_pb2.SelectRequest()
    checked.CopyFrom(message)
    checked.validate_only = True
    assert ask(channel, whole(checked)).response.HasField("strategy")
    assert not working.done()
    working.result()
    free(running)


# How far it is


@by_kind
def test_progress_tells_what_has_come(channel, message, path, data):
    first, _ = streamed(message, path)
    with Talk(channel, first) as talk:
        for each in cut(path, data, len(data) // 4):
            talk.send(each)
            time.sleep(0.15)
        talk.end()
        answer = read(talk.call)
    told = [(each.done, each.total) for each in answer.progress if each.phase == selection_pb2.PHASE_RECEIVING]
    assert len(told) >= 2
    assert told == sorted(told)
    assert all(0 <= done <= total == len(data) for done, total in told)
    assert len({done for done, _ in told}) > 1


def test_progress_tells_of_the_wait_and_of_the_selection(running, channel):
    """The wait in requests ahead, without a total; the selection in picks."""
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    working = at_work(stub, 0.8)
    before = stub.Select.future(sleepy(seconds=0.3))
    waiting(running, 1)
    x = np.random.default_rng(0).normal(size=(20_000, 40)).astype(np.float32)
    answer = ask(channel, whole(request(FAR, embeddings=tensor(x), budget=600)))
    queued = [each for each in answer.progress if each.phase == selection_pb2.PHASE_QUEUED]
    assert queued
    assert not any(each.HasField("total") for each in queued)
    assert all(0 <= each.done <= 1 for each in queued)
    selecting = [each for each in answer.progress if each.phase == selection_pb2.PHASE_SELECTING]
    assert selecting
    assert all(0 <= each.done <= each.total == 600 for each in selecting)
    steps = [each.done for each in selecting]
    assert steps == sorted(steps)
    phases = [each.phase for each in answer.progress]
    receiving = [selection_pb2.PHASE_RECEIVING] * phases.count(selection_pb2.PHASE_RECEIVING)
    assert phases == receiving + [each.phase for each in (*queued, *selecting)], "one phase after the other"
    working.result()
    before.result()
    free(running)
