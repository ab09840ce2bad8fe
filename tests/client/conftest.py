"""A plug-in that takes its time, the two ways to a service, a server that records, Ctrl-C; streams leave nothing."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from google.protobuf.message import Message

from queryselect import Client, _upload
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import PLUGINS, ScoreKind, Selection, strategy
from tests.client.fake import Fake
from tests.waiting import until


@dataclass
class Slow:
    """What the slow strategy did: whether it began, and whether it stopped."""

    started: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def slow() -> Iterator[Slow]:
    """A plug-in "slow" that works for 30 s unless it is stopped, checking every 10 ms."""
    seen = Slow()

    @dataclass(frozen=True)
    class SlowSpec(Spec):
        seconds: float = parameter(30.0, "How long it takes", low=0, unit="seconds")

    def slow(*, k, spec, pool):
        seen.started.set()
        until = time.monotonic() + spec.seconds
        try:
            while time.monotonic() < until:
                pool.check()
                time.sleep(0.01)
        finally:
            seen.stopped.set()
        return Selection(torch.arange(k), torch.zeros(k, dtype=torch.float64))

    strategy(SlowSpec, kind=ScoreKind.KEY, cost="30 s", citation="none", pool_scores=False)(slow)
    yield seen
    del PLUGINS["slow"]


@pytest.fixture(params=["local", "remote"])
def client(request: pytest.FixtureRequest) -> Client:
    """A client of this process, and one of a server."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["local:", "server"])
def address(request: pytest.FixtureRequest, target: str) -> str:
    """The target of such a client, for tests that make their own."""
    return target if request.param == "server" else request.param


@pytest.fixture
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However a call ends, its threads end soon after it: those of jobs, and those that draw from an upload."""
    drawing, draw = set[_upload.Upload](), _upload.Upload.__iter__

    def watched(upload: _upload.Upload) -> Iterator[Message]:
        drawing.add(upload)
        try:
            yield from draw(upload)
        finally:  # a thread that lets go of what it draws from comes by here, too
            drawing.discard(upload)

    def jobs() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name == "queryselect-job"}

    before = jobs()
    monkeypatch.setattr(_upload.Upload, "__iter__", watched)
    yield
    assert until(lambda: not drawing and not jobs() - before), (drawing, jobs() - before)


@pytest.fixture
def lists_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of rows are no longer than other arrays where they travel in the start: a mask of N rows does not."""
    monkeypatch.setattr(_upload, "LIST_BYTES", _upload.SMALL_BYTES)


@pytest.fixture
def fake() -> Iterator[Fake]:
    """A server that records what it is sent."""
    with Fake() as fake:
        yield fake


@pytest.fixture
def recorded(fake: Fake) -> Iterator[Client]:
    """A client of `fake`."""
    with Client(fake.target) as client:
        yield client


@pytest.fixture
def control_c() -> Iterator[Callable[[], None]]:
    """What pressing it does, from any thread. A shell lets what it starts in the background ignore it; not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    signal.signal(signal.SIGINT, before)
