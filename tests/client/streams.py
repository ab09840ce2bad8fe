"""What tests of the client's streams share: pools worth a stream, servers of their own, and when all is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from queryselect import (
    Client,
    Margin,
    Picks,
)
from queryselect_service import server
from queryselect_service.settings import Settings
from tests.client.fake import Attempt, Fake

N = 70_000
RNG = np.random.default_rng(0)
# Values that float16 and bfloat16 hold exactly: enough of them to be streamed, the first in two bytes each.
X = RNG.integers(-128, 128, (N, 32)) / 16
X32 = X[:, :16].astype("f4")
BUDGET = 10
UPLOAD = {"logits": X32}
#: A selection whose bytes take a while to come, and none to select.
MASK = np.zeros(5_000_000, bool)
AT = ["start", "middle", "end"]
ANSWER = {"indices": np.arange(500), "scores": RNG.normal(size=500), "pool_scores": RNG.normal(size=3000)}


def streamed(picks: Picks) -> bool:
    """Whether the picks came by stream: no other way takes time to receive."""
    return picks.info.receive > 0


def assert_same(here: Picks, there: Picks) -> None:
    """All that a selection tells is the same, bit by bit."""
    for name in ("indices", "scores", "pool_scores", "ids"):
        mine, other = getattr(here, name), getattr(there, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
            assert np.array_equal(mine, other), name
    warnings = [[(each.code, each.message, each.rows.tolist()) for each in picks.warnings] for picks in (here, there)]
    assert warnings[0] == warnings[1]
    for name in ("score_kind", "stop_reason", "strategy", "cost_spent"):
        assert getattr(here, name) == getattr(there, name), name


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[server.Server, str]]:
    """A server of a test's own, and its address."""
    started = server.start(Settings(port=0, metrics_port=-1, **settings))
    try:
        yield started, f"127.0.0.1:{started.port}"
    finally:
        started.drain(0.0)


def select(fake: Fake, *, retries: int = 3, **options: Any) -> Picks:
    with Client(fake.target, retries=retries) as client:
        return client.select(Margin(), 1, **UPLOAD, **options)


def sent_in_full(attempt: Attempt) -> bool:
    return attempt.tensors == {"pool.logits": X32.tobytes()}
