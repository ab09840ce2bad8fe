"""What is counted and measured, under which few labels, and the endpoint that tells."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import parser as text_parser
from prometheus_client.openmetrics import parser as open_parser

from queryselect.v1 import (
    selection_pb2,
    selection_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    strategy_pb2,
    tensor_pb2,
)
from queryselect_service import device, endpoint, server
from queryselect_service import metrics as module
from queryselect_service.errors import Cancelled
from queryselect_service.settings import Settings
from tests.service.streams import Talk, streamed
from tests.service.test_errors import FAR, X, request, sleepy
from tests.waiting import until

OPEN = "application/openmetrics-text; version=1.0.0"
N, D = X.shape


class Seen:
    """A server's registry; `more` tells by how much a sample has grown."""

    def __init__(self, started: server.Server) -> None:
        self._registry, self._before = started.frontend.metrics.registry, {}
        self._before = self.all()

    def all(self) -> dict[tuple, float]:
        return {
            (each.name, *sorted(each.labels.items())): each.value
            for family in self._registry.collect()
            for each in family.samples
        }

    def now(self, name: str, **labels) -> float:
        return self.all().get((f"queryselect_{name}", *sorted(labels.items())), 0.0)

    def more(self, name: str, **labels) -> float:
        return self.now(name, **labels) - self._before.get((f"queryselect_{name}", *sorted(labels.items())), 0.0)

    def grows(self, name: str, **labels) -> None:
        """Waits until it is counted: an RPC is, after its answer has gone."""
        assert until(lambda: self.more(name, **labels)), (name, labels)


def select(channel, message, **options):
    return selection_pb2_grpc.SelectionServiceStub(channel).Select(message, **{"timeout": 20, **options})


def refused(channel, message, **options) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        select(channel, message, **options)
    return caught.value.code()


def test_a_selection_is_measured_from_end_to_end(serve):
    started, channel = serve()
    seen, message = Seen(started), request(FAR)
    select(channel, message)
    seen.grows("request_duration_seconds_count", rpc="Select", strategy="k_center_greedy")
    for name in ("queue", "receive", "kernel"):
        assert seen.more(f"{name}_duration_seconds_count", strategy="k_center_greedy") == 1
    assert 0 < seen.more("kernel_duration_seconds_sum", strategy="k_center_greedy") < 5
    assert (seen.more("pool_rows_count"), seen.more("pool_rows_sum")) == (1, N)
    assert (seen.more("pool_dim_count"), seen.more("pool_dim_sum")) == (1, D)
    assert seen.more("upload_bytes_total") == message.ByteSize()


def test_a_stream_is_too_and_its_bytes_count_as_they_come(serve):
    started, channel = serve()
    first, data = streamed(request())
    with Talk(channel, first) as talk:
        admitted = talk.until("admitted")
        seen = Seen(started)
        assert seen.now("admitted_bytes", kind="host") == admitted.reserved_bytes > 0
        assert seen.now("upload_bytes_total") == first.start.ByteSize() + 2
        for path, each in data.items():
            talk.send(selection_pb2.SelectStreamRequest(chunk={"path": path, "data": each}))
        talk.end()
        talk.until("result")
    seen.grows("receive_duration_seconds_count", strategy="margin")
    assert seen.more("upload_bytes_total") > sum(map(len, data.values()))
    assert seen.now("admitted_bytes", kind="host") == 0
    assert seen.more("kernel_duration_seconds_count", strategy="margin") == 1


def test_bytes_that_are_read_by_reference_are_none_that_come(serve, tmp_path):
    started, channel = serve(allow_uris=tmp_path.as_uri())
    np.save(tmp_path / "pool.npy", X)
    message = request(FAR, embeddings=tensor_pb2.Tensor(ref=tensor_pb2.TensorRef(uri=(tmp_path / "pool.npy").as_uri())))
    seen = Seen(started)
    select(channel, message)
    seen.grows("requests_total", rpc="Select", strategy="k_center_greedy", code="OK")
    assert seen.more("source_bytes_total") == X.nbytes
    assert seen.more("upload_bytes_total") == message.ByteSize()


def test_what_is_only_checked_had_no_kernel_and_no_wait(serve):
    started, channel = serve()
    seen = Seen(started)
    select(channel, request(validate_only=True))
    seen.grows("request_duration_seconds_count", rpc="Select", strategy="margin")
    for name in ("queue", "receive", "kernel"):
        assert seen.more(f"{name}_duration_seconds_count", strategy="margin") == 0


@pytest.mark.parametrize(
    ("message", "settings", "reason"),
    [
        (request(budget=100), {}, "INVALID_INPUT"),
        (request(), {"max_budget": 1}, "OVER_LIMIT:max_budget"),
        (request(), {"max_rows": 3}, "OVER_LIMIT:max_rows"),
        (request(), {"max_inline_bytes": 1024, "max_host_bytes": 1}, "OVER_LIMIT:max_host_bytes"),
        (request(strategy_pb2.Strategy()), {}, "INVALID_INPUT"),
        (sleepy(fail="device"), {}, "OUT_OF_MEMORY"),
        (sleepy(fail="host"), {}, "OUT_OF_MEMORY"),
        (sleepy(fail="lost"), {}, "DEVICE_LOST"),
    ],
)
def test_what_is_refused_is_counted_by_reason_and_limit(serve, message, settings, reason):
    started, channel = serve(**settings)
    seen = Seen(started)
    refused(channel, message)
    seen.grows("rejected_total", reason=reason)
    assert seen.more("oom_total") == (reason == "OUT_OF_MEMORY")


def test_so_is_what_finds_no_room(serve):
    started, channel = serve(max_queue=0, max_streams_per_peer=1)
    seen = Seen(started)
    first, _ = streamed(request())
    with Talk(channel, first) as talk:
        talk.until("admitted")
        assert refused(channel, request()) is grpc.StatusCode.RESOURCE_EXHAUSTED
        seen.grows("rejected_total", reason="BUSY:queue")
        with Talk(channel, first) as second, pytest.raises(grpc.RpcError):
            second.until("admitted")
        seen.grows("rejected_total", reason="BUSY:streams")
    seen.grows("cancelled_total", phase="receive")


def test_so_is_who_waits_too_long(serve):
    started, channel = serve(queue_wait=0.1)
    seen, stub = Seen(started), selection_pb2_grpc.SelectionServiceStub(channel)
    running = stub.Select.future(sleepy(seconds=0.6))
    assert until(lambda: seen.now("admitted_bytes", kind="host"))
    assert refused(channel, request()) is grpc.StatusCode.RESOURCE_EXHAUSTED
    seen.grows("rejected_total", reason="BUSY:queue_wait")
    running.result(10)


def test_a_draining_server_is_not_ready_and_refuses(serve):
    started, channel = serve()
    seen = Seen(started)
    assert seen.now("ready") == 1
    started.health.enter_graceful_shutdown()
    assert seen.now("ready") == 0
    started.frontend._draining = True
    assert refused(channel, request()) is grpc.StatusCode.UNAVAILABLE
    seen.grows("rejected_total", reason="DRAINING")


def test_a_bug_is_counted_as_one(serve):
    started, channel = serve()
    seen = Seen(started)
    assert refused(channel, sleepy(fail="bug")) is grpc.StatusCode.INTERNAL
    seen.grows("requests_total", rpc="Select", strategy="sleepy", code="INTERNAL")
    assert seen.more("rejected_total", reason="BUG") == 1


def test_who_leaves_is_counted_by_where_the_request_was(serve):
    started, channel = serve()
    seen, stub = Seen(started), selection_pb2_grpc.SelectionServiceStub(channel)
    running = stub.Select.future(sleepy(seconds=20))
    assert until(lambda: started.frontend.service.engine.queue._running)
    assert refused(channel, request(), timeout=0.2) is grpc.StatusCode.DEADLINE_EXCEEDED
    seen.grows("cancelled_total", phase="queue")
    running.cancel()
    seen.grows("cancelled_total", phase="kernel")
    assert seen.more("cancelled_total", phase="queue") == seen.more("cancelled_total", phase="kernel") == 1


def test_who_leaves_without_a_selection_is_not_counted_as_one(serve, monkeypatch):
    started, channel = serve()
    seen = Seen(started)

    def leave(_):
        raise Cancelled("the caller has gone")

    monkeypatch.setattr(started.frontend.service, "server_info", leave)
    with pytest.raises(grpc.RpcError):
        server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
    seen.grows("requests_total", rpc="GetServerInfo", strategy="", code="CANCELLED")
    assert not [name for name, *_ in seen.all() if name == "queryselect_cancelled_total"]


@pytest.mark.parametrize("name", ["no such plug-in", 'x"} 1\nqueryselect_ready 0', "\x1b[31m", "é" * 50])
def test_no_text_of_a_caller_is_a_label(serve, name):
    started, channel = serve()
    seen = Seen(started)
    custom = strategy_pb2.Strategy(custom={"name": name})
    assert refused(channel, request(custom, num_rows=3)) is grpc.StatusCode.UNIMPLEMENTED
    seen.grows("requests_total", rpc="Select", strategy="custom", code="UNIMPLEMENTED")
    assert name not in str(seen.all())


def test_a_plug_in_that_is_here_has_its_own_label(serve):
    started, channel = serve()
    seen = Seen(started)
    select(channel, sleepy())
    seen.grows("requests_total", rpc="Select", strategy="sleepy", code="OK")


def test_a_scrape_never_waits_for_the_device(serve, monkeypatch):
    started, _ = serve()
    seen = Seen(started)
    free, total = (seen.now("device_memory_bytes", device="cpu", kind=kind) for kind in ("free", "total"))
    assert 0 < free < total
    hangs, answers = threading.Event(), threading.Event()

    def probe(_: device.Device) -> None:
        hangs.set()
        answers.wait(20)

    monkeypatch.setattr(device.Device, "probe", probe)
    monkeypatch.setattr(device.Device, "memory", lambda _: answers.wait(20))
    try:
        assert hangs.wait(5)
        began = time.monotonic()
        seen.all()
        assert time.monotonic() - began < 1
        monkeypatch.setattr(module, "STALE", 0.0)
        assert not [name for name, *_ in seen.all() if "device_memory" in name], "what is old is not told"
    finally:
        answers.set()


# The endpoint


@pytest.fixture
def scraped():
    """The address of a server's endpoint."""
    started = server.start(Settings(port=0, metrics_port=0))
    with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
        select(channel, request())
        refused(channel, request(budget=100))
    yield started.metrics_port
    started.drain(0.1)


def scrape(port: int, **headers: str):
    return urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers))


def test_either_format_is_served_as_asked_and_says_the_same(scraped):
    with scrape(scraped) as page:
        assert page.headers["Content-Type"].startswith("text/plain; version=")
        plain = {each.name: each for each in text_parser.text_string_to_metric_families(page.read().decode())}
    with scrape(scraped, Accept=f"{OPEN},text/plain;version=0.0.4;q=0.5") as page:
        assert page.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        text = page.read().decode()
    modern = {each.name: each for each in open_parser.text_string_to_metric_families(text)}
    assert text.endswith("# EOF\n")
    assert {name.removesuffix("_total") for name in plain} == set(modern)
    for name, family in modern.items():
        assert family.documentation, name
        assert family.type in {"counter", "gauge", "histogram"}
        assert not [each for each in family.samples if each.name.endswith("_created")]
    with scrape(scraped, **{"Accept-Encoding": "gzip"}) as page:
        assert page.headers["Content-Encoding"] == "gzip"


@pytest.mark.parametrize("method", ["POST", "PUT", "BREW"])
def test_only_reading_is_answered(scraped, method):
    asked = urllib.request.Request(f"http://127.0.0.1:{scraped}/metrics", b"x" * 1000, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asked)
    assert caught.value.code in {405, 501}
    caught.value.close()


def test_who_says_nothing_keeps_no_scraper_away(scraped, capfd):
    """Many more connections than there are places, silent or talking nonsense: the oldest gives way to the newest."""
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", scraped)))
            for _ in range(3 * endpoint.CONNECTIONS)
        ]
        for number, each in enumerate(silent):
            with contextlib.suppress(OSError):
                each.sendall(b"GET /metrics HT" if number % 2 else b"\x16\x03\x01\x00\xff\r\n\r\n")
        for _ in range(5):
            with scrape(scraped) as page:
                assert b"queryselect_build_info" in page.read()
        assert sum(each.name.startswith("Thread-") for each in threading.enumerate()) < 3 * endpoint.CONNECTIONS
        silent[0].settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert silent[0].recv(1) == b"", "the oldest is closed"
    assert capfd.readouterr().err == ""


def test_where_no_connection_can_be_taken_the_endpoint_waits(monkeypatch):
    """As where there are no descriptors left; it would ask again and again."""
    asked = []

    def accept(_):
        asked.append(time.monotonic())
        raise OSError(24, "Too many open files")

    with endpoint.Endpoint("127.0.0.1", 0, CollectorRegistry()) as own:
        monkeypatch.setattr(socket.socket, "accept", accept)
        with socket.create_connection(("127.0.0.1", own.server_port)):
            assert until(lambda: len(asked) >= 3)
            monkeypatch.undo()
            assert np.diff(asked).min() >= endpoint.PAUSE * 0.9
        own.shutdown()


def test_a_silent_connection_ends(monkeypatch):
    monkeypatch.setattr(endpoint.Handler, "timeout", 0.2)
    started = server.start(Settings(port=0, metrics_port=0))
    with socket.create_connection(("127.0.0.1", started.metrics_port)) as silent:
        silent.settimeout(5)
        assert silent.recv(1) == b""
    started.drain(0.1)


def test_a_taken_metrics_port_is_an_error_that_leaves_no_thread_behind(running):
    def threads() -> int:
        return sum(each.name.partition("_")[0] in {"health", "patience", "selection"} for each in threading.enumerate())

    before = threads()
    with pytest.raises(OSError, match=f"metrics port {running.metrics_port}: "):
        server.start(Settings(port=0, metrics_port=running.metrics_port))
    assert until(lambda: threads() <= before)


def test_what_is_refused_before_it_is_read_has_no_strategy(serve):
    started, channel = serve()
    seen = Seen(started)
    broken = channel.unary_unary("/queryselect.v1.SelectionService/Select", bytes, bytes)
    with pytest.raises(grpc.RpcError):
        broken(b"\xff\xff\xff", timeout=5)
    seen.grows("requests_total", rpc="Select", strategy="", code="INVALID_ARGUMENT")
