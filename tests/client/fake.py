"""A small real server that records what it is sent, fails as told, and answers as told."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2_grpc, tensor_pb2
from queryselect_service.local import Local

Answer = selection_pb2.SelectStreamResponse
ITEM_BYTES = {
    tensor_pb2.DATA_TYPE_F64: 8,
    tensor_pb2.DATA_TYPE_F32: 4,
    tensor_pb2.DATA_TYPE_F16: 2,
    tensor_pb2.DATA_TYPE_BF16: 2,
    tensor_pb2.DATA_TYPE_I64: 8,
    tensor_pb2.DATA_TYPE_I32: 4,
    tensor_pb2.DATA_TYPE_U8: 1,
    tensor_pb2.DATA_TYPE_BOOL: 1,
}


class Attempt:
    """One stream as the server saw it. Reads no more once `limit` bytes have come."""

    def __init__(self, start: selection_pb2.SelectRequest, *, keep: bool) -> None:
        self.start, self._keep = start, keep
        self.admitted = False
        self.chunks: list[tuple[str, int, int]] = []  # path, offset, length, as they came
        self.too_early: list[tuple[str, int, int]] = []  # those that came before `admitted` was sent
        self.tensors: dict[str, bytearray] = {}
        self.expected = {
            f"pool.{field.name}": math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
            for field, tensor in start.pool.ListFields()
            if isinstance(tensor, tensor_pb2.Tensor) and tensor.HasField("streamed")
        }
        self.changed, self.limit = threading.Condition(), math.inf
        self.closed, self.gone = False, threading.Event()  # the client has sent everything; the RPC has ended

    @property
    def received(self) -> int:
        return sum(length for _, _, length in self.chunks)

    def read(self, messages: Iterator[selection_pb2.SelectStreamRequest]) -> None:
        try:
            for message in messages:
                self._take(message.chunk)
                with self.changed:
                    self.changed.wait_for(lambda: self.received < self.limit)
        except Exception:  # noqa: BLE001  # the RPC has ended
            return
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()

    def _take(self, chunk: selection_pb2.Chunk) -> None:
        part = (chunk.path, chunk.offset, len(chunk.data))
        if not self.admitted:
            self.too_early.append(part)
        if self._keep:
            tensor = self.tensors.setdefault(chunk.path, bytearray(self.expected[chunk.path]))
            tensor[part[1] : part[1] + part[2]] = chunk.data
        with self.changed:
            self.chunks.append(part)
            self.changed.notify_all()

    def wait(self, nbytes: float) -> None:
        """Waits until so many bytes have come, or no more will."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.received >= nbytes)

    def go_on(self) -> None:
        """Reads on to the end."""
        with self.changed:
            self.limit = math.inf
            self.changed.notify_all()

    def end(self) -> None:
        self.gone.set()
        self.go_on()


class Fake(selection_pb2_grpc.SelectionServiceServicer, strategy_pb2_grpc.StrategyServiceServicer):
    """Plays `failures`, one per call, then picks row 0. Where `hold` is cleared, calls hang until it is set.

    at: when a stream fails or hangs: at its "start", before `admitted`; in the "middle", when half of the bytes have
    come and no more are read, which it tells as progress; at the "end", when all have come. chunk_bytes: what is
    recommended. answers: what streams answer, one per stream, before the plain answer. keep: whether the bytes of
    uploads are.
    """

    def __init__(
        self,
        *failures: grpc.Status,
        max_receive: int = -1,
        at: str = "start",
        chunk_bytes: int = 1 << 20,
        answers: Iterable[Callable[[selection_pb2.SelectRequest], Iterable[Answer]]] = (),
        keep: bool = True,
    ) -> None:
        self.failures, self.hold = list(failures), threading.Event()
        self.hold.set()
        self.at, self.chunk_bytes, self.answers, self.keep = at, chunk_bytes, list(answers), keep
        self.requests: list[selection_pb2.SelectRequest] = []
        self.attempts: list[Attempt] = []
        self.metadata: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.remaining: list[float] = []  # seconds until the caller's deadline
        self._described = Local().list_strategies()
        self._server = grpc.server(
            ThreadPoolExecutor(16),
            options=[("grpc.max_receive_message_length", max_receive), ("grpc.so_reuseport", 0)],
        )
        selection_pb2_grpc.add_SelectionServiceServicer_to_server(self, self._server)
        strategy_pb2_grpc.add_StrategyServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.hold.set()
        self._server.stop(0).wait()

    @property
    def request(self) -> selection_pb2.SelectRequest:
        """The only request."""
        (request,) = self.requests
        return request

    @property
    def attempt(self) -> Attempt:
        """The only stream."""
        (attempt,) = self.attempts
        return attempt

    def Select(self, request, context):
        self._note(request, context)
        self._play(context)
        return plain_answer(request)

    def SelectStream(self, messages, context):
        start = next(messages).start
        attempt = Attempt(start, keep=self.keep)
        if self.at == "middle":
            attempt.limit = sum(attempt.expected.values()) / 2
        context.add_callback(attempt.end)
        self._note(start, context)
        self.attempts.append(attempt)
        threading.Thread(target=attempt.read, args=(messages,), daemon=True).start()
        if self.at == "start":
            self._play(context)
        attempt.admitted = True
        yield Answer(
            admitted=selection_pb2.Admitted(
                request_id=start.request_id, reserved_bytes=1, recommended_chunk_bytes=self.chunk_bytes
            )
        )
        if self.at == "middle":
            attempt.wait(attempt.limit)
            yield progress(selection_pb2.PHASE_RECEIVING, attempt.received, sum(attempt.expected.values()))
            self._play(context)
            attempt.go_on()
        attempt.wait(math.inf)
        if self.at == "end":
            self._play(context)
        answer = self.answers.pop(0) if self.answers else in_one
        yield from answer(start)

    def _note(self, request: selection_pb2.SelectRequest, context: grpc.ServicerContext) -> None:
        self.times.append(time.monotonic())
        self.remaining.append(context.time_remaining())
        self.metadata.append(dict(context.invocation_metadata()))
        self.requests.append(request)

    def _play(self, context: grpc.ServicerContext) -> None:
        """Hangs or fails, as told."""
        self.hold.wait()
        if self.failures:
            context.abort_with_status(self.failures.pop(0))

    def ListStrategies(self, request, context):
        return self._described


def plain_answer(request: selection_pb2.SelectRequest) -> selection_pb2.SelectResponse:
    return selection_pb2.SelectResponse(
        indices=tensor(np.zeros(1, np.int64)),
        scores=tensor(np.ones(1)),
        strategy=request.strategy,
        request_id=request.request_id,
    )


def in_one(request: selection_pb2.SelectRequest) -> Iterator[Answer]:
    """The plain answer as a stream tells it."""
    yield Answer(result=plain_answer(request))


def in_chunks(
    tensors: Mapping[str, np.ndarray], change: Callable[[list[selection_pb2.Chunk]], Any] = lambda _: None
) -> Callable[[selection_pb2.SelectRequest], Iterator[Answer]]:
    """An answer whose tensors come in chunks of 1000 bytes. change: what is done to the list of chunks."""
    chunks = []
    for path, array in tensors.items():
        data = array.tobytes()
        chunks += [
            selection_pb2.Chunk(path=path, offset=at, data=data[at : at + 1000]) for at in range(0, len(data), 1000)
        ]
    change(chunks)

    def answer(request: selection_pb2.SelectRequest) -> Iterator[Answer]:
        result = plain_answer(request)
        for path, array in tensors.items():
            header = tensor(array)
            header.streamed.SetInParent()
            getattr(result, path).CopyFrom(header)
        yield Answer(result=result)
        yield from (Answer(chunk=each) for each in chunks)

    return answer


def progress(phase: int, done: int, total: int | None) -> Answer:
    return Answer(progress=selection_pb2.Progress(phase=phase, done=done, total=total))


def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    number = {"float64": tensor_pb2.DATA_TYPE_F64, "int64": tensor_pb2.DATA_TYPE_I64}[array.dtype.name]
    return tensor_pb2.Tensor(dtype=number, shape=array.shape, data=array.tobytes())


def status(code: str, *details: Message, message: str = "no") -> status_pb2.Status:
    made = status_pb2.Status(code=code_pb2.Code.Value(code), message=message)
    for each in details:
        made.details.add().Pack(each)
    return made


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(round(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def failure(code: str, *, retry: float | None = None, pushback: str | None = None, request_id: str = "") -> grpc.Status:
    """What a server aborts with. retry: seconds in RetryInfo. pushback: the text of grpc-retry-pushback-ms."""
    plain: Any = rpc_status.to_status(status(code, *([] if retry is None else [retry_info(retry)])))
    extra = [("grpc-retry-pushback-ms", pushback), ("x-request-id", request_id)]
    return plain._replace(trailing_metadata=(*plain.trailing_metadata, *(each for each in extra if each[1])))
