"""Raw streams for tests: what is sent, what comes back, and that the server serves the next."""

from __future__ import annotations

import queue
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2, tensor_pb2
from queryselect_service import server
from queryselect_service import strategy as registry
from queryselect_service.stream import Inbox
from tests.service.test_errors import (
    FAR,
    P,
    X,
    detail,
    request,
    tensor,
)
from tests.waiting import until

registry.load()
Code, Request = grpc.StatusCode, selection_pb2.SelectStreamRequest
MIB = 1 << 20
POOL_SCORES = selection_pb2.RETURN_POOL_SCORES
RNG = np.random.default_rng(0)
#: The streams whose messages a thread reads now.
READING: set[Inbox] = set()
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
    for name, _, place in re.findall(r"(\w+)(\[(\d+)\])?", path):
        message = getattr(message, name)
        if place:
            message = message[int(place)]
    return message


def tensors(message, path: str = "") -> Iterator[str]:
    """The paths of the tensors in a message, nested ones too."""
    for each, value in message.ListFields():
        at = path + each.name
        parts = {at: value} if not each.is_repeated else {f"{at}[{place}]": one for place, one in enumerate(value)}
        for name, part in parts.items():
            if isinstance(part, tensor_pb2.Tensor):
                yield name
            elif isinstance(part, Message):
                yield from tensors(part, f"{name}.")


def streamed(message: selection_pb2.SelectRequest, *paths: str) -> tuple[Request, dict[str, bytes]]:
    """The start of the same request with the tensors at `paths`, by default all, marked as streamed; their bytes."""
    copy, data = selection_pb2.SelectRequest(), {}
    copy.CopyFrom(message)
    for path in paths or list(tensors(copy)):
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
    engine = frontend.service.engine

    def held():
        rooms = (engine.host.taken, engine.host.reserved, len(engine.queue))
        return rooms, frontend._running, frontend._selecting.taken, dict(frontend._open), len(READING)

    until(lambda: held() == ((0, 0, 0), 0, 0, {}, 0), seconds)
    assert held() == ((0, 0, 0), 0, 0, {}, 0)


def told_of(running: server.Server, what: str, file: str = "certificate") -> float | None:
    """What a scrape tells of a file."""
    return running.frontend.metrics.registry.get_sample_value(f"queryselect_file_{what}", {"file": file})


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


# Requests that several tests send


LISTS = ("pool.labeled", "pool.pending", "pool.excluded", "pool.candidates")


def ordered(chunks: list[Request], order: str) -> list[Request]:
    if order == "shuffled":
        return [chunks[place] for place in np.random.default_rng(1).permutation(len(chunks))]
    last = "lists last" in order
    return sorted(chunks[:: -1 if "reversed" in order else 1], key=lambda each: (each.chunk.path in LISTS) == last)


@cache
def long_request(name: str) -> selection_pb2.SelectRequest:
    strategy = strategy_pb2.Strategy()
    getattr(strategy, name).SetInParent()
    inputs = {"embeddings": tensor(LONG_X)} if name == "k_center_greedy" else {"probabilities": tensor(LONG_P)}
    lists = {"labeled": tensor([8999, 18]), "excluded": tensor(np.arange(9000) % 7 == 3)}
    return request(strategy, budget=20, **inputs, **lists, returns=[POOL_SCORES])


#: The same fault of an upload that goes into blocks of rows, and of one that is held whole.
KINDS = {
    "in blocks": (request(labeled=tensor([3])), "pool.probabilities", P.tobytes()),
    "whole": (request(FAR, labeled=tensor([3])), "pool.embeddings", X.tobytes()),
}

by_kind = pytest.mark.parametrize(("message", "path", "data"), KINDS.values(), ids=KINDS)


def waiting(running: server.Server, jobs: int) -> None:
    """Waits until so many jobs wait for the device."""
    assert until(lambda: len(running.frontend.service.engine.queue) == jobs)
