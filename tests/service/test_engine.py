"""The engine behind a real server: whose turn it is, what is counted, and what never waits."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.machine import metrics
from queryselect import Busy, Cancelled, Client, DeadlineExceeded, InvalidInput, ServerBug, TooLarge
from queryselect.v1 import selection_pb2_grpc, server_pb2, server_pb2_grpc, strategy_pb2, strategy_pb2_grpc
from queryselect_service import server, upload
from queryselect_service.settings import Settings
from queryselect_service.spec import Spec
from queryselect_service.strategy import PLUGINS, ScoreKind, strategy
from tests import plugins
from tests.waiting import until

POOL = np.random.default_rng(0).normal(size=(20_000, 20))  # some tenths of a second of k_center_greedy


@contextmanager
def serving(**settings) -> Iterator[tuple[server.Server, Client]]:
    started = server.start(Settings(port=0, metrics_port=0, **settings))
    try:
        with Client(f"127.0.0.1:{started.port}", retries=0) as client:
            client.strategies()
            yield started, client
    finally:
        started.drain(0.1)


def busy_device(client: Client, seconds: float):
    """A selection that has the device for so long; returns once it runs."""
    plugins.last_seen["at"] = 0.0
    job = client.submit("custom", 1, num_rows=3, params={"name": "sleepy", "parameters": {"seconds": seconds}})
    assert until(lambda: plugins.last_seen["at"], 10)
    return job


def ended(jobs: dict[str, object]) -> list[str]:
    """The names of jobs in the order in which they end."""
    names, lock = [], threading.Lock()

    def wait(name, job):
        job.result(30)
        with lock:
            names.append(name)

    threads = [threading.Thread(target=wait, args=each) for each in jobs.items()]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    return names


def gauges(started: server.Server) -> dict[str, float]:
    return metrics(started.metrics_port)


def submit_in_turn(client: Client) -> dict[str, object]:
    """A large selection, then a small one, both waiting for the device."""
    jobs = {"large": client.submit("k_center_greedy", 300, embeddings=POOL)}
    time.sleep(0.2)
    parameters = {"name": "sleepy", "parameters": {"seconds": 0.2}}
    jobs["small"] = client.submit("custom", 1, num_rows=3, params=parameters)
    time.sleep(0.2)
    return jobs


def test_the_shortest_selection_goes_first():
    with serving() as (_, client):
        running = busy_device(client, 1.0)
        assert ended(submit_in_turn(client)) == ["small", "large"]
        running.result(5)


def test_nobody_overtakes_who_has_waited_long():
    with serving(queue_ageing=0.1) as (_, client):
        running = busy_device(client, 1.0)
        assert ended(submit_in_turn(client)) == ["large", "small"]
        running.result(5)


def test_gauges_count_what_is_admitted_and_what_waits():
    with serving() as (started, client):
        assert gauges(started)["queryselect_in_flight"] == gauges(started)["queryselect_queue_depth"] == 0
        running = busy_device(client, 1.0)
        waiting = [client.submit("random", 1, num_rows=5) for _ in range(2)]
        time.sleep(0.3)
        assert gauges(started)["queryselect_in_flight"] == 3
        assert gauges(started)["queryselect_queue_depth"] == 2
        for each in (running, *waiting):
            each.result(5)
        assert gauges(started)["queryselect_in_flight"] == gauges(started)["queryselect_queue_depth"] == 0


def test_health_and_descriptions_never_wait():
    """Though as many selections wait as may, and streams stand open that say nothing."""
    with serving(max_queue=12, max_streams_per_peer=100) as (started, client):
        running = busy_device(client, 2.5)
        waiting = [client.submit("random", 1, num_rows=5) for _ in range(12)]
        assert until(lambda: started.frontend.service.engine.host.taken == 13)  # before others want the places
        stop = threading.Event()

        def say_nothing():
            stop.wait(20)
            yield from ()

        with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
            stub = selection_pb2_grpc.SelectionServiceStub(channel)
            streams = [stub.SelectStream(say_nothing()) for _ in range(30)]
            time.sleep(0.5)
            health = health_pb2_grpc.HealthStub(channel)
            asked = time.monotonic()
            for name in ("", "queryselect.v1.SelectionService"):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            strategy_pb2_grpc.StrategyServiceStub(channel).ListStrategies(
                strategy_pb2.ListStrategiesRequest(), timeout=5
            )
            server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=5)
            assert time.monotonic() - asked < 1.0
            assert not running.done()
            assert sum(each.done() and each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for each in streams) >= 20
            for each in streams:
                each.cancel()
            stop.set()
        assert all(len(each.result(10)) == 1 for each in (running, *waiting))


def test_no_room_in_the_line_is_busy_and_the_room_comes_back():
    with serving(max_queue=1) as (_, client):
        running = busy_device(client, 0.6)
        waiting = client.submit("random", 1, num_rows=5)
        time.sleep(0.15)
        with pytest.raises(Busy) as caught:
            client.select("random", 1, num_rows=5)
        assert caught.value.retry_after > 0
        running.result(5)
        waiting.result(5)
        assert len(client.select("random", 1, num_rows=5)) == 1


def test_memory_is_set_aside_while_a_selection_waits_and_comes_back():
    with serving(max_host_bytes=1_000_000) as (started, client):
        running = busy_device(client, 0.6)
        waiting = client.submit("random", 1, num_rows=20_000)
        time.sleep(0.15)
        with pytest.raises(Busy, match="bytes are needed"):
            client.select("random", 1, num_rows=20_000)
        running.result(5)
        waiting.result(5)
        assert len(client.select("random", 1, num_rows=20_000)) == 1
        assert started.frontend.service.engine.host.reserved == 0
        with pytest.raises(TooLarge, match=r"random needs about \d+ bytes on cpu, which has 1000000") as caught:
            client.select("random", 1, num_rows=100_000)
        assert caught.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize("end", ["cancelled", "failed", "late"])
def test_memory_is_back_at_once_after_a_selection_that_ended_early(end):
    """Nothing holds on to the tensors: neither the job, nor its exception, nor the thread of the device."""
    seen = {}

    def hoarder(embeddings: Annotated[torch.Tensor, "N D"], *, k, pool):
        mine = embeddings.clone()
        seen["kernel"] = weakref.ref(mine)
        if end == "failed":
            raise RuntimeError("a bug")
        while True:
            pool.check()
            time.sleep(0.005)

    strategy(Spec, kind=ScoreKind.KEY, cost="for ever", citation="none", pool_scores=False)(hoarder)
    gc.disable()  # it would hide a cycle
    try:
        with serving() as (started, client):
            timeout = 0.4 if end == "late" else None
            job = client.submit("custom", 1, embeddings=POOL, params={"name": "hoarder"}, timeout=timeout)
            assert until(lambda: "kernel" in seen)
            if end == "cancelled":
                job.cancel()
            with pytest.raises({"cancelled": Cancelled, "failed": ServerBug, "late": DeadlineExceeded}[end]):
                job.result(5)
            host = started.frontend.service.engine.host
            assert until(lambda: (seen["kernel"](), host.taken, host.reserved) == (None, 0, 0), 0.5)
            assert len(client.select("random", 1, num_rows=5)) == 1
    finally:
        gc.enable()
        del PLUGINS["hoarder"]


@pytest.mark.parametrize("end", ["picks", "failed", "cancelled"])
def test_buffers_of_an_upload_are_freed_at_once(end, monkeypatch):
    buffers, make = [], upload._bytes

    def made(*arguments, **options):
        buffer = make(*arguments, **options)
        buffers.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(upload, "_bytes", made)
    pool = np.random.default_rng(0).normal(size=(100_000, 20))  # 16 MB
    if end == "failed":
        pool[-1, -1] = np.nan
    gc.disable()  # it would hide a cycle
    try:
        with serving() as (started, client):
            job = client.submit("k_center_greedy", 5 if end == "picks" else 2000, embeddings=pool)
            while not buffers:
                time.sleep(0.005)
            time.sleep(0.3)
            if end == "cancelled":
                job.cancel()
            if end == "picks":
                assert len(job.result(20)) == 5
            else:
                with pytest.raises(InvalidInput if end == "failed" else Cancelled):
                    job.result(20)
            host = started.frontend.service.engine.host
            assert until(lambda: not any(each() is not None for each in buffers), 1)
            assert until(lambda: (host.taken, host.reserved) == (0, 0), 1)
    finally:
        gc.enable()


def test_reflection_streams_that_stay_open_leave_threads_for_others():
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with (
        serving(max_queue=2, idle_stream=1.0) as (started, _),
        grpc.insecure_channel(f"127.0.0.1:{started.port}") as own,
    ):
        stop, ask = threading.Event(), reflection_pb2.ServerReflectionRequest(list_services="")

        def questions():
            yield ask
            stop.wait(20)

        stub = reflection_pb2_grpc.ServerReflectionStub(own)
        streams = [stub.ServerReflectionInfo(questions()) for _ in range(30)]
        time.sleep(0.3)
        health = health_pb2_grpc.HealthStub(own).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        began, codes = time.monotonic(), set()
        for each in streams:  # none of them stays for ever
            with pytest.raises(grpc.RpcError) as caught:
                list(each)
            codes.add(caught.value.code())
        assert time.monotonic() - began < 5
        assert codes == {grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        stop.set()
        assert next(stub.ServerReflectionInfo(iter([ask]))).list_services_response.service


def test_a_pool_without_its_excluded_rows_is_made_a_stretch_at_a_time(monkeypatch):
    monkeypatch.setattr("queryselect_service.shards.SPAN_BYTES", 1000)
    with Client("local:") as client:
        excluded = np.arange(0, 20_000, 3)
        few = client.select("k_center_greedy", 5, embeddings=POOL, excluded=excluded)
        kept = np.setdiff1d(np.arange(len(POOL)), excluded)
        assert few.indices.tolist() == kept[client.select("k_center_greedy", 5, embeddings=POOL[kept]).indices].tolist()
