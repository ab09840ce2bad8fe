"""Many who watch a server's health, who come, leave and do not read: nobody else waits for them."""

from __future__ import annotations

import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from queryselect_service import health as module
from queryselect_service.health import TELLING, Health
from queryselect_service.patience import Patience
from tests.waiting import until

States = health_pb2.HealthCheckResponse
SERVICE = "queryselect.v1.SelectionService"


class Visitor:
    """A call that watches, without gRPC. reads: set where it takes what it is sent."""

    def __init__(self, health: Health, service: str = SERVICE, *, here: bool = True) -> None:
        self.told: list[int] = []
        self.reads, self.ended, self._here = threading.Event(), False, here
        self.reads.set()
        self.leave = lambda: None
        health.Watch(health_pb2.HealthCheckRequest(service=service), self, send_response_callback=self._sent)

    def add_callback(self, leave) -> bool:
        self.leave = leave
        return self._here

    def cancel(self) -> None:
        self.ended = True
        self.reads.set()

    def _sent(self, answer: health_pb2.HealthCheckResponse) -> None:
        self.told.append(answer.status)
        self.reads.wait(20)


@pytest.fixture
def health():
    patience = Patience()
    made = Health(patience)
    yield made
    made.close()
    patience.close()


def test_those_who_watch_may_come_and_go_at_once(serve):
    """gRPC's one thread, which tells who left, never waits for one that sends."""
    own, channel = serve()
    watched, lost = [0], []

    def come_and_go() -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{own.port}", options) as mine:
            for _ in range(50):
                watch = health_pb2_grpc.HealthStub(mine).Watch(
                    health_pb2.HealthCheckRequest(service=SERVICE), timeout=20
                )
                try:
                    next(watch)
                except grpc.RpcError as error:
                    lost.append(error.code())
                    return
                watch.cancel()
                watched[0] += 1

    threads = [threading.Thread(target=come_and_go) for _ in range(8)]
    for each in threads:
        each.start()
    for number in range(20):
        own.health.set(SERVICE, States.NOT_SERVING if number % 2 else States.SERVING)
    for each in threads:
        each.join(60)
    assert not lost
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == States.SERVING
    assert until(lambda: not own.health._watchers)


def test_who_does_not_read_keeps_nobody_waiting(health, monkeypatch):
    monkeypatch.setattr(module, "READING", 60)
    health.set(SERVICE, States.SERVING)
    stuck, other = Visitor(health), Visitor(health)
    assert until(lambda: stuck.told == other.told == [States.SERVING])
    stuck.reads.clear()
    health.set(SERVICE, States.NOT_SERVING)
    assert until(lambda: other.told == [States.SERVING, States.NOT_SERVING])
    health.set(SERVICE, States.SERVING)
    health.set(SERVICE, States.NOT_SERVING)
    health.set(SERVICE, States.SERVING)
    assert until(lambda: other.told[-1] == States.SERVING)
    assert until(lambda: len(stuck.told) == 2)
    late = Visitor(health)
    assert until(lambda: late.told == [States.SERVING])
    stuck.reads.set()  # and is told what is so now, not all that was
    assert until(lambda: stuck.told == [States.SERVING, States.NOT_SERVING, States.SERVING])


def test_more_who_do_not_read_than_threads_keep_no_check_waiting(health, monkeypatch):
    monkeypatch.setattr(module, "READING", 60)
    stuck = [Visitor(health, "") for _ in range(TELLING + 2)]
    assert until(lambda: all(each.told for each in stuck))
    for each in stuck:
        each.reads.clear()
    health.enter_graceful_shutdown()
    assert health.Check(health_pb2.HealthCheckRequest(service=""), None).status == States.NOT_SERVING
    health.set("", States.SERVING)  # nothing is, from then on
    for each in stuck:
        each.reads.set()
    assert until(lambda: all(each.told == [States.SERVING, States.NOT_SERVING] for each in stuck))


def test_who_has_left_is_told_nothing_and_forgotten(health):
    left, never = Visitor(health, "other"), Visitor(health, here=False)
    assert until(lambda: left.told == [States.SERVICE_UNKNOWN])
    left.leave()
    health.set("other", States.SERVING)
    assert until(lambda: not health._watchers)
    assert len(left.told) == 1
    assert not never.told


def test_the_call_of_who_does_not_read_ends(health, monkeypatch):
    monkeypatch.setattr(module, "READING", 0.1)
    stuck = [Visitor(health, "") for _ in range(TELLING)]
    assert until(lambda: all(each.told for each in stuck))
    for each in stuck:
        each.reads.clear()
    health.set("", States.NOT_SERVING)
    late = Visitor(health, "")
    assert until(lambda: all(each.ended for each in stuck))
    assert until(lambda: late.told == [States.NOT_SERVING])
    assert not late.ended
