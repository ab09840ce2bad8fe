"""Assembles the gRPC server, and stops it gracefully."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from queryselect_service import allocator, logs, status, tls
from queryselect_service.endpoint import Endpoint
from queryselect_service.errors import Unauthenticated
from queryselect_service.health import DeviceHealth
from queryselect_service.metrics import Metrics
from queryselect_service.patience import Patience
from queryselect_service.service import Service
from queryselect_service.servicer import PROMPT, Frontend, add_methods, add_services
from queryselect_service.settings import Settings
from queryselect_service.threads import end_with_threads, started

if TYPE_CHECKING:
    from queryselect_service.tracing import Tracing

#: Threads for health, descriptions and reflection. Selections have their own.
THREADS = 16
#: How long a thread of Python keeps the others waiting, in seconds: with 64 clients on two cores the 99th percentile of
#: health checks is 45 to 57 ms, and 67 to 76 with Python's own 5 ms.
SWITCH = 0.001
#: Reflection streams at a time.
REFLECTIONS = 4
#: Threads that answer health in plain text.
HEALTH_THREADS = 2
#: The longest message that asks for health, in bytes.
HEALTH_BYTES = 4096
#: How long a connection may take until both sides know what they speak, in milliseconds.
HANDSHAKE_MS = 20_000
#: gRPC's number for a time without an end, in milliseconds.
NEVER = (1 << 31) - 1
#: Room in a message beside its tensors.
HEADER_BYTES = 1 << 20
#: Time for answers that are on their way when the port closes, in seconds.
LAST_WORDS = 2.0
#: How often a silent client is asked whether it is there, in milliseconds.
KEEPALIVE_MS = 20_000
#: RPCs that one connection may have open beyond those that may wait: these are told that there is no room, and not
#: without end, since each takes memory before it is looked at.
RPCS_BEYOND = 128

log = logging.getLogger(__name__)


@dataclass
class Server:
    """A server that is listening. Ports are the real ones (metrics_port, health_port: -1 where there is none)."""

    _plain: grpc.Server | None  # health alone
    grpc: grpc.Server
    frontend: Frontend
    health: DeviceHealth
    port: int
    metrics_port: int
    health_port: int
    _metrics: Endpoint | None

    def drain(self, grace: float) -> None:
        """Says NOT_SERVING, refuses new requests, lets running ones finish within `grace` seconds, and stops.

        The port stays open meanwhile: health checks are answered, and clients are told to try another server.
        """
        self.health.enter_graceful_shutdown()
        self.frontend.drain(grace)
        self.grpc.stop(LAST_WORDS).wait()
        if self._plain is not None:
            self._plain.stop(LAST_WORDS).wait()
        self.health.close()
        self.frontend.close()
        if self._metrics is not None:
            self._metrics.close()
        if self.frontend.tracing is not None:
            self.frontend.tracing.close()


class BoundedReflection(reflection.ReflectionServicer):
    """Reflection, of which each stream occupies a thread: a few at a time, and none for ever."""

    def __init__(self, names: Sequence[str], frontend: Frontend, seconds: float) -> None:
        """seconds: the longest that a stream may stay open."""
        super().__init__(names)
        self._frontend, self._seconds = frontend, seconds
        self._places = threading.BoundedSemaphore(REFLECTIONS)

    def ServerReflectionInfo(self, request_iterator: Iterable[Any], context: Any) -> Iterator[Any]:
        """Answers questions about the proto."""
        try:
            self._frontend.caller(context)
        except Unauthenticated as error:
            context.abort_with_status(status.to_grpc(error, ""))
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{REFLECTIONS} reflections are under way already")
        try:
            with self._frontend.patience.ended_after(self._seconds, context):
                yield from super().ServerReflectionInfo(request_iterator, context)
        finally:
            self._places.release()


class Prompt:
    """A method that takes its one message as a stream would, and waits for it no longer than is good for others.

    gRPC would wait in one of its threads for as long as the caller likes.
    """

    def __init__(self, method: Callable[..., Any], patience: Patience) -> None:
        self._method, self._patience = method, patience
        self.experimental_non_blocking = getattr(method, "experimental_non_blocking", False)  # gRPC's own name for it

    def __call__(self, messages: Iterator[Any], context: grpc.ServicerContext, *more: Any) -> Any:
        """Runs the method."""
        with self._patience.ended_after(PROMPT, context):
            message = next(messages, None)
        if message is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this method needs one message; there is none")
        return self._method(message, context, *more)


class Lenient:
    """Stands in for a server while others' services are added to it.

    Bytes that are no message are read as `instead`, where gRPC would answer with INTERNAL, and what is unary is prompt.
    """

    def __init__(self, server: grpc.Server, instead: Message, patience: Patience) -> None:
        self._server, self._instead, self._patience = server, instead, patience

    def add_generic_rpc_handlers(self, _: object) -> None:
        """The same methods as below."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Adds a service's methods."""
        add_methods(self._server, service, {name: self._lenient(each) for name, each in handlers.items()})

    def _lenient(self, method: Any) -> Any:
        if method.request_streaming:
            return method._replace(request_deserializer=self._read)
        kind = (
            grpc.stream_stream_rpc_method_handler if method.response_streaming else grpc.stream_unary_rpc_method_handler
        )
        prompt = Prompt(method.unary_stream or method.unary_unary, self._patience)
        return kind(prompt, self._read, method.response_serializer)

    def _read(self, data: bytes) -> Message:
        try:
            return type(self._instead).FromString(data)
        except DecodeError:
            return self._instead


def start(settings: Settings) -> Server:
    """Starts a server.

    Raises RuntimeError where an address is taken or the device does not work, ValueError for files that can't be used.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_says_no_header)
    pair = tls.pair(settings) if settings.tls_cert else None
    service, tracing = Service(settings), _tracing(settings)
    service.engine.probe()
    server = grpc.server(
        started(THREADS, "rpc"),
        options=[
            ("grpc.max_receive_message_length", settings.max_inline_bytes + HEADER_BYTES),
            ("grpc.max_send_message_length", -1),  # answers are bounded by the service itself
            ("grpc.max_concurrent_streams", settings.max_queue + RPCS_BEYOND),
            ("grpc.so_reuseport", 0),  # a second server on this port must fail, not share it
            # A client whose machine vanished says nothing: asked now and then, it does not answer.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            # What runs then goes on for as long as it likes: gRPC's default is no limit.
            ("grpc.max_connection_age_ms", int(1000 * settings.max_connection_age) or NEVER),
        ],
    )
    metrics = Metrics(service.engine)
    frontend = Frontend(service, metrics, tracing)
    names = add_services(frontend, server)
    checks = DeviceHealth(service.engine.devices, names, frontend.patience)
    metrics.ready.set_function(lambda: checks.ready)
    for each in checks.watched:
        metrics.device_ready.labels(str(each.device)).set_function(each.ready)
    if pair is not None:
        metrics.follow(pair, lambda: pair.get().ends)
    if frontend.tokens is not None:
        metrics.follow(frontend.tokens.file, frontend.tokens.next_end)
    _add_health(server, checks, frontend.patience)
    if settings.reflection:
        described = BoundedReflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], frontend, settings.idle_stream
        )
        lenient = Lenient(server, reflection_pb2.ServerReflectionRequest(), frontend.patience)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(described, lenient)  # type: ignore[no-untyped-call]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.port}"
    endpoint, metrics_port, plain, health_port = None, -1, None, -1
    try:
        if pair is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.credentials(pair, ask=bool(settings.tls_client_ca)))
        if settings.health_port >= 0:
            plain = grpc.server(
                started(HEALTH_THREADS, "health"),
                options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", HEALTH_BYTES)],
            )
            _add_health(plain, checks, frontend.patience)
            health_port = _listen_for_health(plain, host, settings.health_port)
        if settings.metrics_port >= 0:
            endpoint = _endpoint(settings, metrics)
            metrics_port = endpoint.server_port
    except BaseException:  # nobody is given what could stop these threads
        checks.close()
        frontend.close()
        server.stop(None)
        if plain is not None:
            plain.stop(None)
        if tracing is not None:
            tracing.close()
        raise
    server.start()
    if plain is not None:
        plain.start()
    return Server(plain, server, frontend, checks, port, metrics_port, health_port, endpoint)


def _says_no_header(record: logging.LogRecord) -> bool:
    """Whether a line of gRPC may be logged: it writes out headers that are no UTF-8, and a token may be in one."""
    return not str(record.msg).startswith("Invalid encoding")


def _add_health(server: grpc.Server, checks: DeviceHealth, patience: Patience) -> None:
    unreadable = health_pb2.HealthCheckRequest(service="bytes that are no message")
    health_pb2_grpc.add_HealthServicer_to_server(checks, cast("Any", Lenient(server, unreadable, patience)))


def _listen_for_health(plain: grpc.Server, host: str, port: int) -> int:
    """The real port. Raises RuntimeError where the address is taken."""
    try:
        return plain.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise RuntimeError(f"health port {port}: {error}") from error


def _endpoint(settings: Settings, metrics: Metrics) -> Endpoint:
    """Raises OSError where its address is taken."""
    try:
        return Endpoint(settings.host, settings.metrics_port, metrics.registry)
    except OSError as error:
        raise OSError(f"metrics port {settings.metrics_port}: {error}") from error


def _tracing(settings: Settings) -> Tracing | None:
    """Raises RuntimeError where what traces need is not installed."""
    if not settings.otlp_endpoint:
        return None
    try:
        from queryselect_service.tracing import Tracing  # noqa: PLC0415  # nobody else needs what it imports
    except ImportError as error:
        raise RuntimeError(f'otlp_endpoint needs {error.name}: pip install "queryselect[tracing]"') from error
    return Tracing.to(settings.otlp_endpoint)


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    logs.begin(settings.log_level, settings.log_format)
    allocator.prepare()
    log.info("settings", extra=logs.fields(settings=settings.told()))
    end_with_threads()
    stop = threading.Event()

    def on_signal(_: int, __: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    sys.setswitchinterval(SWITCH)
    server = start(settings)
    gc.collect()
    gc.freeze()  # what is here stays: looking through all of it now and then would stop every thread for long
    ports = {"port": server.port, "metrics_port": server.metrics_port, "health_port": server.health_port}
    log.info(
        "serving", extra=logs.fields(host=settings.host, **{name: each for name, each in ports.items() if each >= 0})
    )
    # Printed for people and for programs that asked for a free port.
    plain = f", health on port {server.health_port}" if server.health_port >= 0 else ""
    print(
        f"queryselect serves on {settings.host}:{server.port}, metrics on port {server.metrics_port}{plain}", flush=True
    )
    stop.wait()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait for the grace
    log.info("draining", extra=logs.fields(grace_seconds=settings.drain_grace))
    server.drain(settings.drain_grace)
    log.info("stopped")
