"""A small real server that records what it is sent, and fails as told before it answers."""

from __future__ import annotations

import threading
import time
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


class Fake(selection_pb2_grpc.SelectionServiceServicer, strategy_pb2_grpc.StrategyServiceServicer):
    """Plays `failures`, one per call, then picks row 0. Where `hold` is cleared, calls hang until it is set."""

    def __init__(self, *failures: grpc.Status, max_receive: int = -1) -> None:
        self.failures, self.hold = list(failures), threading.Event()
        self.hold.set()
        self.requests: list[selection_pb2.SelectRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.times: list[float] = []
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

    def Select(self, request, context):
        self.requests.append(request)
        self.times.append(time.monotonic())
        self.metadata.append(dict(context.invocation_metadata()))
        self.hold.wait()
        if self.failures:
            context.abort_with_status(self.failures.pop(0))
        return selection_pb2.SelectResponse(
            indices=tensor(np.zeros(1, np.int64)), scores=tensor(np.ones(1)), strategy=request.strategy
        )

    def ListStrategies(self, request, context):
        return self._described


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
