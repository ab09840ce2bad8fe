"""A server in a process of its own for tests that take long, and how soon it lets go of what nobody wants."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.loopback import process
from benchmarks.machine import in_flight
from benchmarks.transport import QUIETLY
from queryselect import Cancelled, Client


@contextmanager
def quiet_server() -> Iterator[tuple[int, int, Client]]:
    """Its process, the port of its metrics, and a client of it."""
    with (
        process("-m", "queryselect_service", *QUIETLY) as (pid, (port, metrics)),
        Client(f"127.0.0.1:{port}") as client,
    ):
        yield pid, metrics, client


def assert_stops_at_once(job, metrics) -> None:
    """Cancels a job: within a quarter of a second nothing is in flight."""
    cancelled = time.monotonic()
    job.cancel()
    while in_flight(metrics):
        assert time.monotonic() - cancelled < 0.25
        time.sleep(0.002)
    with pytest.raises(Cancelled):
        job.result(5)
