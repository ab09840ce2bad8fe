"""k-means: the start against a plain one, the result against scikit-learn's, and what holds of any local minimum."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from queryselect_service.errors import Cancelled
from queryselect_service.maths import kmeans
from queryselect_service.maths.distances import Points
from queryselect_service.maths.kmeans import k_means, nearest_centres, start
from queryselect_service.maths.noise import uniform
from queryselect_service.shards import Slices, Whole


def plain_start(x, k, seed, weights):
    """Greedy k-means++ by its definition: a few rows are drawn by w D^2 at every step, and the best of them is kept."""
    noise = [uniform(seed, torch.arange(len(x)), kmeans.NOISE + step).numpy() for step in range(k)]
    rate = weights.astype(float)
    chosen = [int(np.where(rate > 0, np.log(noise[0]) / np.where(rate > 0, rate, 1), -np.inf).argmax())]
    apart = ((x[:, None] - x[None]) ** 2).sum(2)
    while len(chosen) < k:
        rate = weights * apart[chosen].min(0)
        if not rate.any():
            break
        times = np.where(rate > 0, -np.log(noise[len(chosen)]) / np.where(rate > 0, rate, 1), np.inf)
        drawn = [row for row in times.argsort(kind="stable")[: 2 + int(np.log(k))] if rate[row] > 0]
        sums = np.array([weights @ apart[[*chosen, row]].min(0) for row in drawn])
        chosen.append(int(drawn[int((sums <= (1 + 1e-6) * sums.min()).argmax())]))
    return chosen


def blobs(seed, count=6, rows=300, dims=8):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dims))[rng.integers(0, count, rows)] * 5 + rng.normal(size=(rows, dims))


def clustered(x, k, seed=0, weights=None, **options):
    points = Points(torch.from_numpy(x), Whole(len(x)), **options)
    return points, k_means(points, k, seed, None if weights is None else torch.from_numpy(weights))


def inertia(x, labels, weights=None):
    """The weighted sum of squares to the means of the clusters, and those means."""
    weights = np.ones(len(x)) if weights is None else weights
    means = {each: np.average(x[labels == each], axis=0, weights=weights[labels == each]) for each in set(labels)}
    centres = np.stack([means[each] for each in sorted(means)])
    return float((weights * ((x - centres[labels]) ** 2).sum(1)).sum()), centres


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 25), different=st.integers(1, 40))
def test_the_start_is_that_of_the_definition(seed, k, different):
    """With rows that are the same, and rows without weight."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(different, 3))[rng.integers(0, different, 40)]
    weights = rng.integers(0, 3, 40).astype(float)
    weights[rng.integers(40)] = 1
    points = Points(torch.from_numpy(x), Whole(40))
    got = start(points, k, seed, torch.from_numpy(weights))
    assert got.tolist() == x[plain_start(x, k, seed, weights)].tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [2, 6, 17])
def test_the_sum_of_squares_is_about_that_of_scikit_learn(dtype, k):
    ours, theirs = [], []
    for seed in range(8):
        x = blobs(seed).astype(dtype)
        _, found = clustered(x, k, seed)
        ours.append(inertia(x.astype(float), found.labels.numpy())[0])
        theirs.append(KMeans(k, n_init=1, random_state=seed).fit(x).inertia_)
    assert np.mean(ours) < 1.1 * np.mean(theirs)


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 60),
    k=st.integers(1, 70),
    different=st.integers(1, 60),
    weighted=st.booleans(),
    normalize=st.booleans(),
)
def test_it_ends_at_a_local_minimum(seed, n, k, different, weighted, normalize):
    """Centres are the means of their rows, and rows are with the nearest centre, whatever repeats or has no length."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, (different, 2))[rng.integers(0, different, n)].astype(float)
    weights = rng.integers(1, 4, n).astype(float) if weighted else None
    points, found = clustered(x, k, seed, weights, normalize=normalize)
    rows = points.moved(points.embeddings).numpy()
    labels = found.labels.numpy()
    assert len(found.centres) == min(k, len(np.unique(rows, axis=0))) == len(set(labels))
    _, centres = inertia(rows, labels, weights)
    np.testing.assert_allclose(found.centres, centres, atol=1e-12)
    mass = np.ones(n) if weights is None else weights / weights.max()
    np.testing.assert_allclose(found.masses, np.bincount(labels, mass))
    apart = np.linalg.norm(rows[:, None] - centres[None], axis=2)
    np.testing.assert_allclose(apart[np.arange(n), labels], apart.min(1), atol=1e-7)
    np.testing.assert_allclose(found.distances(points), apart.min(1), atol=1e-7)


def test_the_sum_of_squares_never_rises(monkeypatch):
    x = blobs(3).astype(np.float32)
    sums = []
    for iterations in range(1, 40):
        monkeypatch.setattr(kmeans, "ITERATIONS", iterations)
        _, found = clustered(x, 9)
        sums.append(inertia(x.astype(float), found.labels.numpy())[0])
    assert (np.diff(sums) <= 1e-9 * sums[0]).all()
    assert sums[-1] < sums[0]
    assert sums[-1] == sums[-2]


def test_a_cluster_that_runs_empty_starts_anew_at_the_farthest_row(monkeypatch):
    """A start with a centre far from every row: Lloyd's iterations alone would leave it without any."""
    x = np.array([[0.0], [1.0], [2.0], [10.0]])
    monkeypatch.setattr(kmeans, "start", lambda *_: torch.tensor([[0.0], [1.5], [500.0]]).double())
    _, found = clustered(x, 3)
    labels = found.labels.tolist()
    assert len(set(labels)) == 3
    assert labels[3] not in labels[:3]


def test_a_far_mean_costs_no_digits_in_single_precision():
    """At a distance of 1000, rows in steps that float32 holds exactly: the same clusters as at the origin."""
    x = np.round(blobs(1) * 64) / 64
    _, near = clustered(x, 6)
    points, far = clustered((x + 1000).astype(np.float32), 6)
    assert far.labels.tolist() == near.labels.tolist()
    found, (_, centres) = far.distances(points).numpy(), inertia(x, near.labels.numpy())
    np.testing.assert_allclose(found, np.linalg.norm(x - centres[near.labels], axis=1))
    assert found.max() > 1


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30, 1e300])
def test_the_largest_and_the_smallest_numbers_are_numbers(factor):
    points, found = clustered(blobs(0, rows=50) * factor, 4)
    assert found.centres.isfinite().all()
    assert found.distances(points).isfinite().all()
    assert len(found.centres) == (4 if factor else 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_start_among_some_rows_is_as_good(monkeypatch, weighted):
    """Nine in ten rows have no weight, or next to none: the start still finds those that count."""
    ours, theirs = [], []
    for seed in range(12):
        x = blobs(seed, rows=3000)
        weights = np.where(np.arange(3000) % 10, 1e-9, 1.0) if weighted else None
        found = []
        for rows in (10, 10**9):
            monkeypatch.setattr(kmeans, "START", rows)
            _, clusters = clustered(x, 6, seed, weights)
            found.append(inertia(x, clusters.labels.numpy(), weights)[0])
        ours.append(found[0])
        theirs.append(found[1])
    assert np.median(ours) < 1.02 * np.median(theirs)


def test_rows_that_are_rare_have_clusters_though_the_start_does_not_see_them():
    x = np.zeros((5000, 3))
    x[::1000] = np.arange(15).reshape(5, 3) + 1
    _, found = clustered(x, 6)
    assert len(found.centres) == 6
    assert sorted(found.masses.tolist()) == [1, 1, 1, 1, 1, 4995]


def _clusters(group, x, k):
    points = Points(x, Slices(len(x), group))
    found = k_means(points, k, 5)
    return found.labels.tolist(), found.centres.tolist(), found.masses.tolist()


@pytest.mark.parametrize("cuts", [[0, 7, 300], [0, 100, 100, 300]], ids=str)
@pytest.mark.parametrize("different", [300, 12])
@pytest.mark.parametrize("k", [15, 5])
def test_slices_make_the_clusters_of_the_whole(slices, cuts, different, k):
    """Of 300 rows: the start looks at all for the many clusters, and at some for the few."""
    x = torch.from_numpy(blobs(2)[np.arange(300) % different])
    found = slices.run(_clusters, *((x[a:b].clone(), k) for a, b in pairwise(cuts)))
    whole = k_means(Points(x, Whole(300)), k, 5)
    assert [label for labels, _, _ in found for label in labels] == whole.labels.tolist()
    for _, centres, masses in found:
        np.testing.assert_allclose(centres, whole.centres, atol=1e-12)
        assert masses == whole.masses.tolist()


def test_it_stops_when_the_caller_has_gone():
    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls > 40:
            raise Cancelled("gone")

    x = torch.from_numpy(blobs(0))
    with pytest.raises(Cancelled):
        k_means(Points(x, Whole(300, check)), 20, 0)
    assert calls == 41


def test_rows_go_to_the_nearest_centre_and_their_distance_is_told():
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    points = Points(torch.from_numpy(x), Whole(200))
    centres = points.moved(points.embeddings[:30])
    labels, squared = nearest_centres(points, centres)
    apart = ((x[:, None].astype(float) - x[None, :30]) ** 2).sum(2)
    assert labels.tolist() == apart.argmin(1).tolist()
    np.testing.assert_allclose(squared, apart.min(1), atol=1e-5)
