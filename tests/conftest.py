"""What every test may ask for: a server on a free port of the loopback, clients to it and to this process, processes
with slices of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from queryselect import Client
from queryselect_service import server
from queryselect_service import strategy as strategies
from queryselect_service.settings import Settings
from tests.slices import Processes

pytest.register_assert_rewrite("tests.client.streams", "tests.service.streams")


@pytest.fixture(scope="session")
def running() -> Iterator[server.Server]:
    """One server for the whole session: a test that hurts it shows in the tests after it."""
    started = server.start(Settings(port=0, metrics_port=0))
    yield started
    started.drain(1.0)


@pytest.fixture(scope="session")
def target(running: server.Server) -> str:
    return f"127.0.0.1:{running.port}"


@pytest.fixture(scope="session")
def remote(target: str) -> Iterator[Client]:
    with Client(target) as client:
        yield client


@pytest.fixture(scope="session")
def local() -> Iterator[Client]:
    with Client("local:") as client:
        yield client


@pytest.fixture(scope="session")
def slices() -> Iterator[Processes]:
    """Three processes for the whole session, started by the first work they get."""
    strategies.load()
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture
def channel(target: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(target) as channel:
        yield channel
