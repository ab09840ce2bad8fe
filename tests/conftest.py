"""What every test may ask for: a server on a free port of the loopback, and clients to it and to this process."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from queryselect import Client
from queryselect_service import server
from queryselect_service.settings import Settings


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


@pytest.fixture
def channel(target: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(target) as channel:
        yield channel
