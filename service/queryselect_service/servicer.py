"""The three gRPC services. Each method: who calls, what the Service answers, how a failure travels.

Requirements that the design meets:

- Messages come as bytes and are read in the method's own thread: bytes that are none are the caller's fault, not gRPC's
  INTERNAL, and gRPC's one thread for everything never reads megabytes.
- Unary methods take their one message as a stream would, which is the same on the wire: callers show who they are, and
  are counted, before it is here; slow ones are bounded, and the message can go once it is read.
- Selections wait in threads of their own: health and descriptions never wait for one.
"""

from __future__ import annotations

import logging
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from queryselect.v1 import selection_pb2, server_pb2, strategy_pb2
from queryselect_service import allocator, status, wire
from queryselect_service.auth import Tokens
from queryselect_service.call import ANYONE, Call, Caller
from queryselect_service.checks import check_request_id
from queryselect_service.errors import Busy, Cancelled, InvalidInput, TokenExpired, Unavailable
from queryselect_service.logs import fields
from queryselect_service.metrics import LEFT, Metrics
from queryselect_service.patience import Patience
from queryselect_service.queue import RETRY_AFTER, Room
from queryselect_service.service import STREAMS_BEYOND, Service
from queryselect_service.threads import started

if TYPE_CHECKING:
    from queryselect_service.tracing import Tracing

#: Every method's name with its service's before it.
METHODS = {
    method.name: f"{service.full_name}/{method.name}"
    for file in (selection_pb2, strategy_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
#: Threads beyond those, for callers who are told that there is no room.
REFUSING = 16
#: A request that held as many bytes leaves pieces behind that are worth looking for.
TRIM_BYTES = 64 << 20
#: How long a message without tensors may take to come, in seconds: it is waited for in a thread that others need.
PROMPT = 2.0

log = logging.getLogger(__name__)


class Frontend:
    """What every RPC has in common: its id, its metrics, its log line, its errors."""

    def __init__(self, service: Service, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self.service, self.metrics, self.tracing = service, metrics, tracing
        file = service.settings.token_file
        self.tokens = Tokens(Path(file)) if file else None
        self._running, self._ended, self._draining = 0, threading.Condition(), False
        # Each selection occupies a thread, from before its message is here.
        most = service.settings.max_queue + STREAMS_BEYOND
        clear_in = service.engine.queue.clear_in
        self._selecting = Room("this server", most, 0, lambda call: not call.admitted, clear_in, limits=("rpcs", ""))
        self._open = Counter[tuple[str, str]]()  # what peers have open: what, and whose
        self.patience = Patience()
        self.threads = started(most + REFUSING, "selection")
        service.readers = started(service.settings.max_queue + 2 * STREAMS_BEYOND, "inbox")
        service.sources.begin()

    def drain(self, grace: float) -> None:
        """Refuses what comes from now on, and waits for what runs, at most `grace` seconds."""
        with self._ended:
            self._draining = True
            self._ended.wait_for(lambda: not self._running, grace)

    def close(self) -> None:
        """Lets its threads go home."""
        self.patience.close()
        self.threads.shutdown(wait=False)
        self.service.readers.shutdown(wait=False)
        self.service.sources.close()

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
    def selecting(self, call: Call, *, stream: bool = False) -> Iterator[None]:
        """One RPC that may wait. Raises Busy where there are too many of them, or too many of its peer."""
        with self._one_of(call.caller.max_in_flight, "selections", call.peer):
            with call.times.phase("queue"):  # others may have to make room
                self._selecting.enter(call)
            try:
                if not stream:
                    yield
                    return
                with self._one_of(self.service.settings.max_streams_per_peer, "streams", call.peer):
                    yield
            finally:
                self._selecting.leave(call)

    @contextmanager
    def _one_of(self, most: int | None, what: str, peer: str) -> Iterator[None]:
        """One of what a peer may have open, so many at a time; None: any number. Counted even so: limits change."""
        with self._ended:
            if most is not None and self._open[what, peer] >= most:
                raise Busy(f"this client has {most} {what} open already", retry_after=RETRY_AFTER, limit=what)
            self._open[what, peer] += 1
        try:
            yield
        finally:
            with self._ended:
                self._open[what, peer] -= 1
                self._open += Counter()  # forgets what nobody has

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """Who calls. Raises Unauthenticated."""
        return ANYONE if self.tokens is None else self.tokens.caller(context.invocation_metadata())

    @contextmanager
    def visit(self, rpc: str, context: grpc.ServicerContext) -> Iterator[Call]:
        """One RPC at work. Whatever is raised inside aborts it: the caller is told, and the server lives."""
        call, remaining = Call(uuid.uuid4().hex, peer=context.peer()), context.time_remaining()
        metadata: dict[str, Any] = dict(context.invocation_metadata())
        code, reason = grpc.StatusCode.INTERNAL, None
        # gRPC says "no deadline" as None, or as more seconds than a clock can count.
        if remaining is not None and remaining < threading.TIMEOUT_MAX:
            call.deadline = call.times.started + remaining
        try:
            if not context.add_callback(call.leave):
                call.leave()
            try:
                call.caller = self.caller(context)  # before anything else is read
            except TokenExpired as error:
                call.peer = error.name
                raise
            call.peer = call.caller.name or call.peer
            self.name(call, str(metadata.get("x-request-id", "")))
            with self._counted():
                yield call
            context.set_trailing_metadata((("x-request-id", call.request_id),))
            code = grpc.StatusCode.OK
        except GeneratorExit:  # gRPC lets go of a stream whose caller has gone
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is
            reason, abortion = status.cause(error), status.to_grpc(error, call.request_id)
            code = abortion.code
            traceback.clear_frames(error.__traceback__)  # they hold the request's tensors, in a circle with the error
            context.abort_with_status(abortion)  # raises, which ends the RPC
        finally:
            self._tell(rpc, call, code, reason, metadata)
            if call.reserved >= TRIM_BYTES:
                allocator.give_back()

    def _tell(self, rpc: str, call: Call, code: grpc.StatusCode, reason: str | None, metadata: dict[str, Any]) -> None:
        """Counts an RPC that has ended, records it and logs it."""
        self.metrics.ended(rpc, call, code.name, reason)
        traced = {}
        if self.tracing is not None:
            known = metadata if code is not grpc.StatusCode.UNAUTHENTICATED else {}  # strangers decide on no trace
            traced = self.tracing.ended(METHODS[rpc], call, (code.value[0], code.name), reason, known)
        if not log.isEnabledFor(logging.INFO):
            return
        times = call.times
        said = fields(
            request_id=call.request_id,
            rpc=rpc,
            strategy=call.strategy or None,
            code=code.name,
            reason=reason,
            phase=times.last if code.name in LEFT else None,
            sizes=dict(call.sizes) or None,
            upload_bytes=call.uploaded or None,
            source_bytes=call.fetched or None,
            reserved_bytes=call.reserved or None,
            seconds={
                **{phase: round(times.seconds(phase), 6) for phase in times.spans},
                "total": round(times.total, 6),
            },
            peer=call.peer,
            **traced,
        )
        log.info("%s %s", rpc, code.name, extra=said)

    def name(self, call: Call, request_id: str) -> None:
        """Gives the RPC the id that its caller chose, if any. Raises InvalidInput for what can't be one."""
        check_request_id(request_id)
        call.request_id = request_id or call.request_id

    def message(self, messages: Iterator[bytes], call: Call, context: grpc.ServicerContext, seconds: float) -> bytes:
        """The one message of a unary RPC. One that takes longer to come ends as CANCELLED.

        Raises InvalidInput where there is none, Cancelled or Busy where it is not to be waited for.
        """
        try:
            with self.patience.ended_after(seconds, context, call):
                data = next(messages, None)
        except grpc.RpcError as error:
            call.check()
            raise Cancelled("the caller has gone") from error
        call.check()
        if data is None:
            call.ended_early()
            raise InvalidInput("this method needs one message; there is none")
        return data

    def came(self, call: Call, data: bytes) -> bytes:
        """Counts a message of a selection."""
        call.uploaded += len(data)
        self.metrics.uploaded.inc(len(data))
        return data


class SelectionServicer:
    """Selections."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def Select(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> selection_pb2.SelectResponse:
        """Answers one request with one message."""
        frontend, service = self.frontend, self.frontend.service
        with frontend.visit("Select", context) as call, frontend.selecting(call):
            with call.times.phase("receive"):
                data = frontend.message(messages, call, context, service.settings.upload_grace)
                message = wire.read(selection_pb2.SelectRequest, frontend.came(call, data))
                del data
            call.strategy = wire.strategy_name(message.strategy)
            frontend.name(call, message.request_id)
            request, fetch = service.read(message, call, {})
            del message  # which has all tensors once more
            largest = service.settings.max_inline_bytes
            return service.run(request, fetch, call, held=request.nbytes, largest_answer=largest)
        raise AssertionError("a visit ends with an answer or an abortion")

    def SelectStream(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[selection_pb2.SelectStreamResponse]:
        """Answers a request whose tensors come in chunks."""
        frontend = self.frontend
        with (
            frontend.visit("SelectStream", context) as call,
            frontend.selecting(call, stream=True),
            closing(frontend.service.select_stream(self._read(messages, call), call)) as stream,
        ):
            start = stream.start()
            call.strategy = wire.strategy_name(start.strategy)
            frontend.name(call, start.request_id)
            responses = stream.run(start)
            del start
            for response in responses:
                # A caller who does not take what it asked for would keep its place and its memory.
                with frontend.patience.ended_after(frontend.service.settings.idle_stream, context):
                    yield response

    def _read(self, messages: Iterator[bytes], call: Call) -> Iterator[wire.StreamMessage]:
        return (wire.read_stream_request(self.frontend.came(call, data)) for data in messages)


class StrategyServicer:
    """Descriptions of strategies."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def ListStrategies(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> strategy_pb2.ListStrategiesResponse:
        """Describes every strategy."""
        with self.frontend.visit("ListStrategies", context) as call:
            wire.read(strategy_pb2.ListStrategiesRequest, self.frontend.message(messages, call, context, PROMPT))
            return self.frontend.service.list_strategies()
        raise AssertionError("a visit ends with an answer or an abortion")


class ServerServicer:
    """Descriptions of the server."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def GetServerInfo(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> server_pb2.GetServerInfoResponse:
        """Describes the server."""
        with self.frontend.visit("GetServerInfo", context) as call:
            wire.read(server_pb2.GetServerInfoRequest, self.frontend.message(messages, call, context, PROMPT))
            return self.frontend.service.server_info(call.caller)
        raise AssertionError("a visit ends with an answer or an abortion")


class Apart:
    """A method that gRPC runs in threads of these, and not of those that answer everything else."""

    def __init__(self, method: Callable[..., Any], threads: ThreadPoolExecutor) -> None:
        self._method, self.experimental_thread_pool = method, threads  # gRPC's own name for it

    def __call__(self, *arguments: Any) -> Any:
        """Runs the method."""
        return self._method(*arguments)


def add_services(frontend: Frontend, server: grpc.Server) -> list[str]:
    """Adds the three services; their names. What the generated functions do, but that messages come as bytes."""
    selection, threads = SelectionServicer(frontend), frontend.threads
    select, select_stream = Apart(selection.Select, threads), Apart(selection.SelectStream, threads)
    strategies, info = StrategyServicer(frontend), ServerServicer(frontend)
    methods: dict[Any, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {
        selection_pb2: {
            "Select": grpc.stream_unary_rpc_method_handler(
                select, None, selection_pb2.SelectResponse.SerializeToString
            ),
            "SelectStream": grpc.stream_stream_rpc_method_handler(
                select_stream, None, selection_pb2.SelectStreamResponse.SerializeToString
            ),
        },
        strategy_pb2: {
            "ListStrategies": grpc.stream_unary_rpc_method_handler(
                strategies.ListStrategies, None, strategy_pb2.ListStrategiesResponse.SerializeToString
            )
        },
        server_pb2: {
            "GetServerInfo": grpc.stream_unary_rpc_method_handler(
                info.GetServerInfo, None, server_pb2.GetServerInfoResponse.SerializeToString
            )
        },
    }
    names = []
    for file, handlers in methods.items():
        (service,) = file.DESCRIPTOR.services_by_name.values()
        add_methods(server, service.full_name, handlers)
        names.append(service.full_name)
    return names


def add_methods(server: grpc.Server, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
    """Adds a service's methods.

    Registered, too: gRPC takes one call of every registered method at a time, and one of all others together, so that a
    health check would wait behind every selection that has just come.
    """
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_registered_method_handlers(service, handlers)
