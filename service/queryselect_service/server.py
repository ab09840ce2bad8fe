"""Assembles the gRPC server, and stops it gracefully."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from queryselect.v1 import (
    selection_pb2,
    server_pb2,
    server_pb2_grpc,
    strategy_pb2,
    strategy_pb2_grpc,
)
from queryselect_service import allocator
from queryselect_service.engine import Engine
from queryselect_service.metrics import Metrics
from queryselect_service.service import Service
from queryselect_service.servicer import (
    Frontend,
    SelectionServicer,
    ServerServicer,
    StrategyServicer,
    add_selection_servicer,
    ended_after,
)
from queryselect_service.settings import Settings

#: Threads beyond those that may wait for the device, so that health and descriptions never wait behind them.
SPARE_THREADS = 16
#: Reflection streams at a time.
REFLECTIONS = 4
#: Room in a message beside its tensors.
HEADER_BYTES = 1 << 20
#: Time for answers that are on their way when the port closes, in seconds.
LAST_WORDS = 2.0
#: How often a silent client is asked whether it is there, in milliseconds.
KEEPALIVE_MS = 20_000
#: How long a probe of the device counts, in seconds.
PROBE_COUNTS = 1.0

log = logging.getLogger(__name__)


@dataclass
class Server:
    """A server that is listening. port and metrics_port are the real ones (metrics_port -1: none)."""

    grpc: grpc.Server
    frontend: Frontend
    health: health.HealthServicer
    port: int
    metrics_port: int
    _metrics: WSGIServer | None

    def drain(self, grace: float) -> None:
        """Says NOT_SERVING, refuses new requests, lets running ones finish within `grace` seconds, and stops.

        The port stays open meanwhile: health checks are answered, and clients are told to try another server.
        """
        self.health.enter_graceful_shutdown()
        self.frontend.drain(grace)
        self.grpc.stop(LAST_WORDS).wait()
        if self._metrics is not None:
            self._metrics.shutdown()
            self._metrics.server_close()


class BoundedReflection(reflection.ReflectionServicer):
    """Reflection, of which each stream occupies a thread: a few at a time, and none for ever."""

    def __init__(self, names: Sequence[str], patience: float) -> None:
        super().__init__(names)
        self._places, self._patience = threading.BoundedSemaphore(REFLECTIONS), patience

    def ServerReflectionInfo(self, request_iterator: Iterable[Any], context: Any) -> Iterator[Any]:
        """Answers questions about the proto."""
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{REFLECTIONS} reflections are under way already")
        try:
            with ended_after(self._patience, context):
                yield from super().ServerReflectionInfo(request_iterator, context)
        finally:
            self._places.release()


class DeviceHealth(health.HealthServicer):
    """Health whose readiness follows the device: a check of `services` makes one tiny operation there."""

    def __init__(self, engine: Engine, services: Sequence[str]) -> None:
        super().__init__()
        self._engine, self._services, self._last = engine, services, 0.0
        self._probing = threading.Lock()

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Answers a check; liveness, the empty name, asks nothing of the device."""
        if request.service in self._services and self._probing.acquire(blocking=False):
            try:
                self._probe()
            finally:
                self._probing.release()
        answer: health_pb2.HealthCheckResponse = super().Check(request, context)
        return answer

    def _probe(self) -> None:
        if time.monotonic() - self._last < PROBE_COUNTS:
            return
        states = health_pb2.HealthCheckResponse
        try:
            self._engine.probe()
            ready = True
        except RuntimeError as error:
            log.error("not ready: %s", error)  # noqa: TRY400  # the message says it all
            ready = False
        self._last = time.monotonic()
        for name in self._services:
            self.set(name, states.SERVING if ready else states.NOT_SERVING)


def start(settings: Settings) -> Server:
    """Starts a server. Raises RuntimeError where the address is taken or the device does not work."""
    service, metrics = Service(settings), Metrics()
    service.engine.probe()
    server = grpc.server(
        ThreadPoolExecutor(settings.max_queue + SPARE_THREADS, thread_name_prefix="rpc"),
        options=[
            ("grpc.max_receive_message_length", settings.max_inline_bytes + HEADER_BYTES),
            ("grpc.max_send_message_length", -1),  # answers are bounded by the service itself
            ("grpc.so_reuseport", 0),  # a second server on this port must fail, not share it
            # A client whose machine vanished says nothing: asked now and then, it does not answer.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 2),
            ("grpc.http2.max_pings_without_data", 0),
        ],
    )
    frontend = Frontend(service, metrics)
    add_selection_servicer(SelectionServicer(frontend), server)
    strategy_pb2_grpc.add_StrategyServiceServicer_to_server(StrategyServicer(frontend), server)
    server_pb2_grpc.add_ServerServiceServicer_to_server(ServerServicer(frontend), server)
    names = [
        service.full_name
        for file in (selection_pb2, strategy_pb2, server_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    checks = DeviceHealth(service.engine, names)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", *names):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    described = BoundedReflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], settings.idle_stream)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(described, server)  # type: ignore[no-untyped-call]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = server.add_insecure_port(f"{host}:{settings.port}")
    endpoint, metrics_port = None, -1
    if settings.metrics_port >= 0:
        try:
            endpoint, _ = metrics.serve(settings.host, settings.metrics_port)
        except OSError as error:
            raise OSError(f"metrics port {settings.metrics_port}: {error}") from error
        metrics_port = endpoint.server_port
    server.start()
    return Server(server, frontend, checks, port, metrics_port, endpoint)


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    level = settings.log_level.upper()
    if level not in logging.getLevelNamesMapping():
        known = ", ".join(logging.getLevelNamesMapping())
        raise ValueError(f"log_level must be one of {known}; it is {settings.log_level!r}")
    allocator.prepare()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    log.info("settings\n%s", settings)
    stop = threading.Event()

    def on_signal(_: int, __: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    server = start(settings)
    # Printed for people and for programs that asked for a free port.
    print(f"queryselect serves on {settings.host}:{server.port}, metrics on port {server.metrics_port}", flush=True)
    stop.wait()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait for the grace
    log.info("draining, at most %g s", settings.drain_grace)
    server.drain(settings.drain_grace)
    log.info("stopped")
