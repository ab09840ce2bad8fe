"""Greedy k-centres that look at few rows, against those that look at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from queryselect_service.maths import least_like
from queryselect_service.maths.descriptors import product, total
from queryselect_service.maths.least_like import k_centers
from queryselect_service.shards import Whole


def plain(similar, k, first, repeat):
    chosen, free = [first], np.ones(len(similar), bool)
    while len(chosen) < k:
        if not repeat:
            free[chosen[-1]] = False
        closest = np.where(free, similar[chosen].max(0), np.inf)
        chosen.append(int(closest.argmin()))
    return chosen


@pytest.fixture(params=["all rows at every step", "rows that may be next"])
def lazy(request, monkeypatch):
    monkeypatch.setattr(least_like, "CACHED_BYTES", 1 << 30 if "all" in request.param else 0)
    monkeypatch.setattr(least_like, "FRONTIER", 3)


@pytest.mark.usefixtures("lazy")
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.booleans(), st.booleans())
def test_centres_are_those_of_brute_force(seed, k, repeat, multiply):
    """Small integers, so that there are ties and no rounding."""
    rng = np.random.default_rng(seed)
    n = k + int(rng.integers(1, 25))
    x, y = rng.integers(-2, 3, (n, 3)).astype(float), rng.integers(-2, 3, (n, 2)).astype(float)
    factors = torch.from_numpy(x), torch.from_numpy(y)
    terms = [product(*factors, widths=(3, 2))] if multiply else total(factors, [3, 2])
    similar = (x @ x.T) * (y @ y.T) if multiply else x @ x.T + y @ y.T
    first = int(rng.integers(n))
    steps = []
    pool = Whole(n, report=lambda done, whole: steps.append(done / whole))
    got = k_centers(terms, torch.tensor(first), k, pool, repeat=repeat)
    assert got.tolist() == plain(similar, k, first, repeat)
    assert steps == [at / (2 * k) for at in range(k)]
