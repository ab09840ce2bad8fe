"""typiclust against a plain numpy version and against the picks of its authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from queryselect import Client, InvalidInput
from queryselect_service.maths import typicality
from queryselect_service.maths.distances import Points
from queryselect_service.maths.kmeans import k_means
from queryselect_service.shards import Whole
from tests.maths.test_kmeans import blobs
from tests.strategy_case import ROWS, StrategyCase

DATA = Path(__file__).parent.parent / "data"


def unit(x):
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths == 0, 1, lengths)


def typical(x, members, neighbors, power):
    """The typicality (m,) of the members by direct differences."""
    if len(members) == 1:
        return np.zeros(1)
    apart = np.sqrt(((x[members][:, None] - x[members][None]) ** 2).sum(2)) ** power
    np.fill_diagonal(apart, np.inf)
    return 1 / (np.sort(apart, axis=1)[:, : min(neighbors, len(members) // 2)].mean(1) + 1e-5)


def plain(x, clusters, k, context, candidates, *, least=5, neighbors=20, power=2):
    """The definition, one cluster after the other, then the farthest rows: picks, scores, how many of them typical."""
    sizes = {c: int((clusters == c).sum()) for c in sorted(set(clusters))}
    covered = {c: int((clusters[context] == c).sum()) for c in sizes}
    order = sorted((c for c in sizes if sizes[c] > least), key=lambda c: (covered[c], -sizes[c], c))
    free, left = candidates.copy(), np.ones(len(x), bool)
    left[context] = False
    picks, scores = [], []
    while any((free & left & (clusters == c)).any() for c in order) and len(picks) < k:
        for c in order:
            members = np.flatnonzero(left & (clusters == c))
            if not free[members].any() or len(picks) == k:
                continue
            score = np.where(free[members], typical(x, members, neighbors, power), -np.inf)
            picks.append(int(members[score.argmax()]))
            scores.append(score.max())
            left[picks[-1]] = free[picks[-1]] = False
    near = len(picks)
    while len(picks) < k:
        before = [*context, *picks]
        away = np.linalg.norm(x - x.mean(0), axis=1)
        if before:
            away = np.linalg.norm(x[:, None] - x[before][None], axis=2).min(1)
        order_of = away if before else -away
        picks.append(int(np.where(free, order_of, -np.inf).argmax()))
        scores.append(away[picks[-1]])
        free[picks[-1]] = False
    return picks, scores, near


class TestTypiclust(StrategyCase):
    """With the caller's own clusters, some of which are small."""

    name = "typiclust"
    seeded = False
    slice_tolerance = 1e-5
    params: ClassVar = {"min_cluster_size": 3, "neighbors": 4}

    def make(self, rng):
        clusters = rng.permutation(np.repeat([7, -3, 1000, 5, 6], [9, 8, 8, 3, 2]))
        return {"embeddings": rng.normal(size=(ROWS, 6)), "clusters": clusters}

    def oracle(self, inputs, k, context, candidates):
        power = 1 if self.params.get("distance") == "L2" else 2
        x = inputs["embeddings"] if self.params.get("normalize") is False else unit(inputs["embeddings"])
        options = {"least": 3, "neighbors": 4, "power": power}
        picks, scores, _ = plain(x, inputs["clusters"], k, context, candidates, **options)
        return picks, scores, np.zeros(ROWS)

    @pytest.mark.parametrize("k", [1, 20, 26])
    def test_all_rows_can_be_asked_for_in_the_order_of_the_definition(self, local, k):
        inputs, candidates = self.inputs(4), np.arange(ROWS) % 7 > 0
        candidates[[4, 5]] = False
        context = np.array([4, 5])
        k = min(k, candidates.sum())
        picks, scores, _ = self.oracle(inputs, k, context, candidates)
        got = self.select(local, inputs, k, labeled=context, candidates=candidates)
        assert got.indices.tolist() == picks
        np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-9)


class TestTypiclustByDistance(TestTypiclust):
    params: ClassVar = {"min_cluster_size": 3, "neighbors": 4, "distance": "L2", "normalize": False}


class TestTypiclustOnKMeans(StrategyCase):
    """Clusters that only a seed tells: their properties, and those of all strategies."""

    name = "typiclust"
    slice_tolerance = 1e-5
    params: ClassVar = {"min_cluster_size": 1}

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 6))}

    @pytest.mark.parametrize("seed", range(3))
    def test_picks_and_scores_are_those_of_brute_force(self, local, seed):
        """Of the clusters that k-means makes of as many rows as are labelled or asked for."""
        inputs, context = self.inputs(seed), np.array([2, 9])
        points = Points(torch.from_numpy(inputs["embeddings"]), Whole(ROWS), normalize=True)
        labels = k_means(points, 8, seed).labels.numpy()
        candidates = ~np.isin(np.arange(ROWS), context)
        picks, scores, _ = plain(unit(inputs["embeddings"]), labels, 6, context, candidates, least=1)
        got = self.select(local, inputs, 6, seed=seed, labeled=context)
        assert got.indices.tolist() == picks
        np.testing.assert_allclose(got.scores, scores, rtol=1e-9)

    def test_a_shorter_budget_is_a_prefix(self, local):
        """It is not: fewer picks have fewer clusters."""
        assert len(self.select(local, self.inputs(), 3, labeled=[0])) == 3


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("distance", "theirs"), [("SQUARED_L2", "picks_authors"), ("L2", "picks_paper")])
def test_the_picks_are_those_of_the_authors_code(local: Client, dtype, distance, theirs):
    """Digits with 20 labelled rows in 30 clusters: 45 picks, and 10 (tests/data/README.md)."""
    case = np.load(DATA / "typiclust_digits.npz")
    inputs = {"embeddings": case["X"].astype(dtype), "clusters": case["clusters"], "labeled": case["labeled"]}
    for k in (45, 10):
        got = local.select("typiclust", k, **inputs, params={"distance": distance})
        assert got.indices.tolist() == case[theirs][:k].tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_blob_gets_a_pick_near_its_centre(local: Client, dtype, offset):
    rng = np.random.default_rng(0)
    of = rng.permutation(np.repeat(np.arange(7), [90, 70, 60, 50, 40, 30, 20]))
    x = np.round((rng.normal(size=(7, 16))[of] * 20 + rng.normal(size=(360, 16))) * 64) / 64
    for seed in range(5):
        params = {"normalize": False}
        got = local.select("typiclust", 7, embeddings=(x + offset).astype(dtype), params=params, seed=seed)
        assert of[got.indices].tolist() == list(range(7))  # the largest first
        for row, blob in zip(got.indices, range(7), strict=True):
            apart = np.linalg.norm(x[of == blob] - x[of == blob].mean(0), axis=1)
            assert np.linalg.norm(x[row] - x[of == blob].mean(0)) <= np.median(apart)


def test_clusters_with_labelled_rows_come_last(local: Client):
    x, clusters = blobs(0, rows=40), np.repeat([0, 1, 2, 3], 10)
    got = local.select("typiclust", 4, embeddings=x, clusters=clusters, labeled=[0, 1, 20], pending=[11])
    assert clusters[got.indices].tolist() == [3, 1, 2, 0]


def test_when_clusters_run_dry_the_farthest_rows_follow(local: Client):
    x = blobs(1, rows=20)
    clusters = np.repeat([0, 1, 2], [8, 7, 5])
    context, candidates = np.array([0]), np.arange(20) > 0
    picks, scores, near = plain(unit(x), clusters, 19, context, candidates)
    got = local.select("typiclust", 19, embeddings=x, clusters=clusters, labeled=[0])
    assert got.indices.tolist() == picks
    np.testing.assert_allclose(got.scores, scores, rtol=1e-9)
    assert near == 14
    fallback, small = got.warnings
    assert (fallback.code, fallback.rows.tolist()) == ("FALLBACK", picks[near:])
    assert (small.code, small.message) == ("SMALL_CLUSTERS", "1 clusters of at most 5 rows were left out")


def test_when_all_clusters_are_small_a_cold_start_is_the_row_nearest_to_the_mean(local: Client):
    x = np.array([[0.0], [1.0], [4.0], [11.0]])
    params = {"normalize": False}
    got = local.select("typiclust", 3, embeddings=x, clusters=[3, 4, 5, 5], params=params)
    assert got.indices.tolist() == [2, 3, 0]
    assert got.scores.tolist() == [0.0, 7.0, 4.0]
    assert [each.code for each in got.warnings] == ["FALLBACK", "SMALL_CLUSTERS"]
    got = local.select(
        "typiclust", 2, embeddings=x, clusters=[3, 4, 5, 5], params=params, costs=np.ones(4), cost_budget=0.5
    )
    assert len(got) == 0


def test_a_row_alone_is_not_typical_of_anything(local: Client):
    x = np.array([[0.0], [1.0], [5.0]])
    params = {"normalize": False, "min_cluster_size": 0}
    got = local.select("typiclust", 3, embeddings=x, clusters=[8, 8, 2], params=params)
    assert got.indices.tolist() == [0, 2, 1]
    np.testing.assert_allclose(got.scores, [1 / (1 + 1e-5), 0, 0])
    assert not got.warnings


def test_rows_without_length_are_told_when_length_matters(local: Client):
    x = blobs(0, rows=30)
    x[[4, 6]] = 0
    got = local.select("typiclust", 28, embeddings=x, labeled=[0])
    assert (got.warnings[0].code, got.warnings[0].rows.tolist()) == ("INERT_ROWS", [4, 6])
    assert not local.select("typiclust", 2, embeddings=x, params={"normalize": False}).warnings


def test_no_more_than_max_clusters(local: Client):
    """Two clusters of one dimension: their middles, then one more of each."""
    x = np.concatenate([np.linspace(-1, 1, 21), np.linspace(99, 101, 21)])[:, None]
    params = {"normalize": False, "max_clusters": 2}
    got = local.select("typiclust", 4, embeddings=x, params=params)
    assert (x[got.indices, 0] > 50).sum() == 2
    assert [(row > 20) for row in got.indices[:2]] in ([True, False], [False, True])


@pytest.mark.parametrize("tile", [3, 4096])
@pytest.mark.parametrize("closely", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_repeat_one_another_go_to_the_lowest(monkeypatch, tile, closely, dtype):
    """Whatever the tiles, and however few are looked at at a time."""
    monkeypatch.setattr(typicality, "TILE", tile)
    monkeypatch.setattr(typicality, "CLOSELY", closely)
    rng = np.random.default_rng(0)
    for seed in range(20):
        x = np.random.default_rng(seed).integers(-2, 3, (40, 2)).astype(float) + 1000
        points = Points(torch.from_numpy(x).to(dtype), Whole(40))
        members = np.flatnonzero(rng.random(40) < 0.8)
        free = rng.random(len(members)) < 0.7
        rows, means = typicality.neighborhoods(
            points, torch.from_numpy(members), torch.from_numpy(free), 5, squared=False
        )
        score = np.where(free, typical(x, members, 5, 1), -np.inf)
        least = means.min()
        assert int(rows[means == least].min()) == members[np.flatnonzero(score >= score.max() * (1 - 1e-12))[0]]
        np.testing.assert_allclose(1 / (least + 1e-5), score.max())


def test_numbers_of_clusters_are_integers(local: Client):
    with pytest.raises(InvalidInput, match="clusters needs type int"):
        local.select("typiclust", 2, embeddings=np.eye(4), clusters=np.ones(4))
