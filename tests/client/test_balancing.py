"""Several servers behind one name, and servers that come and go: the client finds those that are ready."""

from __future__ import annotations

import time
from contextlib import ExitStack

import numpy as np
import pytest

from queryselect import Client, Custom
from queryselect_service import server
from queryselect_service.settings import Settings
from tests import plugins
from tests.waiting import until

P = np.random.default_rng(0).dirichlet(np.ones(4), 20)


@pytest.fixture
def begin():
    """Starts servers, each with the connections that asked it for something."""
    with ExitStack() as stack:

        def one(**options) -> tuple[server.Server, list[str]]:
            started, peers = server.start(Settings(**{"port": 0, "metrics_port": -1, **options})), []
            stack.callback(started.drain, 0.1)
            caller = started.frontend.caller

            def noted(context):
                peers.append(context.peer())
                return caller(context)

            started.frontend.caller = noted
            return started, peers

        yield one


def together(*servers: server.Server) -> str:
    """What the name of a headless Service becomes."""
    return "ipv4:" + ",".join(f"127.0.0.1:{each.port}" for each in servers)


def ask(client: Client, times: int) -> None:
    for _ in range(times):
        assert len(client.select("margin", 2, probabilities=P)) == 2


def test_servers_have_requests_in_turn(begin):
    (one, ours), (two, theirs) = begin(), begin()
    with Client(together(one, two), retries=0) as client:
        assert until(lambda: ask(client, 1) or (ours and theirs))
        ours.clear(), theirs.clear()
        ask(client, 20)
    assert abs(len(ours) - len(theirs)) <= 2  # a picker made anew begins anywhere


def test_a_server_that_is_about_to_go_is_left_before_it_refuses(begin):
    (one, ours), (two, theirs) = begin(), begin()
    with Client(together(one, two), retries=0) as client:
        assert until(lambda: ask(client, 1) or (ours and theirs))
        one.health.enter_graceful_shutdown()

        def left():
            ours.clear()
            ask(client, 4)
            return not ours

        assert until(left)
        one.drain(5)
        ask(client, 10)
    assert not ours


def test_so_is_one_that_is_gone_and_one_that_comes_back_is_found(begin):
    (one, _), (two, theirs) = begin(), begin()
    with Client(together(one, two)) as client:
        ask(client, 4)
        one.drain(0)
        theirs.clear()
        ask(client, 10)
        assert len(theirs) == 10
        _, again = begin(port=one.port)
        assert until(lambda: ask(client, 2) or again, 60)


def test_a_connection_takes_no_more_after_its_time_and_no_request_is_lost(begin):
    own, peers = begin(max_connection_age=0.2)
    with Client(f"127.0.0.1:{own.port}", retries=0) as client:
        until_then = time.monotonic() + 1.5
        while time.monotonic() < until_then:
            ask(client, 1)
    assert len(set(peers)) > 2


def test_what_runs_then_goes_on(begin):
    own, peers = begin(max_connection_age=0.1)
    with Client(f"127.0.0.1:{own.port}", retries=0) as client:
        assert len(client.select(Custom(name=plugins.sleepy.__name__, parameters={"seconds": 0.5}), 2, num_rows=5)) == 2
    assert len(set(peers)) == 1


def test_without_a_limit_a_connection_stays(begin):
    own, peers = begin()
    with Client(f"127.0.0.1:{own.port}") as client:
        ask(client, 30)
    assert len(set(peers)) == 1
