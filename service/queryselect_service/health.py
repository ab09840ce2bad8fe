"""Health over gRPC: the states of services, for those who ask and those who watch.

In place of grpc_health's own, which holds its lock while it sends to somebody who watches. A message has been sent when
gRPC's one thread for everything says so; when somebody else leaves, that thread waits for the lock: then neither goes
on, and the server never answers again. And whoever does not read what is sent would keep all others from asking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from queryselect_service.patience import Patience
from queryselect_service.threads import started

#: Threads that tell those who watch, and how long one waits for who does not read, in seconds; then that call ends.
TELLING, READING = 8, 2.0

Answer = health_pb2.HealthCheckResponse


class Watcher:
    """Who watches a service, what it was told last, and whether a thread tells it something now."""

    def __init__(self, service: str, context: grpc.ServicerContext, send: Callable[[Answer], object]) -> None:
        self.service, self.context, self.send = service, context, send
        self.told: int | None = None
        self.busy = False


class Health(health_pb2_grpc.HealthServicer):
    """Thread-safe; nothing is sent with the lock held."""

    def __init__(self, patience: Patience) -> None:
        self._patience, self._lock = patience, threading.Lock()
        self._states: dict[str, int] = {"": Answer.SERVING}
        self._watchers = set[Watcher]()
        self._final = False
        self._threads = started(TELLING, "watch")

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> Answer:
        """Answers a check."""
        state = self._states.get(request.service)
        if state is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return Answer()
        return Answer(status=state)

    def Watch(  # type: ignore[override]  # gRPC gives a callback to who needs no thread for as long as the call lasts
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.ServicerContext,
        send_response_callback: Callable[[Answer], object],
    ) -> None:
        """Tells a state at once, and again whenever it changes."""
        watcher = Watcher(request.service, context, send_response_callback)

        def left() -> None:
            with self._lock:
                self._watchers.discard(watcher)

        with self._lock:
            self._watchers.add(watcher)
        if context.add_callback(left):
            self._threads.submit(self._tell_watcher, watcher)
        else:  # it has gone already
            left()

    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]  # gRPC's own name for it

    def set(self, service: str, state: int) -> None:
        """Sets the state of a service."""
        with self._lock:
            if self._final:
                return
            self._states[service] = state
        self._tell_all()

    def enter_graceful_shutdown(self) -> None:
        """Nothing is serving from now on."""
        with self._lock:
            self._final = True
            self._states = dict.fromkeys(self._states, int(Answer.NOT_SERVING))
        self._tell_all()

    def close(self) -> None:
        """Lets its threads go home."""
        self._threads.shutdown(wait=False)

    def _tell_all(self) -> None:
        with self._lock:
            stale = [each for each in self._watchers if each.told != self._state(each)]
        for each in stale:
            self._threads.submit(self._tell_watcher, each)

    def _state(self, watcher: Watcher) -> int:
        return self._states.get(watcher.service, Answer.SERVICE_UNKNOWN)

    def _tell_watcher(self, watcher: Watcher) -> None:
        """In one of the threads; returns at once where another tells it already, which looks again."""
        with self._lock:
            if watcher.busy:
                return
            watcher.busy = True
        while True:
            with self._lock:
                state = self._state(watcher)
                if watcher not in self._watchers or watcher.told == state:
                    watcher.busy = False
                    return
                watcher.told = state
            with self._patience.ended_after(READING, watcher.context):
                watcher.send(Answer(status=state))
