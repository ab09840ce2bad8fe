"""A million rows of 384 dimensions by stream: the picks, the server's memory, and how soon a cancelled one stops."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.machine import Usage
from tests.slow.servers import assert_stops_at_once, quiet_server
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROWS, DIMS, BUDGET = 1_000_000, 384, 100


@pytest.fixture(scope="module")
def pool():
    return np.random.default_rng(0).standard_normal((ROWS, DIMS), np.float32)


@pytest.fixture(scope="module")
def server(pool):
    with quiet_server() as (pid, metrics, client):
        client.select("k_center_greedy", 1000, embeddings=pool[:20_000])  # what libraries take once
        yield pid, metrics, client


def test_k_center_greedy_picks_farthest_first_within_the_memory_of_the_pool(server, pool):
    pid, _, client = server
    usage, seen = Usage(pid), []
    picks = client.select("k_center_greedy", BUDGET, embeddings=pool, progress=lambda *step: seen.append(step))
    assert usage.peak <= pool.nbytes / 1e6 + 150
    assert {phase for phase, _, _ in seen} >= {"receiving", "selecting"}
    # Farthest first, by its definition: every pick is as far from those before it as no other row is.
    assert len(set(picks.indices.tolist())) == BUDGET
    nearest = np.full(ROWS, np.inf)
    for step, (row, score) in enumerate(picks):
        if step:
            assert score == pytest.approx(nearest[row] ** 0.5, rel=1e-5)
            assert nearest.max() ** 0.5 <= score * (1 + 1e-5)
        nearest = np.minimum(nearest, squared_distances(pool, pool[row]))


def squared_distances(pool: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(N,), from every row to the centre."""
    blocks = (pool[start : start + 10_000] - centre for start in range(0, len(pool), 10_000))
    return np.concatenate([np.square(block).sum(1) for block in blocks])


@pytest.mark.parametrize("phase", ["receiving", "selecting"])
def test_a_cancelled_one_stops_and_its_memory_is_back(server, pool, phase):
    pid, metrics, client = server
    before, under_way = Usage(pid), []

    def note(now: str, done: int, _: int | None) -> None:
        if now == phase and done > 0:
            under_way.append(time.monotonic())

    job = client.submit("k_center_greedy", 1000, embeddings=pool, progress=note)
    assert until(lambda: under_way, 60)
    assert_stops_at_once(job, metrics)
    assert until(lambda: before.now <= 50, 1), f"{before.now:.0f} MB more than before"
    assert len(client.select("random", 1, num_rows=5)) == 1
