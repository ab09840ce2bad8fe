"""Bounds of gains in single precision, and when they are given up."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from queryselect import Client
from queryselect_service.kernels.max_herding import MaxHerding
from queryselect_service.maths import herding
from queryselect_service.maths.distances import Points
from queryselect_service.shards import Whole
from tests.kernels.test_max_herding import herd


@given(
    seed=st.integers(0, 2**32 - 1),
    dims=st.integers(1, 200),
    bandwidth=st.floats(0.1, 30),
    normalize=st.booleans(),
    weighted=st.booleans(),
    labeled=st.integers(0, 20),
)
def test_gains_are_no_higher_and_losses_no_lower_than_their_bounds(seed, dims, bandwidth, normalize, weighted, labeled):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(120, dims)) * (1 if normalize else 3 / np.sqrt(dims)) + rng.normal()
    weights = torch.from_numpy(rng.exponential(size=120)) if weighted else None
    points = Points(torch.from_numpy(x), Whole(120), normalize=normalize)
    spec = MaxHerding(normalize=normalize, bandwidth=bandwidth)
    coverage = herding.Coverage(points, weights, torch.arange(labeled), spec)
    bounds = coverage.bounds
    if bounds is None:
        return
    gains, before = coverage.gains(coverage.rows), coverage.covered.clone()
    upper = bounds.gains(bounds.rows)
    assert (gains <= upper).all()
    coverage.cover(coverage.rows[rng.integers(0, 120, 3)])
    losses, lower = coverage.losses(coverage.rows, before), bounds.losses(bounds.rows, before)
    assert (lower <= losses + coverage.error).all()
    np.testing.assert_allclose(gains - losses, coverage.gains(coverage.rows), atol=3 * coverage.error)
    if bandwidth < 3:
        mass = float(coverage.mass.sum())
        np.testing.assert_allclose(upper, gains, atol=2e-3 * mass)
        np.testing.assert_allclose(lower, losses, atol=2e-3 * mass)


def test_where_single_precision_tells_too_little_gains_are_all_computed(local: Client, monkeypatch):
    """Rows so near one another that what is left to gain after a pick is a part of 1e-8 of the first gain."""
    looks, look_at_all = [], herding._LazyGreedy._look_at_all
    monkeypatch.setattr(herding._LazyGreedy, "_look_at_all", lambda self: (looks.append(1), look_at_all(self)))
    x = np.random.default_rng(0).normal(size=(200, 6)) * 1e-4
    picks, scores, _ = herd(x, 30, np.arange(0), np.ones(200, bool))
    got = local.select("max_herding", 30, embeddings=x, params={"normalize": False})
    assert looks == [1]
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-5)
