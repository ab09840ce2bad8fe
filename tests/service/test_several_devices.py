"""Several devices in one server: one line for all, a selection at a time on each, and those that work go on."""

from __future__ import annotations

import threading

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from queryselect import Client
from queryselect.v1 import selection_pb2_grpc, server_pb2, server_pb2_grpc
from queryselect_service import health
from queryselect_service.device import Device, find
from queryselect_service.engine import Engine
from queryselect_service.queue import Job, Queue, Room
from queryselect_service.settings import Settings
from tests.service.streams import Talk, ask, free, long_request, whole
from tests.service.test_errors import FAR, detail, request, sleepy
from tests.service.test_queue import job
from tests.waiting import until

States = health_pb2.HealthCheckResponse
SERVICE = "queryselect.v1.SelectionService"
TWO = "cpu,cpu"


def gpus(monkeypatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


# Which devices


@pytest.mark.parametrize(
    ("names", "here", "found"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 1, ["cuda:0"]),
        ("auto", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 0, ["cuda"]),  # which then does not work, and is told of as such
        ("cuda:1", 3, ["cuda:1"]),
        ("cuda:2, cuda:0", 3, ["cuda:2", "cuda:0"]),
        (TWO, 3, ["cpu", "cpu"]),
    ],
)
def test_names_of_devices(monkeypatch, names, here, found):
    gpus(monkeypatch, here)
    assert [str(each) for each in find(names)] == found


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("gpu", "device must be auto or names of torch; it is 'gpu'"),
        ("", "device must be auto or names of torch; it is ''"),
        ("cpu,", "device must be auto or names of torch; it is 'cpu,'"),
        ("cuda:0,cuda:0", "device names cuda:0 twice"),
        ("cuda,cuda:1", "device names cuda:1 twice"),
        ("cuda:0,cpu", "device names GPUs or the CPU, not both; it is 'cuda:0,cpu'"),
    ],
)
def test_names_that_are_none(monkeypatch, names, words):
    gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match=words):
        find(names)


def test_a_client_in_this_process_takes_one(monkeypatch):
    gpus(monkeypatch, 0)
    with Client("local:") as client:
        assert [each.name for each in client.server_info().devices] == ["cpu"]


# The line


def test_a_job_is_taken_by_who_may_and_the_others_wait_for_theirs():
    queue = Queue(ageing=60, devices=2)
    ours, anyones = job(1), job(2)
    ours.device = "a"
    for each in (ours, anyones):
        queue.put(each)

    def of(name):
        return lambda job: job.device in {None, name}

    assert queue.take(of("b")) is anyones
    assert queue.take(of("a")) is ours
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(queue.take(of("b"))))
    waiting.start()
    mine, theirs = job(1), job(9)
    mine.device, theirs.device = "a", "b"
    for each in (mine, theirs):
        queue.put(each)
    waiting.join(5)
    assert taken == [theirs]
    assert len(queue) == 1


def test_who_looks_again_takes_what_it_may_now():
    queue, may, taken = Queue(ageing=60), threading.Event(), []
    queue.put(job(1))
    waiting = threading.Thread(target=lambda: taken.append(queue.take(lambda _: may.is_set())))
    waiting.start()
    may.set()
    queue.stir()
    waiting.join(5)
    assert len(taken) == 1


def test_a_line_for_two_is_clear_in_half_the_time():
    one, two = Queue(ageing=60), Queue(ageing=60, devices=2)
    for queue in (one, two):
        queue.put(job(5e10))
    assert one.clear_in() == pytest.approx(2 * two.clear_in())


def test_the_line_tells_how_long_it_has_waited():
    queue = Queue(ageing=60)
    assert queue.wait == 0
    for each in (job(1, waited=3), job(2, waited=7)):
        queue.put(each)
    assert queue.wait == pytest.approx(7, abs=1)


def test_a_device_takes_what_it_has_room_for():
    engine = Engine(Settings(device=TWO))
    small, large = engine.devices
    small.capacity, large.capacity = 10, 20
    job = Job(lambda _: None, 1, needs=15)
    assert [each.may_take(job) for each in (small, large)] == [False, True]
    small.capacity = None  # the host's, which is looked after elsewhere
    assert small.may_take(job)


def test_what_others_keep_on_a_device_is_not_there_for_a_job():
    """Streams keep scores on a device between their turns; what is admitted fits all devices together, not each."""
    first, second = Engine(Settings(device=TWO)).devices
    first.capacity = second.capacity = 20
    stream, job = object(), Job(lambda _: None, 1, needs=15)
    first.hold(stream, 6)
    assert [each.may_take(job) for each in (first, second)] == [False, True]
    own = Job(lambda _: None, 1, needs=15, device=first)
    assert first.may_take(own)
    first.hold(stream, 5)
    assert first.may_take(job)
    first.hold(stream, 6)
    first.release(stream)
    assert first.may_take(job)


def test_a_device_has_what_a_stream_needs_until_the_stream_ends(serve):
    own, channel = serve()
    engine = own.frontend.service.engine
    (device,) = engine.devices
    device.capacity = 1 << 30
    engine.own_memory = Room("cpu", 5, device.capacity)
    first, *rest = whole(long_request("margin"), 1 << 14)
    with Talk(channel, first) as talk:
        talk.send(*rest[5:], *rest[:4])  # lists first, without which no row is scored; the last rows are still to come
        assert until(lambda: device._held)
        assert sum(device._held.values()) == engine.own_memory.reserved
    assert until(lambda: not device._held)
    free(own)


def test_a_job_whose_only_device_is_lost_is_taken_and_fails():
    """The others have no room for it: it would wait for nothing."""
    small, large = Engine(Settings(device=TWO)).devices
    small.capacity, large.capacity = 10, 20
    large.lose()
    assert [each.may_take(Job(lambda _: None, 1, needs=15)) for each in (small, large)] == [False, True]
    assert [each.may_take(Job(lambda _: None, 1, needs=5)) for each in (small, large)] == [True, False]


def test_a_room_of_several_devices_takes_nothing_larger_than_one():
    assert Room("cuda:0, cuda:1", 5, 30, largest=20).largest == 20
    assert Room("cpu", 5, 30).largest == 30


# A server


def test_two_selections_run_at_a_time_and_a_third_waits(serve):
    own, channel = serve(device=TWO)
    stub, queue = selection_pb2_grpc.SelectionServiceStub(channel), own.frontend.service.engine.queue
    running = [stub.Select.future(sleepy(seconds=20)) for _ in range(3)]
    assert until(lambda: (len(queue._running), len(queue)) == (2, 1))
    gauge = own.frontend.metrics.registry.get_sample_value
    assert until(lambda: gauge("queryselect_queue_wait_seconds") > 0.1)
    running[0].cancel()
    running[1].cancel()
    assert until(lambda: (len(queue._running), len(queue)) == (1, 0))
    assert gauge("queryselect_queue_wait_seconds") == 0
    running[2].cancel()
    free(own)


def test_what_is_begun_on_a_device_goes_on_there(serve):
    """Rows of a stream are scored by several jobs, whose scores stay on the device, and ranked by another."""
    own, channel = serve(device=TWO)
    taken = []
    for device in own.frontend.service.engine.devices:

        def take(job, device=device, may=device.may_take):
            return may(job) and (taken.append(device) or True)

        device.may_take = take
    for _ in range(10):
        ask(channel, whole(long_request("margin"), 1 << 14))
        assert len(taken) >= 2
        assert len(set(taken)) == 1
        taken.clear()
    free(own)


def test_picks_are_those_of_one_device(serve):
    picked = []
    for device in ("cpu", TWO):
        _, channel = serve(device=device)
        stub = selection_pb2_grpc.SelectionServiceStub(channel)
        running = [stub.Select.future(long_request("k_center_greedy")) for _ in range(4)]
        picked += [each.result(30).indices for each in running]
    assert all(each == picked[0] for each in picked)


def test_every_device_is_described(serve):
    _, channel = serve(device=TWO)
    stub = server_pb2_grpc.ServerServiceStub(channel)
    told = stub.GetServerInfo(server_pb2.GetServerInfoRequest()).devices
    assert [each.name for each in told] == ["cpu", "cpu"]
    assert all(0 < each.capacity_bytes < each.total_bytes for each in told)


# Devices that are lost


@pytest.fixture
def broken(monkeypatch):
    """Devices that a test breaks by adding them, and by setting how: lost, or hanging."""
    devices, hang = set(), threading.Event()
    hang.set()
    monkeypatch.setattr(health, "PROBE_EVERY", 0.05)

    def probe(one: Device) -> None:
        if one in devices:
            hang.wait(20)
        if one in devices:
            one.lose()
            raise RuntimeError(f"device {one} does not work: it is lost")
        one.lost.clear()
        one._queue.stir()

    monkeypatch.setattr(Device, "probe", probe)
    yield devices, hang
    hang.set()


def state(channel) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5).status


def test_while_one_works_the_server_is_ready_and_that_one_has_all_jobs(serve, broken, caplog):
    devices, _ = broken
    own, channel = serve(device=TWO)
    first, second = own.frontend.service.engine.devices
    stub, queue = selection_pb2_grpc.SelectionServiceStub(channel), own.frontend.service.engine.queue
    devices.add(first)
    assert until(first.lost.is_set)
    assert state(channel) == States.SERVING
    running = [stub.Select.future(sleepy(seconds=20)) for _ in range(2)]
    assert until(lambda: (len(queue._running), len(queue)) == (1, 1))
    assert not until(lambda: len(queue) == 0, 0.2)
    devices.clear()  # and takes up work when it is back
    assert until(lambda: (len(queue._running), len(queue)) == (2, 0))
    for each in running:
        each.cancel()
    free(own)
    told = [each.getMessage() for each in caplog.records if each.name == health.__name__]
    assert told == ["device cpu does not work: it is lost", "cpu works again"]
    assert not second.lost.is_set()


def test_where_none_works_it_is_not_ready_and_says_so_at_once(serve, broken):
    devices, _ = broken
    own, channel = serve(device=TWO)
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    devices.update(own.frontend.service.engine.devices)
    assert until(lambda: state(channel) == States.NOT_SERVING)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Select(request(FAR))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert detail(rpc_status.from_call(caught.value), error_details_pb2.ErrorInfo).reason == "DEVICE_LOST"
    devices.pop()
    assert until(lambda: state(channel) == States.SERVING)
    assert stub.Select(request()).HasField("indices")
    free(own)


def test_what_waits_when_all_are_lost_is_taken_and_fails(broken):
    """Not only when it is refused as too late: whichever takes it finds out."""
    first, second = Engine(Settings(device=TWO)).devices
    waits = job(1)
    first.lose()
    assert [each.may_take(waits) for each in (first, second)] == [False, True]
    second.lose()
    assert [each.may_take(waits) for each in (first, second)] == [True, True]
    first.probe()
    assert [each.may_take(waits) for each in (first, second)] == [True, False]


def test_who_watches_is_told_of_devices_that_hang(serve, broken, caplog):
    """Nobody asks meanwhile; one that hangs beside one that works is no news."""
    devices, hang = broken
    own, channel = serve(device=TWO)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert next(watch).status == States.SERVING
    hang.clear()
    first, second = own.health.watched
    devices.add(first.device)
    assert until(lambda: first.silent)
    gauge = own.frontend.metrics.registry.get_sample_value
    assert own.health.ready
    assert not first.ready()
    assert until(lambda: "cpu does not answer" in [each.getMessage() for each in caplog.records])
    devices.add(second.device)
    assert next(watch).status == States.NOT_SERVING
    assert gauge("queryselect_device_ready", {"device": "cpu"}) == 0
    devices.clear()
    hang.set()
    assert next(watch).status == States.SERVING
    watch.cancel()
