"""The three gRPC services. Each method: who calls, what the Service answers, how a failure travels."""

from __future__ import annotations

import logging
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from queryselect.v1 import (
    selection_pb2,
    selection_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    strategy_pb2,
    strategy_pb2_grpc,
)
from queryselect_service import allocator, status, wire
from queryselect_service.checks import check_request_id
from queryselect_service.engine import Call
from queryselect_service.errors import Busy, ServiceError, Unavailable
from queryselect_service.metrics import Metrics
from queryselect_service.queue import RETRY_AFTER
from queryselect_service.service import Service

#: Selections under way beyond those that wait for the device: the one that runs, and streams that have just begun.
STREAMS_BEYOND = 8
#: A request that held as many bytes leaves pieces behind that are worth looking for.
TRIM_BYTES = 64 << 20

log = logging.getLogger(__name__)


@dataclass
class Visit:
    """One RPC: its caller, and what it is counted under."""

    call: Call
    strategy: str = ""


class Frontend:
    """What every RPC has in common: its id, its metrics, its log line, its errors."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self._running, self._ended, self._draining = 0, threading.Condition(), False
        self._selecting, self._streams = 0, Counter[str]()
        metrics.in_flight.set_function(lambda: service.engine.host.taken)
        metrics.queue_depth.set_function(lambda: len(service.engine.queue))

    def drain(self, grace: float) -> None:
        """Refuses what comes from now on, and waits for what runs, at most `grace` seconds."""
        with self._ended:
            self._draining = True
            self._ended.wait_for(lambda: not self._running, grace)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """One running RPC. Raises Unavailable where the server is draining."""
        with self._ended:
            if self._draining:
                raise Unavailable("this server is stopping; try another")
            self._running += 1
        try:
            yield
        finally:
            with self._ended:
                self._running -= 1
                self._ended.notify_all()

    @contextmanager
    def selecting(self, peer: str | None = None) -> Iterator[None]:
        """One RPC that may wait. Raises Busy where there are too many of them, or too many streams of `peer`.

        Each occupies a thread: were there no bound, health checks would wait for one.
        """
        settings = self.service.settings
        with self._ended:
            if self._selecting >= settings.max_queue + STREAMS_BEYOND:
                raise Busy(f"{self._selecting} selections are under way already", retry_after=RETRY_AFTER)
            if peer is not None and self._streams[peer] >= settings.max_streams_per_peer:
                limit = settings.max_streams_per_peer
                raise Busy(f"this client has {limit} streams open already", retry_after=RETRY_AFTER)
            self._selecting += 1
            if peer is not None:
                self._streams[peer] += 1
        try:
            yield
        finally:
            with self._ended:
                self._selecting -= 1
                if peer is not None:
                    self._streams[peer] -= 1
                    self._streams += Counter()  # forgets peers without streams

    @contextmanager
    def visit(self, rpc: str, context: grpc.ServicerContext, *, strategy: str = "") -> Iterator[Visit]:
        """One RPC at work. Whatever is raised inside aborts it: the caller is told, and the server lives."""
        started, code = time.monotonic(), grpc.StatusCode.OK
        visit = Visit(Call(uuid.uuid4().hex), strategy)
        call, remaining = visit.call, context.time_remaining()
        # gRPC says "no deadline" as None, or as more seconds than a clock can count.
        if remaining is not None and remaining < threading.TIMEOUT_MAX:
            call.deadline = started + remaining
        try:
            if not context.add_callback(call.gone.set):
                call.gone.set()
            self.name(visit, str(dict(context.invocation_metadata()).get("x-request-id", "")))
            with self._counted():
                yield visit
            context.set_trailing_metadata((("x-request-id", call.request_id),))
        except GeneratorExit:  # gRPC lets go of a stream whose caller has gone
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is
            retry_after = error.retry_after if isinstance(error, ServiceError) else None
            abortion = status.to_grpc(status.from_exception(error), call.request_id, retry_after)
            code = abortion.code
            traceback.clear_frames(error.__traceback__)  # they hold the request's tensors, in a circle with the error
            context.abort_with_status(abortion)  # raises, which ends the RPC
        finally:
            seconds = time.monotonic() - started
            self.metrics.requests.labels(rpc, visit.strategy, code.name).inc()
            self.metrics.duration.labels(rpc, visit.strategy).observe(seconds)
            log.info("%s %s %s %s %.1f ms", call.request_id, rpc, visit.strategy or "-", code.name, seconds * 1e3)
            if visit.call.reserved >= TRIM_BYTES:
                allocator.give_back()

    def name(self, visit: Visit, request_id: str) -> None:
        """Gives the RPC the id that its caller chose, if any. Raises InvalidInput for what can't be one."""
        check_request_id(request_id)
        visit.call.request_id = request_id or visit.call.request_id


class SelectionServicer(selection_pb2_grpc.SelectionServiceServicer):
    """Selections."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def Select(
        self, request: selection_pb2.SelectRequest, context: grpc.ServicerContext
    ) -> selection_pb2.SelectResponse:
        """Answers one request with one message."""
        frontend, service = self.frontend, self.frontend.service
        with frontend.visit("Select", context, strategy=_strategy(request)) as visit, frontend.selecting():
            frontend.name(visit, request.request_id)
            return service.select(request, visit.call, largest_answer=service.settings.max_inline_bytes)
        raise AssertionError("a visit ends with an answer or an abortion")

    def SelectStream(
        self, request_iterator: Iterator[wire.StreamMessage], context: grpc.ServicerContext
    ) -> Iterator[wire.StreamResponse]:
        """Answers a request whose tensors come in chunks."""
        frontend = self.frontend
        with (
            frontend.visit("SelectStream", context) as visit,
            frontend.selecting(context.peer()),
            closing(frontend.service.select_stream(request_iterator, visit.call)) as stream,
        ):
            start = stream.start()
            visit.strategy = _strategy(start)
            frontend.name(visit, start.request_id)
            for response in stream.run(start):
                # A caller who does not take what it asked for would keep its place and its memory.
                with ended_after(frontend.service.settings.idle_stream, context):
                    yield response


@contextmanager
def ended_after(seconds: float, context: grpc.ServicerContext) -> Iterator[None]:
    """Ends the RPC where what is done inside takes longer."""
    timer = threading.Timer(seconds, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _strategy(request: selection_pb2.SelectRequest) -> str:
    """What the request is counted under."""
    return request.strategy.WhichOneof("kind") or ""


def add_selection_servicer(servicer: SelectionServicer, server: grpc.Server) -> None:
    """What the generated function of that name does, but for chunks, which are read without copies of their bytes."""
    messages = selection_pb2
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Select": grpc.unary_unary_rpc_method_handler(
            servicer.Select,
            request_deserializer=messages.SelectRequest.FromString,
            response_serializer=messages.SelectResponse.SerializeToString,
        ),
        "SelectStream": grpc.stream_stream_rpc_method_handler(
            servicer.SelectStream,
            request_deserializer=wire.read_stream_request,
            response_serializer=messages.SelectStreamResponse.SerializeToString,
        ),
    }
    name = messages.DESCRIPTOR.services_by_name["SelectionService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


class StrategyServicer(strategy_pb2_grpc.StrategyServiceServicer):
    """Descriptions of strategies."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def ListStrategies(
        self, request: strategy_pb2.ListStrategiesRequest, context: grpc.ServicerContext
    ) -> strategy_pb2.ListStrategiesResponse:
        """Describes every strategy."""
        with self.frontend.visit("ListStrategies", context):
            return self.frontend.service.list_strategies()
        raise AssertionError("a visit ends with an answer or an abortion")


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """Descriptions of the server."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> server_pb2.GetServerInfoResponse:
        """Describes the server."""
        with self.frontend.visit("GetServerInfo", context):
            return self.frontend.service.server_info()
        raise AssertionError("a visit ends with an answer or an abortion")
