"""k_means against a plain numpy version: the same start, Lloyd's iterations, and the nearest row to every centre."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from queryselect import Client, InvalidInput
from queryselect_service.choice import Choice
from queryselect_service.maths import kmeans
from queryselect_service.maths.distances import Points
from queryselect_service.shards import Whole
from tests.maths.test_kmeans import blobs, plain_start
from tests.strategy_case import ROWS, StrategyCase


def lloyd(x, k, seed, weights=None):
    """The labels (n,), centres (c, D) and masses (c,) at a local minimum."""
    weights = np.ones(len(x)) if weights is None else weights / weights.max()
    centres, before = x[plain_start(x, k, seed, weights)], None
    for _ in range(100):
        labels = np.linalg.norm(x[:, None] - centres[None], axis=2).argmin(1)
        if np.array_equal(labels, before):
            break
        before = labels
        centres = np.stack(
            [np.average(x[labels == c], axis=0, weights=weights[labels == c]) for c in range(len(centres))]
        )
    return labels, centres, np.bincount(labels, weights)


def nearest_rows(x, centres, masses, free):
    """One free row per centre, the heaviest cluster first, with minus its distance."""
    free, picks, scores = free.copy(), [], []
    for c in sorted(range(len(centres)), key=lambda c: (-masses[c], c)):
        apart = np.where(free, np.linalg.norm(x - centres[c], axis=1), np.inf)
        picks.append(int((apart <= apart.min() * (1 + 1e-10)).argmax()))  # both rows of a pair are as near
        scores.append(-apart.min())
        free[picks[-1]] = False
    return np.array(picks), np.array(scores)


class TestKMeans(StrategyCase):
    name = "k_means"
    slice_tolerance = 1e-5

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 5))}

    def rows(self, inputs):
        return inputs["embeddings"]

    def oracle(self, inputs, k, context, candidates, seed=0):
        x = self.rows(inputs)
        _, centres, masses = lloyd(x, k, seed, inputs.get("weights"))
        return *nearest_rows(x, centres, masses, candidates), np.zeros(ROWS)

    @pytest.mark.parametrize("seed", range(4))
    def test_picks_and_scores_are_those_of_brute_force(self, local, seed):
        inputs = self.inputs(seed)
        for lists in ({"labeled": [0, 3, 4]}, {"labeled": [2], "pending": [9, 1]}, {"candidates": range(8, 20)}, {}):
            candidates = np.isin(np.arange(ROWS), lists.get("candidates", range(ROWS)))
            candidates[[row for name in ("labeled", "pending") for row in lists.get(name, [])]] = False
            picks, scores, _ = self.oracle(inputs, 8, None, candidates, seed)
            got = self.select(local, inputs, 8, seed=seed, **lists)
            assert got.indices.tolist() == picks.tolist()
            np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-9)

    def test_a_shorter_budget_is_a_prefix(self, local):
        """It is not: fewer picks have fewer clusters."""
        assert len(self.select(local, self.inputs(), 3, labeled=[0])) == 3


class TestWeightedKMeans(TestKMeans):
    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 5)), "weights": rng.integers(1, 9, ROWS) / 8.0}

    def test_scores_are_never_nan_on_extreme_inputs(self, local):
        """Weights of 0 alone are refused; here they only get small and large."""
        for factor in (1e-300, 1e-30, 1e30, 1e300):
            got = self.select(local, {name: x * factor for name, x in self.inputs().items()}, labeled=[0])
            assert np.isfinite(got.scores).all()


class TestNormalizedKMeans(TestKMeans):
    params: ClassVar = {"normalize": True}

    def rows(self, inputs):
        x = inputs["embeddings"]
        return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_blob_gets_a_pick_near_its_centre(local: Client, dtype, offset):
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(7, 16)) * 20
    sizes = [90, 70, 60, 50, 40, 30, 20]
    of = rng.permutation(np.repeat(np.arange(7), sizes))
    x = np.round((middles[of] + rng.normal(size=(360, 16))) * 64) / 64
    got = local.select("k_means", 7, embeddings=(x + offset).astype(dtype), labeled=[3, 9], seed=1)
    assert of[got.indices].tolist() == list(range(7))  # the largest first
    for row, score, blob in zip(got.indices, got.scores, range(7), strict=True):
        mine = x[of == blob]
        apart = np.linalg.norm(mine - mine.mean(0), axis=1)
        np.testing.assert_allclose(-score, np.linalg.norm(x[row] - mine.mean(0)))
        assert -score <= np.sort(apart)[2]  # two rows are labelled


def test_rows_that_are_labelled_count_in_the_mass_and_are_not_chosen(local: Client):
    x = np.array([[0.0], [0.1], [0.2], [0.3], [9.0], [9.1]])
    got = local.select("k_means", 2, embeddings=x, labeled=[0, 1])
    assert got.indices.tolist() == [2, 4]
    np.testing.assert_allclose(got.scores, [-0.05, -0.05])


def test_a_row_that_is_nearest_to_two_centres_represents_the_first(local: Client):
    """One candidate lies between two clusters; the second is represented by the next nearest."""
    x = np.array([[0.0], [0.5], [10.0], [10.5], [11.0], [5.0], [40.0]])
    got = local.select("k_means", 2, embeddings=x[:6], candidates=[5, 4], weights=np.array([1.0, 1, 1, 1, 1, 0]))
    assert got.indices.tolist() == [4, 5]
    got = local.select("k_means", 2, embeddings=x, candidates=[5, 6], weights=np.array([1.0, 1, 1, 1, 1, 0, 0]))
    assert got.indices.tolist() == [5, 6]
    np.testing.assert_allclose(got.scores, [-5.5, -39.75])


@pytest.mark.parametrize("depth", [1, 3, 64])
def test_rows_that_are_nearest_to_all_centres_represent_the_first(monkeypatch, depth):
    """As do those near the mean of rows without structure; and how many are looked for at once is nobody's business."""
    monkeypatch.setattr(kmeans, "DEPTH", depth)
    rng = np.random.default_rng(0)
    x, centres, masses = rng.normal(size=(150, 60)), 0.3 * rng.normal(size=(40, 60)), rng.permutation(40) + 1.0
    points = Points(torch.from_numpy(x), Whole(150))
    clusters = kmeans.Clusters(
        torch.zeros(150, dtype=torch.int64), points.moved(torch.from_numpy(centres)), torch.from_numpy(masses)
    )
    free = rng.random(150) < 0.9
    choice = Choice(40, torch.from_numpy(free), Whole(150))
    picks, scores, _ = kmeans.representatives(points, clusters, choice)
    theirs, their_scores = nearest_rows(x, centres, masses, free)
    assert len(set(np.linalg.norm(x[:, None] - centres, axis=2).argmin(0))) < 10
    assert picks.tolist() == theirs.tolist()
    np.testing.assert_allclose(scores, their_scores, rtol=1e-12)


def test_fewer_distinct_rows_than_picks_are_told(local: Client):
    x = np.repeat(np.eye(3), 4, axis=0)
    got = local.select("k_means", 6, embeddings=x, labeled=[0])
    assert sorted(got.indices[:3]) == [1, 4, 8]
    assert got.indices[3:].tolist() == [2, 3, 5]
    assert got.scores.tolist() == [0] * 6
    (warning,) = got.warnings
    assert warning.code == "FALLBACK"
    assert warning.rows.tolist() == [2, 3, 5]


def test_rows_without_length_are_told_when_length_matters(local: Client):
    x = np.random.default_rng(0).normal(size=(10, 3))
    x[[4, 6]] = 0
    got = local.select("k_means", 3, params={"normalize": True}, embeddings=x)
    assert [(each.code, each.rows.tolist()) for each in got.warnings] == [("INERT_ROWS", [4, 6])]
    assert not local.select("k_means", 3, embeddings=x).warnings


def test_no_row_has_a_score_that_is_not_chosen(local: Client):
    with pytest.raises(InvalidInput, match="no score for rows"):
        local.select("k_means", 3, embeddings=blobs(0), return_pool_scores=True)


def test_a_quota_goes_past_the_nearest_rows(local: Client):
    """Rows 0 to 4 stand at the centre and share a group; whoever comes next is told by exact distances."""
    x = np.array([[0.0], [0.0], [0.0], [1.0], [-1.0], [50.0], [50.0], [51.0]])
    got = local.select("k_means", 2, embeddings=x, groups=[0, 0, 0, 1, 1, 0, 0, 2], max_per_group=1, seed=2)
    assert got.indices.tolist() == [0, 7]
    np.testing.assert_allclose(got.scores, [0, -2 / 3])


def test_both_rows_of_a_pair_are_as_near_to_their_mean(local: Client):
    """Rounding says otherwise for most of them; the lower one is chosen all the same."""
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(40, 3)) * 1000
    x = np.concatenate([middles, middles + rng.normal(size=(40, 3))])
    got = local.select("k_means", 40, embeddings=x)
    assert sorted(got.indices) == list(range(40))
