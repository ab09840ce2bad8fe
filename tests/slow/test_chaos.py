"""Clients and servers that die in each phase, connections that are slow, silent or cut, and servers that are stopped.

After each of them the server holds nothing, and serves the next.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.machine import Usage
from queryselect import Aborted, Cancelled, Client, Custom, Unavailable
from tests.slow.caller import PHASES, pool
from tests.slow.proxy import DOWN, UP, Proxy
from tests.slow.servers import Served, served, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
SERVICE = "queryselect.v1.SelectionService"
SMALL = np.random.default_rng(1).normal(size=(2000, 64)).astype(np.float32)
LARGE = np.random.default_rng(2).normal(size=(30_000, 64)).astype(np.float32)
MIB = 1 << 20
#: By how the client sends it: selections that take a moment, and of which much comes back.
WAYS = {
    "unary": {"strategy": "k_center_greedy", "budget": 800, "embeddings": LARGE[:15_000]},
    "stream": {"strategy": "k_center_greedy", "budget": 400, "embeddings": LARGE},
}
ANSWERS = {
    "unary": {"strategy": "random", "budget": 5, "num_rows": 400_000, "return_pool_scores": True},
    "stream": {"strategy": "random", "budget": 5, "num_rows": 3_000_000, "return_pool_scores": True},
}
#: A selection that takes an hour.
ENDLESS = {"strategy": Custom(name="sleepy", parameters={"seconds": 3600}), "budget": 1, "num_rows": 5}
#: The most that a server's memory may be over what it was, in MB. A pool of those who are killed has 56; of one message
#: gRPC's allocator may keep as much for the next.
LEFT, MESSAGE = 25, 56


@pytest.fixture(scope="module")
def known() -> dict[str, list[int]]:
    """What is chosen where nothing goes wrong."""
    with Client("local:") as client:
        small = client.select("k_center_greedy", 5, embeddings=SMALL)
        found = {"small": small, **{way: client.select(**options) for way, options in WAYS.items()}}
        found |= {f"{way} answer": client.select(**options) for way, options in ANSWERS.items()}
    return {name: picks.indices.tolist() for name, picks in found.items()}


@pytest.fixture(scope="module")
def server(known) -> Iterator[Served]:
    """A server that has seen everything once."""
    with served() as server:
        with Client(server.target) as client:
            client.select("k_center_greedy", 5, embeddings=pool())
            client.select(**ANSWERS["stream"])
        assert_serves(server, known)
        yield server
        assert server.log == "", "whatever its clients do is no bug of the server"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    """A server that waits a second for those who say nothing or take nothing."""
    with served("--idle-stream", "1") as server:
        yield server
        assert server.log == ""


@pytest.fixture
def proxy(server) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


def assert_serves(server: Served, known: dict[str, list[int]]) -> None:
    with Client(server.target, timeout=20) as client:
        assert client.select("k_center_greedy", 5, embeddings=SMALL).indices.tolist() == known["small"]


def idles(server: Served) -> bool:
    """Whether no thread of it computes."""
    usage = Usage(server.pid)
    time.sleep(0.2)
    return usage.cpu < 0.05


@contextmanager
def at_work(server: Served) -> Iterator[None]:
    """Its device is busy for somebody else."""
    with Client(server.target) as client:
        job = client.submit(**ENDLESS)
        wait_for(lambda: server.held == (1, 0))
        yield
        job.cancel()
    server.until_free()


# Clients that die


@contextmanager
def calling(server: Served, phase: str) -> Iterator[subprocess.Popen[str]]:
    """A client's process that has come to that phase, and stays there."""
    command = [sys.executable, "-m", "tests.slow.caller", server.target, phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        try:
            assert caller.stdout.readline() == "here\n"
            yield caller
        finally:
            caller.kill()


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_is_killed_leaves_nothing_behind(server, known, phase):
    usage, threads, files = Usage(server.pid), server.threads, server.files
    cancelled = server.ended("SelectStream", "CANCELLED")
    with at_work(server) if phase == "queue" else nullcontext():
        others = server.held[0]
        with calling(server, phase) as caller:
            if phase not in {"connected", "opened"}:
                wait_for(lambda: server.held[0] == others + 1)
            caller.kill()
            wait_for(lambda: server.held == (others, 0), 5)
            wait_for(lambda: server.files <= files + 2 * others, 5)
    if phase not in {"connected", "unary kernel"}:
        wait_for(lambda: server.ended("SelectStream", "CANCELLED") == cancelled + 1, 5)
    wait_for(lambda: idles(server), 5)
    server.trim()
    left = LEFT + (MESSAGE if phase == "unary kernel" else 0)
    wait_for(lambda: usage.now < left, 5)
    wait_for(lambda: server.threads <= threads + 4, 5)
    assert_serves(server, known)


# Connections that are slow, silent or cut


@pytest.mark.parametrize("way", WAYS)
def test_delays_change_no_pick(server, proxy, known, way):
    proxy.delay = 0.01
    with Client(proxy.target) as client:
        assert client.select(**WAYS[way]).indices.tolist() == known[way]
    assert min(proxy.passed.values()) > 0


def cut_during(server: Served, proxy: Proxy, way: str, phase: str, reset: bool) -> None:
    """Cuts the connection once the selection that has just begun through the proxy has come to that phase."""
    if phase in {"upload", "download"}:
        return  # by the number of bytes, see above
    held = {"queue": (2, 1), "kernel": (1, 0)}[phase]
    wait_for(lambda: server.held == held)
    if way == "stream" and phase == "kernel":
        wait_for(lambda: proxy.passed[UP] > LARGE.nbytes)
    assert proxy.cut(reset=reset) == 1


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "end"])
@pytest.mark.parametrize("phase", ["upload", "queue", "kernel", "download"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("retries", [0, 3])
def test_a_cut_is_unavailable_and_another_try_succeeds(server, proxy, known, way, phase, reset, retries):
    options, expected = WAYS[way], known[way]
    if phase == "download":
        options, expected = ANSWERS[way], known[f"{way} answer"]
    with Client(proxy.target, retries=retries) as client:
        client.strategies()
        with at_work(server) if phase == "queue" else nullcontext():
            if phase == "upload":
                proxy.cut_after(UP, 2 * MIB, reset=reset)
            if phase == "download":
                proxy.cut_after(DOWN, MIB, reset=reset)
            job = client.submit(**options)
            cut_during(server, proxy, way, phase, reset)
        if retries:
            assert job.result(30).indices.tolist() == expected
        else:
            with pytest.raises(Unavailable):
                job.result(30)
    server.until_free()
    assert_serves(server, known)


def test_a_throttled_upload_is_served(impatient, known):
    """It takes longer than a stream may be silent."""
    with Proxy(impatient.port) as proxy, Client(proxy.target, retries=0) as client:
        proxy.rate = LARGE.nbytes / 3
        began = time.monotonic()
        assert client.select(**WAYS["stream"]).indices.tolist() == known["stream"]
    assert time.monotonic() - began > 2


def test_an_upload_that_stalls_is_aborted(impatient, known):
    with Proxy(impatient.port) as proxy, Client(proxy.target, retries=0) as client:
        proxy.rate = LARGE.nbytes / 3
        job = client.submit(**WAYS["stream"])
        wait_for(lambda: proxy.passed[UP] > MIB)
        proxy.stall(UP)
        with pytest.raises(Aborted, match="silent for 1 s"):
            job.result(10)
        impatient.until_free()
        proxy.let_through()  # or the client would wait for its connection when it is closed
    assert_serves(impatient, known)


def test_a_download_that_stalls_frees_the_server(impatient, known):
    with Proxy(impatient.port) as proxy, Client(proxy.target, retries=0) as client:
        proxy.rate = 20 * MIB
        job = client.submit(**ANSWERS["stream"])
        wait_for(lambda: proxy.passed[DOWN] > 2 * MIB)
        proxy.stall(DOWN)
        assert impatient.held == (1, 0)
        impatient.until_free(20)  # gRPC lets go of a message only when the connection's own timeout of 10 s has passed
        assert_serves(impatient, known)
        proxy.let_through()
        with pytest.raises((Cancelled, Unavailable)):
            job.result(10)


def test_a_network_that_comes_back_is_used_again(server, proxy, known):
    with Client(proxy.target, retries=8) as client:
        client.strategies()
        job = client.submit(**WAYS["stream"])
        wait_for(lambda: server.held[0] == 1)
        proxy.refuse()
        server.until_free()
        assert not job.done()
        proxy.let_through()
        assert job.result(60).indices.tolist() == known["stream"]


def test_connections_that_are_cut_at_random_leave_nothing_behind(server, known):
    """Forty of them, by four threads; some get their answer."""
    threads, files, rng = server.threads, server.files, np.random.default_rng(0)
    moments = [(str(rng.choice([UP, DOWN])), int(2 ** rng.uniform(6, 23)), bool(rng.integers(2))) for _ in range(40)]

    def one(number: int) -> str:
        way, nbytes, reset = moments[number]
        options = [*WAYS.values(), *ANSWERS.values()][number % 4]
        with Proxy(server.port) as proxy, Client(proxy.target, retries=0, timeout=30) as client:
            proxy.cut_after(way, nbytes, reset=reset)
            try:
                client.select(**options)
            except Unavailable:
                return "cut"
        return "served"

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(one, range(40))) == {"cut", "served"}
    server.until_free()
    wait_for(lambda: server.files <= files + 2)
    wait_for(lambda: server.threads <= threads + 6)
    wait_for(lambda: idles(server), 5)
    assert_serves(server, known)


# Servers that die, and servers that are stopped


def test_a_server_that_is_killed_is_unavailable_at_once():
    with served() as server, Client(server.target, retries=0) as client:
        job = client.submit(**ENDLESS)
        wait_for(lambda: server.held == (1, 0))
        server.process.kill()
        with pytest.raises(Unavailable):
            job.result(5)


@pytest.mark.parametrize("way", WAYS)
def test_a_client_finds_the_server_that_takes_the_place_of_a_killed_one(known, way):
    with served() as server, Client(server.target, retries=9) as client:
        client.strategies()
        job = client.submit(**WAYS[way])
        wait_for(lambda: server.held == (1, 0))
        server.process.kill()
        server.process.wait()
        with served("--port", str(server.port)):
            assert job.result(60).indices.tolist() == known[way]


def health(server: Served, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
    with grpc.insecure_channel(server.target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


def test_a_server_that_is_stopped_ends_what_runs_and_takes_nothing_new():
    """As an orchestrator stops it: by SIGTERM."""
    states = health_pb2.HealthCheckResponse
    with served() as server, Client(server.target) as client:
        sleepy = Custom(name="sleepy", parameters={"seconds": 3})
        job = client.submit(sleepy, 2, num_rows=5)
        wait_for(lambda: server.held == (1, 0))
        assert health(server, SERVICE) == states.SERVING
        server.process.terminate()
        wait_for(lambda: health(server, SERVICE) == states.NOT_SERVING, 2)
        with Client(server.target, retries=0) as other, pytest.raises(Unavailable, match="stopping"):
            other.select("random", 1, num_rows=5)
        assert not job.done()
        assert job.result(20).indices.tolist() == [0, 1]
        assert server.process.wait(10) == 0
        assert server.log == ""


def test_a_server_does_not_wait_longer_than_its_grace():
    with served("--drain-grace", "1") as server, Client(server.target, retries=0) as client:
        job = client.submit(**ENDLESS)
        wait_for(lambda: server.held == (1, 0))
        server.process.terminate()
        with pytest.raises((Unavailable, Cancelled)):
            job.result(10)
        assert server.process.wait(10) == 0
