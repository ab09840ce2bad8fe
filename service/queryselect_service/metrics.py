"""Every Prometheus instrument, in one list.

Labels have few values, all of them this server's own words: strategies that it has, reasons that it gives, phases that
it knows. docs/operations.md tells who uses which.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from queryselect_service.call import Call
from queryselect_service.device import Device
from queryselect_service.engine import Engine
from queryselect_service.errors import BUSY
from queryselect_service.reload import Reloaded

#: Seconds. Selections take from a millisecond to minutes.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
ROWS = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 50_000_000)
DIMS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16_384, 65_536)
#: The codes of RPCs whose callers did not wait for the answer.
LEFT = ("CANCELLED", "DEADLINE_EXCEEDED")
SELECTIONS = ("Select", "SelectStream")
#: Reasons that alerts ask for.
REASONS = (
    "BUG",
    "DEVICE_LOST",
    "IDLE",
    "OUT_OF_MEMORY",
    "SLOW",
    "SOURCE",
    "SOURCE_REFUSED",
    *(f"BUSY:{limit}" for limit in BUSY),
)
#: Seconds after which what was last seen of the device's memory is old: nobody can look at it now.
STALE = 5.0


class Metrics:
    """The instruments of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # as many series again, of which nobody has made use
        self.registry = registry = CollectorRegistry()

        def counter(name: str, doc: str, *labels: str) -> Counter:
            return Counter(f"queryselect_{name}", doc, labels, registry=registry)

        def gauge(name: str, doc: str, *labels: str) -> Gauge:
            return Gauge(f"queryselect_{name}", doc, labels, registry=registry)

        def histogram(name: str, doc: str, *labels: str, buckets: tuple[float, ...] = BUCKETS) -> Histogram:
            return Histogram(f"queryselect_{name}", doc, labels, buckets=buckets, registry=registry)

        self.requests = counter(
            "requests_total",
            "RPCs answered, by method, query strategy (empty where none was recognised) and gRPC code",
            "rpc",
            "strategy",
            "code",
        )
        self.rejected = counter(
            "rejected_total",
            "RPCs refused or failed, by the reason that the caller is told and the limit that was met, if any",
            "reason",
        )
        for reason in REASONS:  # there from the start: what begins at 1 has not grown
            self.rejected.labels(reason)
        self.cancelled = counter(
            "cancelled_total",
            "Selections whose caller left or whose deadline passed, by the phase that they were in",
            "phase",
        )
        self.out_of_memory = counter("oom_total", "Requests that ran out of memory in spite of the estimate")
        self.uploaded = counter("upload_bytes_total", "Bytes of requests for selections, as they come")
        self.fetched = counter("source_bytes_total", "Bytes of tensors read by reference, once their RPC has ended")
        self.duration = histogram(
            "request_duration_seconds",
            "Time from an RPC's arrival to its answer, by method and query strategy",
            "rpc",
            "strategy",
        )
        self.queued = histogram(
            "queue_duration_seconds", "Time that an admitted selection waited for the device", "strategy"
        )
        self.received = histogram(
            "receive_duration_seconds", "Time that an admitted selection waited for its bytes", "strategy"
        )
        self.kernel = histogram("kernel_duration_seconds", "Time that a selection had the device", "strategy")
        self.rows = histogram("pool_rows", "Rows of the pools of requests that are right in themselves", buckets=ROWS)
        self.dims = histogram("pool_dim", "Dimensions of the embeddings among them", buckets=DIMS)
        gauge("in_flight", "Selections admitted and not ended").set_function(lambda: engine.host.taken)
        gauge("queue_depth", "Jobs that are ready and wait for a device").set_function(lambda: len(engine.queue))
        gauge(
            "queue_wait_seconds", "For how long the job that has waited longest for a device has been waiting now"
        ).set_function(lambda: engine.queue.wait)
        admitted = gauge("admitted_bytes", "Memory set aside for selections, by where it is: host or device", "kind")
        admitted.labels("host").set_function(lambda: engine.host.reserved)
        own = engine.own_memory
        if own is not None:
            admitted.labels("device").set_function(lambda: own.reserved)
        self.ready = gauge("ready", "1 where readiness is SERVING, else 0")
        self.device_ready = gauge("device_ready", "1 where the device works and answers, else 0", "device")
        self.current = gauge(
            "file_current", "1 where what a file says now is in use, 0 where it can't be and an older one is", "file"
        )
        self.ends = gauge(
            "file_expiry_timestamp_seconds",
            "When the certificate that is in use ends, and the next of the tokens; not a number where none does",
            "file",
        )
        build = gauge("build_info", "Always 1; the labels tell the versions", "version", "torch")
        build.labels(version("queryselect"), torch.__version__).set(1)
        registry.register(DeviceMemory(engine.devices))
        ProcessCollector(registry=registry)
        # Finding an instrument by its labels takes a lock and longer than counting.
        self._requests = cache(self.requests.labels)
        self._rejected, self._cancelled = cache(self.rejected.labels), cache(self.cancelled.labels)
        self._duration = cache(self.duration.labels)
        self._queued, self._received, self._kernel = map(
            cache, (self.queued.labels, self.received.labels, self.kernel.labels)
        )

    def follow(self, file: Reloaded[Any], ends: Callable[[], float]) -> None:
        """Tells of a file whether it is in use as it is now; a scrape looks, for nobody may connect meanwhile.

        ends: when something of it does, in seconds since 1970; not a number where nothing does.
        """
        self.current.labels(file.what).set_function(lambda: file.current)
        self.ends.labels(file.what).set_function(ends)

    def ended(self, rpc: str, call: Call, code: str, reason: str | None) -> None:
        """Counts an RPC. reason: why it failed."""
        strategy, times, sizes = call.strategy, call.times, call.sizes
        self._requests(rpc, strategy, code).inc()
        self._duration(rpc, strategy).observe(times.total)
        if code in LEFT:
            if rpc in SELECTIONS:
                self._cancelled(times.last).inc()
        elif reason is not None:
            self._rejected(reason).inc()
            if reason == "OUT_OF_MEMORY":
                self.out_of_memory.inc()
        self.fetched.inc(call.fetched)
        if call.admitted:
            self._queued(strategy).observe(times.seconds("queue"))
            self._received(strategy).observe(times.seconds("receive"))
        if "kernel" in times.spans:
            self._kernel(strategy).observe(times.seconds("kernel"))
        if "N" in sizes:
            self.rows.observe(sizes["N"])
        if "D" in sizes:
            self.dims.observe(sizes["D"])


class DeviceMemory(Collector):
    """What health saw of the devices' memory last: a scrape never waits for a device that hangs."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = {str(each): each for each in devices}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Nothing of a device that nobody could look at for a while."""
        family = GaugeMetricFamily(
            "queryselect_device_memory_bytes",
            "A device's memory: total, free, and, of a GPU, what torch has in use (allocated) and holds (reserved)",
            labels=("device", "kind"),
        )
        for name, each in self._devices.items():
            seen_at, seen = each.seen
            if time.monotonic() - seen_at < STALE:
                for kind, value in seen.items():
                    family.add_metric((name, kind), value)
        yield family
