"""discriminative: the same fits by Newton's method with the Hessian written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from queryselect import Client, Discriminative, InvalidInput
from queryselect_service.kernels import discriminative
from tests.kernels.leaving import checks
from tests.kernels.test_k_center_greedy import farthest_first
from tests.strategy_case import LISTS, ROWS, StrategyCase


def standardized(x):
    x = x.astype(np.float64)
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, np.inf)


def logits_of_the_optimum(x, labeled, l2):
    """x with a constant beside: w.x where the penalised loss has no slope."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    w = np.zeros(x.shape[1])

    def value(w):
        return np.logaddexp(0, np.where(labeled, 1, -1) * (x @ w)).sum() + l2 / 2 * w @ w

    for _ in range(200):
        p = 1 / (1 + np.exp(-x @ w))
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + l2 * np.eye(len(w)), x.T @ (p - ~labeled) + l2 * w)
        while value(w - step) > value(w) + 1e-12:
            step /= 2
        w = w - step
    assert np.abs(x.T @ (1 / (1 + np.exp(-x @ w)) - ~labeled) + l2 * w).max() < 1e-10
    return x @ w


def by_definition(x, k, context, candidates, *, sub_batches=10, l2=1.0):
    rows, labeled, free = standardized(x), np.isin(np.arange(len(x)), context), candidates.copy()
    rounds, picks, scores = min(k, sub_batches), [], []
    for number in range(1, rounds + 1):
        count = k * number // rounds - len(picks)
        if not labeled.any():
            taken, found, _ = farthest_first(x, count, np.array([], dtype=int), free)
        else:
            z = logits_of_the_optimum(rows, labeled, l2)
            taken = np.argsort(np.where(free, -z, np.inf), kind="stable")[:count]
            found = 1 / (1 + np.exp(-z[taken]))
        picks += taken.tolist()
        scores += found.tolist()
        free[taken], labeled[taken] = False, True
    return np.array(picks), np.array(scores)


class TestDiscriminative(StrategyCase):
    name = "discriminative"
    slice_tolerance = 1e-5

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 5)) * [1, 10, 0.1, 3, 1] + 4}

    def oracle(self, inputs, k, context, candidates):
        return *by_definition(inputs["embeddings"], k, context, candidates), np.zeros(ROWS)


@pytest.mark.parametrize("written", [0, 1024], ids=["by conjugate gradients", "by the Hessian"])
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize(("sub_batches", "l2"), [(1, 1.0), (3, 0.01), (4, 100.0), (50, 1.0)])
def test_picks_come_in_sub_batches(local: Client, monkeypatch, lists, sub_batches, l2, written):
    """Eleven picks: in one, in 3 4 4, in 2 3 3 3, and one by one where there are fewer picks than sub-batches."""
    monkeypatch.setattr(discriminative, "WRITTEN", written)
    x = np.random.default_rng(1).normal(size=(ROWS, 6))
    context = np.array(sorted({*lists.get("labeled", ()), *lists.get("pending", ())}), dtype=int)
    candidates = np.isin(np.arange(ROWS), lists.get("candidates", np.setdiff1d(np.arange(ROWS), context)))
    picks, scores = by_definition(x, 11, context, candidates, sub_batches=sub_batches, l2=l2)
    got = local.select(Discriminative(sub_batches=sub_batches, l2=l2), 11, embeddings=x, **lists)
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-9)


@pytest.mark.parametrize("offset", [1000.0, 1e5])
def test_a_far_mean_in_single_precision_changes_nothing(local: Client, offset):
    x = (np.random.default_rng(0).normal(size=(400, 12)) + offset).astype(np.float32)
    picks, scores = by_definition(x, 30, np.arange(20), np.arange(400) > 19)
    for dtype in (np.float32, np.float64):
        got = local.select("discriminative", 30, embeddings=x.astype(dtype), labeled=np.arange(20))
        assert got.indices.tolist() == picks.tolist()
        np.testing.assert_allclose(got.scores, scores, rtol=1e-8)


def test_rows_that_separate_from_the_labelled_ones_come_first(local: Client):
    """Three clusters, of which one has labels: rows of the others are taken, and of both once one is seen."""
    rng = np.random.default_rng(0)
    x = np.repeat(10 * np.eye(3), 30, axis=0) + rng.normal(size=(90, 3))
    got = local.select("discriminative", 20, embeddings=x, labeled=np.arange(10))
    assert set(got.indices // 30) == {1, 2}
    assert got.scores[0] > 0.9
    assert (got.scores > 0.5).all()


def test_a_cold_start_is_farthest_first_and_that_is_told(local: Client):
    x = np.random.default_rng(0).normal(size=(40, 3))
    got = local.select(Discriminative(sub_batches=2), 10, embeddings=x)
    picks, scores, _ = farthest_first(x, 5, np.array([], dtype=int), np.ones(40, dtype=bool))
    assert got.indices[:5].tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores[:5], scores)
    assert ((got.scores[5:] > 0) & (got.scores[5:] < 1)).all()
    (warning,) = got.warnings
    assert (warning.code, warning.rows.tolist()) == ("FALLBACK", picks.tolist())
    assert not local.select(Discriminative(sub_batches=2), 10, embeddings=x, labeled=[3]).warnings


def test_columns_that_are_constant_tell_nothing(local: Client):
    x = np.random.default_rng(0).normal(size=(60, 4))
    plain = local.select("discriminative", 20, embeddings=x, labeled=[0, 1, 2])
    for constant in (0.0, 0.1, 1e8):
        wide = np.concatenate([x, np.full((60, 2), constant)], axis=1)
        got = local.select("discriminative", 20, embeddings=wide, labeled=[0, 1, 2])
        assert got.indices.tolist() == plain.indices.tolist()
        np.testing.assert_allclose(got.scores, plain.scores, rtol=1e-9)


@pytest.mark.parametrize("written", [0, 1024], ids=["by conjugate gradients", "by the Hessian"])
def test_more_columns_than_rows_are_separable_and_have_an_optimum(local: Client, monkeypatch, written):
    monkeypatch.setattr(discriminative, "WRITTEN", written)
    x = np.random.default_rng(0).normal(size=(50, 300)).astype(np.float32)
    picks, scores = by_definition(x, 20, np.arange(4), np.arange(50) > 3, l2=1e-3)
    got = local.select(Discriminative(l2=1e-3), 20, embeddings=x, labeled=np.arange(4))
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-7)


def test_where_all_rows_are_labelled_those_that_may_be_chosen_are(local: Client):
    got = local.select("discriminative", 3, embeddings=np.eye(4), labeled=[0, 1, 2, 3], candidates=[1, 2, 3])
    assert sorted(got.indices) == [1, 2, 3]
    assert (got.scores < 0.5).all()


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_l2_is_above_zero(local: Client, value):
    with pytest.raises(InvalidInput, match="l2 must be") as caught:
        local.select("discriminative", 1, embeddings=np.eye(3), params={"l2": value})
    assert caught.value.field == "strategy.discriminative.l2"


def test_a_caller_who_leaves_is_heard_at_every_step():
    x = torch.randn(400, 8, generator=torch.manual_seed(0))
    assert checks("discriminative", {"embeddings": x}, {}, k=20) > 100
