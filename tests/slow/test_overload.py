"""More clients than the server has room for, each a process: what they are told, and how soon health checks are."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.machine import Usage, in_flight
from benchmarks.service import health
from benchmarks.service.crew import Crew
from benchmarks.service.load import NICE
from benchmarks.service.loopback import QUIETLY, process
from benchmarks.service.overload import AT_ONCE, CLIENTS, GUESTS, TIGHT, flaws, right_picks, take_turns, tally, visit
from queryselect import Client
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server():
    """Its process, the port of its metrics, its address, and the picks that are right."""
    with process("-m", "queryselect_service", *TIGHT) as (pid, (port, metrics)):
        target = f"127.0.0.1:{port}"
        yield pid, metrics, target, right_picks(target)


def assert_idle(metrics: int) -> None:
    """Within a few seconds nothing is in flight."""
    assert until(lambda: not in_flight(metrics))


def test_every_answer_is_a_result_or_a_refusal_as_documented_and_health_is_answered_meanwhile(server):
    pid, metrics, target, right = server
    idle, _ = health.beside(target, None, 0, 5)
    work, settled, late = partial(visit, target, right, [*GUESTS], True), [], []
    usage = Usage(pid)
    for _ in range(2):
        checks, found = health.beside(target, work, CLIENTS, 8)
        told = tally(found)
        assert flaws(told) == []
        assert sum(answers.get("result", 0) for answers in told.values()) > 0
        assert told["invalid"]["INVALID_ARGUMENT"] > 0
        assert told["cancelled"]["CANCELLED"] > 0
        assert sum(answers.get("RESOURCE_EXHAUSTED", 0) for answers in told.values()) > 0, "there was room for all"
        assert set(checks.answers) == {"SERVING"}
        assert_idle(metrics)
        late.append(checks.late())
        settled.append(usage.now)
    # The best of two: what else runs on the machine shows in either.
    assert min(late) <= health.bound(idle)
    assert settled[1] <= settled[0] + 50, "memory grows"
    with Client(target) as client:
        ask = GUESTS["margin"].ask
        assert client.select(ask.strategy, ask.budget, **ask.inputs()).indices.tolist() == right["margin"]


def test_nobody_is_refused_or_starves_where_there_is_room_for_all(server):
    *_, right = server
    with process("-m", "queryselect_service", *QUIETLY) as (_, (port, metrics)):
        with Crew(CLIENTS, partial(visit, f"127.0.0.1:{port}", right, ["margin"], True), nice=NICE) as crew:
            crew.begin(10)
            found = crew.found()
        assert set(tally(found)["margin"]) == {"result"}
        assert min(seen.answers["result"] for _, seen in found) > 0
        assert_idle(metrics)


def test_a_modest_client_has_its_turns_beside_a_greedy_one(server):
    """It asks for one job at a time, the other for more than there are places: in one line it would get a 17th."""
    _, metrics, target, _ = server
    with Crew(1, partial(take_turns, target, AT_ONCE)) as greedy, Crew(1, partial(take_turns, target, 1)) as modest:
        greedy.begin(10)
        modest.begin(10)
        (few,), (many,) = modest.found(), greedy.found()
    assert set(few.answers) == {"result"}, "it asks for no more than its share"
    assert few.answers["result"] >= many.answers["result"] / 4
    assert set(many.answers) == {"result", "RESOURCE_EXHAUSTED"}
    assert_idle(metrics)
