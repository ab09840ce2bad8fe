"""Health over gRPC: the states of services and how they follow the devices, for those who ask and those who watch.

In place of grpc_health's own, which holds its lock while it sends to somebody who watches. A message has been sent when
gRPC's one thread for everything says so; when somebody else leaves, that thread waits for the lock: then neither goes
on, and the server never answers again. And whoever does not read what is sent would keep all others from asking.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from queryselect_service.device import Device
from queryselect_service.patience import Patience
from queryselect_service.threads import started

#: Threads that tell those who watch, and how long one waits for who does not read, in seconds; then that call ends.
TELLING, READING = 8, 2.0
#: How often the device is probed, and how long who asks for health waits for an answer of it, in seconds.
PROBE_EVERY, PROBE_WAIT = 1.0, 2.0

Answer = health_pb2.HealthCheckResponse

log = logging.getLogger(__name__)


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


class Watched:
    """A device, whether it worked when it was looked at last, and when that was."""

    def __init__(self, device: Device) -> None:
        self.device, self.told, self.works = device, time.monotonic(), True

    def ready(self) -> bool:
        """Whether it works, and has not been silent for too long."""
        return self.works and not self.silent

    @property
    def silent(self) -> bool:
        """Whether it has not answered for too long."""
        return time.monotonic() - self.told > PROBE_EVERY + PROBE_WAIT


class DeviceHealth(Health):
    """Health whose readiness follows the devices: one that works is enough.

    A thread for each probes it by a tiny operation now and then; one that does not answer in time is not ready either.
    Liveness, the empty name, asks nothing of a device.
    """

    def __init__(self, devices: Sequence[Device], services: Sequence[str], patience: Patience) -> None:
        super().__init__(patience)
        self.watched = [Watched(each) for each in devices]
        self._services, self._closed, self._telling = services, threading.Event(), threading.Lock()
        self._ready = True
        self._draining = False
        for name in services:
            self.set(name, Answer.SERVING)
        for each in self.watched:
            threading.Thread(target=self._watch, args=(each,), name="health", daemon=True).start()
        threading.Thread(target=self._listen, name="silence", daemon=True).start()

    def Check(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> Answer:
        """Answers a check."""
        self._tell()
        return super().Check(request, context)

    @property
    def ready(self) -> bool:
        """Whether readiness is SERVING."""
        return any(each.ready() for each in self.watched) and not self._draining

    def enter_graceful_shutdown(self) -> None:
        """Says NOT_SERVING from now on."""
        self._draining = True
        super().enter_graceful_shutdown()

    def close(self) -> None:
        """Probes no more."""
        self._closed.set()
        super().close()

    def _watch(self, one: Watched) -> None:
        device = one.device
        while not self._closed.is_set():
            try:
                device.probe()
                self._note(one, works=True)
            except RuntimeError as error:
                self._note(one, works=False, why=str(error))
            if not one.works:
                self._closed.wait(PROBE_EVERY)
            elif device.lost.wait(PROBE_EVERY):  # a selection found it so: told at once, and looked at again
                self._note(one, works=False, why=f"{device} is lost")

    def _listen(self) -> None:
        """Tells those who watch of a device that hangs: its own thread hangs with it."""
        silent = set[Watched]()
        while not self._closed.wait(PROBE_EVERY):
            told, before, silent = self._tell(), silent, {each for each in self.watched if each.silent}
            for each in silent - before:
                if not told:  # others work
                    log.error("%s does not answer", each.device)

    def _note(self, one: Watched, *, works: bool, why: str = "") -> None:
        changed, one.works, one.told = works != one.works, works, time.monotonic()
        told = self._tell(why or f"{one.device} works")
        if changed and not told:  # others work
            log.log(logging.WARNING if works else logging.ERROR, "%s", why or f"{one.device} works again")

    def _tell(self, why: str = "") -> bool:
        """Sets the state of the services where it changes, and returns whether; those who watch it are told."""
        with self._telling:
            ready = any(each.ready() for each in self.watched)
            if ready == self._ready:
                return False
            self._ready = ready
            if ready:
                log.warning("ready again: %s", why)
            else:
                silent = (f"{each.device} does not answer" for each in self.watched if each.silent)
                log.error("not ready: %s", why or "; ".join(silent))
            for name in self._services:
                self.set(name, Answer.SERVING if ready else Answer.NOT_SERVING)
            return True
