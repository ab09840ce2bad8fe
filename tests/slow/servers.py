"""A server in a process of its own for tests that take long, and how soon it lets go of what nobody wants."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import grpc
import pytest

from benchmarks.machine import MB, in_flight, metrics
from benchmarks.service.loopback import QUIETLY, process
from queryselect import Cancelled, Client
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2, tensor_pb2
from tests.waiting import until

#: See there.
PLUGGED = ("-m", "tests.slow.plugged")


@contextmanager
def quiet_server() -> Iterator[tuple[int, int, Client]]:
    """Its process, the port of its metrics, and a client of it."""
    with (
        process("-m", "queryselect_service", *QUIETLY) as (pid, (port, metrics)),
        Client(f"127.0.0.1:{port}") as client,
    ):
        yield pid, metrics, client


def assert_goes_at_once(job, metrics) -> None:
    """Cancels a job, which may be about to end by itself: within a quarter of a second nothing is in flight."""
    cancelled = time.monotonic()
    job.cancel()
    while in_flight(metrics):
        assert time.monotonic() - cancelled < 0.25
        time.sleep(0.002)


def assert_stops_at_once(job, metrics) -> None:
    """Cancels a job: within a quarter of a second nothing is in flight."""
    assert_goes_at_once(job, metrics)
    with pytest.raises(Cancelled):
        job.result(5)


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Waits until the condition holds; how many seconds that took."""
    began = time.monotonic()
    assert until(condition, seconds), f"not within {seconds:g} s"
    return time.monotonic() - began


class Served:
    """A server in a process of its own that may be hurt, and what it holds."""

    def __init__(self, running: subprocess.Popen[str], log: IO[str]) -> None:
        self.process, self.pid, self._log = running, running.pid, log
        self.port, self.metrics_port = map(int, re.findall(r"\d+", running.stdout.readline().partition(":")[2]))
        self.target = f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has logged so far: warnings and worse."""
        self._log.seek(0)
        return self._log.read()

    @property
    def held(self) -> tuple[int, int]:
        """Selections that it holds something for, and how many of them are ready and wait for the device."""
        now = metrics(self.metrics_port)
        return int(now["queryselect_in_flight"]), int(now["queryselect_queue_depth"])

    @property
    def threads(self) -> int:
        """The threads of its process."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    @property
    def files(self) -> int:
        """The files and connections that its process has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def living(self) -> tuple[float, int]:
        """What lives in its memory: MB in glibc's heaps, and blocks in Python's own. What is free does not count."""
        self.process.send_signal(signal.SIGUSR1)
        nbytes, blocks = map(int, self.process.stdout.readline().split())
        return nbytes / MB, blocks

    def ended(self, rpc: str, code: str) -> int:
        """How many RPCs of a kind have ended with that code."""
        counts = metrics(self.metrics_port).items()
        start, end = f'queryselect_requests_total{{code="{code}",rpc="{rpc}"', "}"
        return int(sum(count for name, count in counts if name.startswith(start) and name.endswith(end)))

    def trim(self) -> None:
        """Has it give back what it has freed, as it does after a large request: this is one whose bytes never come."""
        start = selection_pb2.SelectRequest(
            strategy=strategy_pb2.Strategy(k_center_greedy={}),
            pool={"embeddings": {"dtype": tensor_pb2.DATA_TYPE_F32, "shape": (200_000, 128), "streamed": {}}},
            stop={"max_items": 5},
        )
        with grpc.insecure_channel(self.target) as channel:
            stub = selection_pb2_grpc.SelectionServiceStub(channel)
            answers = stub.SelectStream(iter([selection_pb2.SelectStreamRequest(start=start)]), timeout=30)
            with pytest.raises(grpc.RpcError) as caught:
                list(answers)
            assert caught.value.code() is grpc.StatusCode.DATA_LOSS

    def until_free(self, seconds: float = 5.0) -> float:
        """Waits until nothing is in flight and nothing waits for the device; how many seconds that took."""
        return wait_for(lambda: self.held == (0, 0), seconds)


@contextmanager
def served(*flags: str, **variables: str) -> Iterator[Served]:
    """A server of its own flags, and variables beside this process's own.

    In the end it is killed if it lives, and what it logged is printed.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, *PLUGGED, *QUIETLY, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **variables},
        ) as running,
    ):
        try:
            yield Served(running, log)
        finally:
            running.kill()
            log.seek(0)
            sys.stderr.write(log.read())
