"""Bounds of gains in single precision, and when they are given up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from queryselect import Client
from queryselect_service import strategy as strategies
from queryselect_service.kernels.max_herding import MaxHerding
from queryselect_service.maths import herding, herding_bounds
from queryselect_service.maths.distances import Points
from queryselect_service.shards import Whole
from queryselect_service.spec import build
from queryselect_service.strategy import Task
from tests.kernels.test_max_herding import herd, unit
from tests.slices import selected
from tests.strategy_case import assert_promised


@given(
    seed=st.integers(0, 2**32 - 1),
    dims=st.integers(1, 200),
    bandwidth=st.floats(0.01, 30),
    normalize=st.booleans(),
    weighted=st.booleans(),
    labeled=st.integers(0, 20),
    part=st.sampled_from([0.0, 0.2, 0.8, 1.0]),
)
@example(seed=0, dims=1, bandwidth=0.125, normalize=True, weighted=False, labeled=0, part=0.0)
@example(seed=0, dims=1, bandwidth=0.125, normalize=True, weighted=True, labeled=5, part=0.8)
def test_gains_are_no_higher_and_losses_no_lower_than_their_bounds(
    seed, dims, bandwidth, normalize, weighted, labeled, part
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(120, dims)) * (1 if normalize else 3 / np.sqrt(dims)) + rng.normal()
    weights = torch.from_numpy(rng.exponential(size=120) * rng.integers(0, 2, 120)) if weighted else None
    points = Points(torch.from_numpy(x), Whole(120), normalize=normalize)
    spec = MaxHerding(normalize=normalize, bandwidth=bandwidth)
    coverage = herding.Coverage(points, weights, torch.arange(labeled), spec)
    bounds = coverage.bounds
    if bounds is None:
        return
    gains, before = coverage.gains(coverage.rows), coverage.covered.clone()
    upper = bounds.gains(bounds.rows)
    assert (gains <= upper).all()
    allowed = torch.from_numpy(rng.random(120) < part)
    by_pairs, seers = bounds.by_pairs(allowed)
    assert (gains <= by_pairs)[allowed].all()
    coverage.cover(coverage.rows[rng.integers(0, 120, 3)])
    losses, lower = coverage.losses(coverage.rows, before), bounds.losses(bounds.rows, before)
    assert (lower <= losses + coverage.error).all()
    known = seers.losses(before)
    assert (known <= losses + coverage.error)[allowed].all()
    np.testing.assert_allclose(gains - losses, coverage.gains(coverage.rows), atol=3 * coverage.error)
    # Exponents are wrong by so much, which is added or taken away on top: the more, the narrower the kernel.
    wrong = herding_bounds.Bounds.rounding(dims, 4 * float(coverage.norms.max()) / coverage.width**2)
    apart = float(coverage.mass.sum()) * math.expm1(2 * wrong) + coverage.error
    np.testing.assert_allclose(upper, gains, atol=apart)
    np.testing.assert_allclose(lower, losses, atol=apart)
    np.testing.assert_allclose(by_pairs[allowed], gains[allowed], atol=apart)
    np.testing.assert_allclose(known[allowed], losses[allowed], atol=apart)


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


@pytest.mark.parametrize("labeled", [0, 7])
@pytest.mark.parametrize("most", [0, 4_000, 20_000, 90_000])
def test_it_picks_the_same_however_many_pairs_it_may_keep(local: Client, monkeypatch, most, labeled):
    """None, none at first, all but where the guess at their number is wrong, and all."""
    rng, candidates = np.random.default_rng(1), np.ones(300, bool)
    x = np.repeat(rng.normal(size=(150, 20)), 2, axis=0)
    x[150:] += 0.1 * rng.normal(size=(150, 20))
    candidates[:labeled] = candidates[200:230] = False
    monkeypatch.setattr(herding_bounds, "FEWEST_PAIRS", max(1, most))
    monkeypatch.setattr(herding_bounds, "PAIRS_PER_ENTRY", 0)
    picks, scores, _ = herd(unit(x), 60, np.arange(labeled), candidates)
    got = local.select("max_herding", 60, embeddings=x, labeled=np.arange(labeled), candidates=candidates.nonzero()[0])
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-9)


def test_where_there_are_more_pairs_than_guessed_none_are_kept(monkeypatch):
    """The labelled row is far from all others, which see one another better."""
    x = np.random.default_rng(0).normal(size=(80, 3))
    x[0] += 100
    points = Points(torch.from_numpy(x), Whole(80), normalize=False)
    coverage = herding.Coverage(points, None, torch.tensor([0]), MaxHerding(normalize=False, bandwidth=30.0))
    allowed = torch.arange(80) > 0
    gains, seers = coverage.bounds.by_pairs(allowed)
    assert seers is not None
    monkeypatch.setattr(herding_bounds, "FEWEST_PAIRS", 79 * 79 - 1)
    again, seers = coverage.bounds.by_pairs(allowed)
    assert seers is None
    assert again.tolist() == gains.tolist()


@pytest.mark.parametrize("cuts", [[0, 900, 2500], [0, 40, 40, 2500]], ids=str)
def test_slices_keep_pairs_once_there_are_few_enough(slices, cuts):
    """First bounds are of all pairs, then lowered by rows covered better, then by pairs."""
    assert 3 < herding_bounds.enough_covered(2500, 2) < 10
    x = torch.randn(2500, 2, generator=torch.manual_seed(0), dtype=torch.float64)
    options = {
        "k": 30,
        "context": torch.empty(0, dtype=torch.int64),
        "candidates": torch.ones(2500, dtype=torch.bool),
        "spec": build(MaxHerding, {"bandwidth": 0.3, "normalize": False}),
        "task": Task("MULTICLASS"),
        "seed": 0,
    }
    strategies.load()
    with torch.inference_mode():
        whole = selected(
            strategies.select(strategies.STRATEGIES["max_herding"], {"embeddings": x}, pool=Whole(2500), **options)
        )
    assert_promised(whole, slices.select("max_herding", {"embeddings": x}, cuts, **options), 1e-9)
