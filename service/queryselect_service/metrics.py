"""Every Prometheus instrument, in one list."""

from __future__ import annotations

from importlib.metadata import version
from threading import Thread
from wsgiref.simple_server import WSGIServer

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

#: Seconds. Selections take from a millisecond to minutes.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The instruments of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "queryselect_requests_total",
            "RPCs answered, by method, query strategy (empty where none was recognised) and gRPC code",
            ("rpc", "strategy", "code"),
            registry=self.registry,
        )
        self.duration = Histogram(
            "queryselect_request_duration_seconds",
            "Time from an RPC's arrival to its answer, by method and query strategy",
            ("rpc", "strategy"),
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge("queryselect_in_flight", "Selections admitted and not ended", registry=self.registry)
        self.queue_depth = Gauge(
            "queryselect_queue_depth", "Jobs that are ready and wait for the device", registry=self.registry
        )
        build = Gauge(
            "queryselect_build_info",
            "Always 1; the labels tell the versions",
            ("version", "torch"),
            registry=self.registry,
        )
        build.labels(version("queryselect"), torch.__version__).set(1)

    def serve(self, host: str, port: int) -> tuple[WSGIServer, Thread]:
        """Starts the /metrics endpoint; port 0 takes a free one (`server_port` of the result)."""
        return start_http_server(port, host, self.registry)
