"""Hundreds of megabytes of samples by stream: the server's memory, and how soon what takes long stops."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.machine import Usage, in_flight
from tests.slow.servers import assert_stops_at_once, quiet_server
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROWS, MEMBERS, CLASSES = 400_000, 25, 10


@pytest.fixture(scope="module")
def samples():
    """400 MB."""
    x = np.random.default_rng(0).random((ROWS, MEMBERS, CLASSES), np.float32)
    x /= x.sum(2, keepdims=True)
    return x


@pytest.fixture(scope="module")
def server(samples):
    with quiet_server() as (pid, metrics, client):
        client.select("bald", 1000, samples=samples[:20_000])  # what libraries take once
        yield pid, metrics, client


@pytest.mark.parametrize("name", ["bald", "power_bald", "vote_entropy", "margin"])
def test_a_pool_of_samples_takes_the_memory_of_its_scores(server, samples, name):
    pid, _, client = server
    usage = Usage(pid)
    picks = client.select(name, 100, samples=samples, seed=1)
    assert len(picks) == 100
    assert usage.peak <= 120 + 100 * ROWS / 1e6  # blocks on their way, and what ranking takes per row


CASES = {
    "batch_bald": ({"params": {"num_samples": 100_000}}, slice(0, 20_000)),
    "bald": ({"task": "MULTILABEL", "params": {"label_aggregation": "JOINT"}}, slice(0, 20_000)),
    "epig": ({}, slice(0, 20_000)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_takes_long_stops_soon(server, samples, name):
    _, metrics, client = server
    options, rows = CASES[name]
    pool = samples[rows]
    if name == "bald":  # so many labels that label vectors are drawn
        pool = np.random.default_rng(0).random((4000, 100, 20), np.float32)
    if name == "epig":
        options = {"reference": {"samples": samples[:5000]}}
    job = client.submit(name, 100, samples=pool, **options)
    assert until(lambda: in_flight(metrics), 60)
    time.sleep(4)  # in the midst of it
    assert in_flight(metrics)
    assert_stops_at_once(job, metrics)
