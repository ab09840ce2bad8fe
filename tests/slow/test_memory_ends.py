"""A server whose memory really ends, though admission thinks that there is room: who asks is told, and it lives on."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from queryselect import Busy, Client, Custom
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2, tensor_pb2
from tests.slow.servers import Served, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
MIB = 1 << 20
SMALL = np.random.default_rng(1).normal(size=(2000, 64)).astype(np.float32)
POOL = np.random.default_rng(0).random((200_000, 200), np.float32)  # 160 MB
#: Address space that is left: more than gRPC takes for a stream and a thread for its stack, less than any of TOO_MUCH.
LITTLE = 80 * MIB
#: What needs more than that: a buffer of numpy's, tensors of torch's, and an answer.
TOO_MUCH = {
    "an upload": {"strategy": "k_center_greedy", "embeddings": POOL},
    "a kernel": {"strategy": "random", "num_rows": 20_000_000},
    "scores of rows as they come": {"strategy": "margin", "logits": np.zeros((12_000_000, 2), np.float16)},
    "an answer": {"strategy": "random", "num_rows": 8_000_000, "return_pool_scores": True},
}


def address_space(server: Served) -> int:
    """Bytes."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:"))


@contextmanager
def only(server: Served, nbytes: int) -> Iterator[None]:
    """Its process can have so many bytes more than it has, and no more."""
    server.trim()  # what is free at the end of its heap would do as well
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(server.pid, resource.RLIMIT_AS, (address_space(server) + nbytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        if server.process.poll() is None:
            resource.prlimit(server.pid, resource.RLIMIT_AS, unlimited)


@contextmanager
def warm() -> Iterator[Served]:
    """A server that has seen what libraries take once."""
    with served() as server:
        with Client(server.target) as client:
            for strategy in ("k_center_greedy", "margin", "random"):
                client.select(strategy, 5, embeddings=POOL[:10_000], logits=POOL[:10_000])
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with warm() as server:
        yield server


@pytest.fixture
def own() -> Iterator[Served]:
    """A server for one test, which may be its end."""
    with warm() as server:
        yield server


def assert_serves(server: Served) -> None:
    with Client("local:") as local, Client(server.target, retries=0, timeout=20) as client:
        found, expected = (each.select("k_center_greedy", 5, embeddings=SMALL).indices for each in (client, local))
        assert found.tolist() == expected.tolist()
    server.until_free()


@pytest.mark.parametrize("options", TOO_MUCH.values(), ids=TOO_MUCH)
def test_who_needs_more_than_there_is_may_come_again(server, options):
    with Client(server.target, retries=0, timeout=30) as client:
        with only(server, LITTLE), pytest.raises(Busy) as caught:
            client.select(budget=5, **options)
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert caught.value.retry_after > 0
    assert_serves(server)
    assert "bug" not in server.log


def test_many_callers_at_a_time_need_no_thread_that_is_not_there(own):
    """A thread needs 8 MB of address space for its stack, and there is room for a few of thirty."""
    sleepy = Custom(name="sleepy", parameters={"seconds": 0.1})
    clients = [Client(own.target, retries=0, timeout=20) for _ in range(30)]
    for client in clients:
        client.strategies()
    with only(own, 60 * MIB), ThreadPoolExecutor(30) as pool:
        picks = list(pool.map(lambda client: client.select(sleepy, 5, num_rows=5), clients))
    for client in clients:
        client.close()
    assert {len(each) for each in picks} == {5}
    assert_serves(own)
    assert "bug" not in own.log


@pytest.mark.parametrize("megabytes", [30, 120])
def test_a_server_that_cannot_go_on_ends(own, megabytes):
    """gRPC itself may have no memory for a message: its thread dies, or its core aborts. Nobody waits for an answer.

    A server that still listens and never answers would be worse than none: nothing would start another.
    """
    request = selection_pb2.SelectRequest(strategy=strategy_pb2.Strategy(k_center_greedy={}), stop={"max_items": 5})
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=(70_000, 200), data=POOL[:70_000].tobytes())
    request.pool.embeddings.CopyFrom(tensor)
    with grpc.insecure_channel(own.target) as channel, only(own, megabytes * MIB):
        stub = selection_pb2_grpc.SelectionServiceStub(channel)
        try:
            stub.Select(request, timeout=20)
        except grpc.RpcError as error:
            assert error.code() in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
    if own.process.poll() is None:
        assert_serves(own)
    else:
        assert own.process.poll() != 0
