"""Several servers behind one name, and servers that come and go: the client finds those that are ready."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, suppress

import grpc
import numpy as np
import pytest

from queryselect import Client, Custom, QuerySelectError, Unavailable
from queryselect._transport import UNARY_BYTES
from queryselect_service import health, server
from queryselect_service.settings import Settings
from tests import plugins
from tests.waiting import until

P = np.random.default_rng(0).dirichlet(np.ones(4), 20)
LARGE = 20 * (UNARY_BYTES // P.nbytes + 1)


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


def test_where_none_is_ready_one_says_why(begin, monkeypatch):
    """And what it is can still be asked."""
    (one, _), (two, _) = begin(), begin()
    with Client(together(one, two), retries=0) as client:
        ask(client, 2)
        for each in (one, two):
            each.health.enter_graceful_shutdown()
        monkeypatch.setattr(one.frontend, "_draining", True)
        monkeypatch.setattr(two.frontend, "_draining", True)
        for size in (20, LARGE):  # in one message, and in a stream
            told: list[QuerySelectError] = []

            def refused(size=size, told=told):
                with pytest.raises(Unavailable) as caught:
                    client.select("margin", 2, probabilities=np.tile(P, (size // 20, 1)))
                told.append(caught.value)
                return len(told) == 5

            assert until(refused)
            assert {str(each) for each in told} == {"this server is stopping; try another"}
        monkeypatch.setattr(one.frontend, "_draining", False)
        monkeypatch.setattr(two.frontend, "_draining", False)
        assert client.server_info().version
        assert client.strategies()


def test_a_proxy_that_lets_no_stranger_ask_for_health_does_not_keep_clients_away(begin, monkeypatch):
    """Health's question carries no token."""

    def refuse(_self, _request, context, _send):
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

    monkeypatch.setattr(health.DeviceHealth, "Watch", refuse)
    own, peers = begin()
    with Client(f"127.0.0.1:{own.port}", retries=0) as client:
        ask(client, 3)
    assert len(peers) == 4  # and strategies once


def test_one_that_comes_back_is_found_soon():
    """A channel tries to connect by itself while nobody asks; at gRPC's own pace it would be up to two minutes late."""
    tries = []
    with socket.create_server(("127.0.0.1", 0)) as door:

        def shut() -> None:
            with suppress(OSError):
                while True:
                    visitor, _ = door.accept()
                    tries.append(time.monotonic())
                    visitor.close()

        thread = threading.Thread(target=shut, daemon=True)
        thread.start()
        with Client(f"127.0.0.1:{door.getsockname()[1]}", retries=0) as client:
            with pytest.raises(Unavailable):
                client.server_info()
            assert until(lambda: len(tries) >= 6, 8)
        door.shutdown(socket.SHUT_RDWR)
        thread.join(5)
