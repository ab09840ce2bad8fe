"""The three gRPC services. Each method: who calls, what the Service answers, how a failure travels."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import grpc

from queryselect.v1 import (
    selection_pb2,
    selection_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    strategy_pb2,
    strategy_pb2_grpc,
)
from queryselect_service import status
from queryselect_service.checks import REQUEST_ID, check_request_id
from queryselect_service.engine import Call
from queryselect_service.errors import ServiceError, Unavailable, Unsupported
from queryselect_service.metrics import Metrics
from queryselect_service.service import Service

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class Frontend:
    """What every RPC has in common: its id, its metrics, its log line, its errors."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self._running, self._ended, self._draining = 0, threading.Condition(), False

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

    def answer(
        self,
        rpc: str,
        context: grpc.ServicerContext,
        work: Callable[[Call], Answer],
        *,
        request_id: str = "",
        strategy: str = "",
    ) -> Answer:
        """Does the work and returns its answer, or aborts the RPC with what went wrong."""
        started, code = time.monotonic(), grpc.StatusCode.OK
        given = request_id or str(dict(context.invocation_metadata()).get("x-request-id", ""))
        call = Call(given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        remaining = context.time_remaining()
        # gRPC says "no deadline" as None, or as more seconds than a clock can count.
        if remaining is not None and remaining < threading.TIMEOUT_MAX:
            call.deadline = started + remaining
        try:
            check_request_id(given)
            if not context.add_callback(call.gone.set):
                call.gone.set()
            with self._counted():
                result = work(call)
            context.set_trailing_metadata((("x-request-id", call.request_id),))
            return result
        except Exception as error:  # noqa: BLE001  # whatever it is, the caller is told and the server lives
            retry_after = error.retry_after if isinstance(error, ServiceError) else None
            abortion = status.to_grpc(status.from_exception(error), call.request_id, retry_after)
            code = abortion.code
            context.abort_with_status(abortion)  # raises, which ends the RPC
        finally:
            seconds = time.monotonic() - started
            self.metrics.requests.labels(rpc, strategy, code.name).inc()
            self.metrics.duration.labels(rpc, strategy).observe(seconds)
            log.info("%s %s %s %s %.1f ms", call.request_id, rpc, strategy or "-", code.name, seconds * 1e3)


class SelectionServicer(selection_pb2_grpc.SelectionServiceServicer):
    """Selections."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def Select(
        self, request: selection_pb2.SelectRequest, context: grpc.ServicerContext
    ) -> selection_pb2.SelectResponse:
        """Answers one request with one message."""
        service = self.frontend.service
        return self.frontend.answer(
            "Select",
            context,
            lambda call: service.select(request, call, largest_answer=service.settings.max_inline_bytes),
            request_id=request.request_id,
            strategy=request.strategy.WhichOneof("kind") or "",
        )

    def SelectStream(
        self, request_iterator: Iterator[selection_pb2.SelectStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[selection_pb2.SelectStreamResponse]:
        """Is not served yet."""

        def refuse(_: Call) -> NoReturn:
            raise Unsupported("this server does not serve SelectStream yet; use Select")

        self.frontend.answer("SelectStream", context, refuse)
        yield from ()


class StrategyServicer(strategy_pb2_grpc.StrategyServiceServicer):
    """Descriptions of strategies."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def ListStrategies(
        self, request: strategy_pb2.ListStrategiesRequest, context: grpc.ServicerContext
    ) -> strategy_pb2.ListStrategiesResponse:
        """Describes every strategy."""
        return self.frontend.answer("ListStrategies", context, lambda _: self.frontend.service.list_strategies())


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """Descriptions of the server."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> server_pb2.GetServerInfoResponse:
        """Describes the server."""
        return self.frontend.answer("GetServerInfo", context, lambda _: self.frontend.service.server_info())
