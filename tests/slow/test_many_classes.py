"""BAIT over 77 classes: nothing of the size (D C)² fits, a step takes seconds, and a cancelled one stops at once."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.machine import Usage, in_flight
from tests.slow.servers import assert_stops_at_once, quiet_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROWS, DIMS, CLASSES = 10_000, 384, 77


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    x = (
        rng.standard_normal((ROWS, DIMS), np.float32)
        + 2 * rng.standard_normal((20, DIMS), np.float32)[rng.integers(20, size=ROWS)]
    )
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return {"embeddings": x, "logits": 3 * x @ rng.standard_normal((DIMS, CLASSES), np.float32)}


@pytest.fixture(scope="module")
def server():
    with quiet_server() as (pid, metrics, client):
        yield pid, metrics, client


@pytest.mark.parametrize("seconds", [1, 7, 25], ids=["while it begins", "among pairs of rows", "among picks"])
def test_a_cancelled_one_stops_within_a_quarter_of_a_second(server, pool, seconds):
    _, metrics, client = server
    job = client.submit("bait", 100, **pool)
    time.sleep(seconds)
    assert in_flight(metrics)
    assert_stops_at_once(job, metrics)


def test_two_of_150_classes_take_less_than_4_gb(server, pool):
    pid, _, client = server
    usage = Usage(pid)
    logits = np.concatenate([pool["logits"], pool["logits"][:, :73] - 1], axis=1)
    picks = client.select("bait", 100, embeddings=pool["embeddings"], logits=logits, params={"top_classes": 2})
    assert len(set(picks.indices.tolist())) == 100
    assert usage.peak < 4000
