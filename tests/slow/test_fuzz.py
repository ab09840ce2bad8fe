"""What nobody should send: thousands of requests, good, damaged and undecodable, to a server of its own."""

from __future__ import annotations

import pytest

from benchmarks.machine import Usage
from benchmarks.service.fuzz import fuzz, fuzzed_server
from queryselect_service import strategy as registry

#: What a server may hold more after thousands of cases than after the first ones, in MB: arenas, metrics by name.
GROWTH = 100


@pytest.fixture(scope="module")
def server():
    with fuzzed_server() as (target, folder, pid, settled):
        fuzz(target, folder, 250, seed=99, settled=settled)  # what libraries take once
        yield target, folder, pid, settled


@pytest.mark.parametrize(
    ("cases", "seed"),
    [
        pytest.param(1000, 0, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(5000, 1, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)]),
        pytest.param(5000, 2, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)]),
    ],
)
def test_whatever_is_sent_is_answered_as_documented_and_the_server_lives(server, cases, seed):
    target, folder, pid, settled = server
    usage = Usage(pid)
    outcome = fuzz(target, folder, cases, seed, settled)
    assert not outcome.failures, str(outcome)
    assert outcome.cases == cases
    registry.load()
    assert not set(registry.STRATEGIES) - set(outcome.picked), "every strategy is reached, and gives picks"
    assert usage.now < GROWTH
