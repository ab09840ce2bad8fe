"""A device that is lost or does not answer: the request fails, readiness falls and recovers, the server lives."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from queryselect import Client, Custom, Unavailable
from queryselect.v1 import selection_pb2_grpc
from queryselect_service import device as devices
from queryselect_service import health, upload
from tests.service.streams import Talk, free, serves, streamed
from tests.service.test_errors import FAR, X, detail, request, sleepy, tensor
from tests.waiting import until

States = health_pb2.HealthCheckResponse
SERVICE = "queryselect.v1.SelectionService"


@pytest.fixture
def device(monkeypatch):
    """A device that a test can break, by what its probe does; and probes that come often."""

    class Device:
        def __init__(self):
            self.broken, self.answers = False, threading.Event()
            self.answers.set()

        def probe(self, one: devices.Device) -> None:
            self.answers.wait(20)
            if self.broken:
                one.lose()
                raise RuntimeError("device cuda:0 does not work: it is lost")
            one.lost.clear()

    made = Device()
    monkeypatch.setattr(health, "PROBE_EVERY", 0.05)
    monkeypatch.setattr(health, "PROBE_WAIT", 0.2)

    def probe(one: devices.Device) -> None:
        made.probe(one)

    monkeypatch.setattr(devices.Device, "probe", probe)
    return made


def check(channel, name: str = SERVICE) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status


def until_health_is(channel, status: int) -> None:
    assert until(lambda: check(channel) == status)
    assert check(channel, "") == States.SERVING, "liveness asks nothing of the device"


@contextmanager
def refused_as_lost():
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    info = detail(rpc_status.from_call(caught.value), error_details_pb2.ErrorInfo)
    assert info.reason == "DEVICE_LOST"


def test_a_selection_that_finds_the_device_lost_is_told_so_and_so_is_health(serve, device):
    own, channel = serve()
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert next(watch).status == States.SERVING
    device.broken = True
    with refused_as_lost():
        stub.Select(sleepy(fail="lost"))
    assert next(watch).status == States.NOT_SERVING
    until_health_is(channel, States.NOT_SERVING)
    with refused_as_lost():  # before it is uploaded
        first, _ = streamed(request(FAR, embeddings=tensor(X)))
        with Talk(channel, first) as talk:
            list(talk.call)
    free(own)
    device.broken = False
    assert next(watch).status == States.SERVING
    until_health_is(channel, States.SERVING)
    watch.cancel()
    serves(own, channel)


def test_a_device_that_is_lost_for_a_moment_serves_the_next_request(serve, device):
    own, channel = serve()
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    with refused_as_lost():
        stub.Select(sleepy(fail="lost"))
    assert stub.Select(request()).HasField("indices")
    until_health_is(channel, States.SERVING)
    serves(own, channel)


def test_readiness_follows_a_device_that_nobody_uses(serve, device, caplog):
    own, channel = serve()
    until_health_is(channel, States.SERVING)
    for broken, status in ((True, States.NOT_SERVING), (False, States.SERVING)):
        device.broken = broken
        until_health_is(channel, status)
    told = [each.getMessage() for each in caplog.records if each.name == health.__name__]
    assert "not ready: device cuda:0 does not work: it is lost" in told
    assert told[-1] == "ready again: cpu works"
    assert len(told) <= 4, "changes are told, not states; another server of these tests tells them too"
    serves(own, channel)


def test_a_device_that_does_not_answer_is_not_ready_and_nobody_waits_for_it(serve, device):
    own, channel = serve()
    device.answers.clear()
    asked = time.monotonic()
    until_health_is(channel, States.NOT_SERVING)
    assert time.monotonic() - asked < 3
    device.answers.set()
    until_health_is(channel, States.SERVING)
    serves(own, channel)


def test_the_client_raises_unavailable_and_tries_again(serve, device):
    own, _ = serve()
    device.broken = True
    lost = Custom(name="sleepy", parameters={"fail": "lost"})
    with Client(f"127.0.0.1:{own.port}", retries=0) as client, pytest.raises(Unavailable, match="is lost"):
        client.select(lost, 1, num_rows=3)
    threading.Timer(0.3, setattr, (device, "broken", False)).start()
    with Client(f"127.0.0.1:{own.port}", retries=8) as client:
        assert len(client.select("random", 1, num_rows=3)) == 1


def test_a_hosts_memory_that_ends_during_an_upload_fails_that_upload(serve, monkeypatch):
    """numpy has no room for the buffers: Busy, no bug, and the next is served."""
    own, channel = serve()
    make = upload._bytes

    def none_left(size):
        raise MemoryError("Unable to allocate 12.0 MiB")

    monkeypatch.setattr(upload, "_bytes", none_left)
    first, _ = streamed(request(FAR, embeddings=tensor(X)))
    with Talk(channel, first) as talk:
        failure = talk.failure()
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
    monkeypatch.setattr(upload, "_bytes", make)
    serves(own, channel)
