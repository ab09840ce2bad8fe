"""Farthest-first traversal by a frontier: the picks of looking at every row every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from queryselect_service.choice import Choice, Limits
from queryselect_service.maths import farthest
from queryselect_service.maths.distances import Points
from queryselect_service.maths.farthest import FarthestFirst
from queryselect_service.quotas import Quota
from queryselect_service.shards import Whole


def definition(x, centres, k, free=None):
    """By direct differences in float64, ties to the lowest row."""
    x = x.astype(np.float64)
    free = np.ones(len(x), dtype=bool) if free is None else free.copy()
    distance = np.linalg.norm(x[:, None] - x[centres][None], axis=2).min(1)
    rows, found = [], []
    for _ in range(k):
        best = int(np.where(free, distance, -np.inf).argmax())
        rows.append(best)
        found.append(distance[best])
        free[best] = False
        distance = np.minimum(distance, np.linalg.norm(x - x[best], axis=1))
    return rows, found


def traverse(x, centres, k, *, limits=None, free=None):
    points = Points(torch.from_numpy(x), Whole(len(x)))
    candidates = torch.ones(len(x), dtype=torch.bool) if free is None else torch.from_numpy(free)
    traversal = FarthestFirst(points, Choice(k, candidates, points.pool, limits))
    for each in centres:
        traversal.add(torch.from_numpy(x[[each]]))
    rows, found = traversal.pick(k)
    return rows.tolist(), found.tolist()


def kinds(rng, n):
    """Rows that are apart, on a grid with many exact ties, in far clusters, and nearly all the same."""
    grid = rng.integers(0, 6, (n, 3)).astype(np.float32)
    clusters = (1000 * rng.integers(0, 3, (n, 1)) + rng.normal(size=(n, 5))).astype(np.float32)
    twins = np.repeat(rng.normal(size=(max(1, n // 40), 4)), 40, axis=0)[:n].astype(np.float32)
    return {"apart": rng.normal(size=(n, 8)), "grid": grid, "clusters": clusters, "twins": twins}


@pytest.mark.parametrize("kind", ["apart", "grid", "clusters", "twins"])
@pytest.mark.parametrize(("frontier", "crowd"), [(1, 0), (1, 1000), (7, 3), (256, 1024)])
def test_the_picks_are_those_of_the_definition(monkeypatch, kind, frontier, crowd):
    monkeypatch.setattr(farthest, "FRONTIER", frontier)
    monkeypatch.setattr(farthest, "CROWD", crowd)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = kinds(rng, 400)[kind]
        free = rng.random(400) < 0.8
        centres = rng.choice(400, 3, replace=False)
        free[centres] = False
        rows, found = traverse(x, centres, 60, free=free)
        wanted, distances = definition(x, centres, 60, free)
        assert rows == wanted
        np.testing.assert_allclose(found, distances, rtol=1e-12, atol=1e-12)


def test_most_picks_come_without_another_look_at_all_rows(monkeypatch):
    rng = np.random.default_rng(0)
    looks = []
    update = Points.update_nearest

    def counted(self, nearest, centres):
        looks.append(len(centres))
        update(self, nearest, centres)

    monkeypatch.setattr(Points, "update_nearest", counted)
    x = rng.normal(size=(20_000, 16)).astype(np.float32)
    rows, _ = traverse(x, [0], 200)
    assert len(set(rows)) == 200
    assert len(looks) < 20
    assert max(looks) > 20


def test_limits_hold_within_a_frontier(monkeypatch):
    monkeypatch.setattr(farthest, "FRONTIER", 20)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 6))
    groups = rng.integers(0, 5, 500)
    limits = Limits(quotas=(Quota("", 4),), values=(torch.from_numpy(groups),))
    rows, _ = traverse(x, [0], 20, limits=limits)
    assert np.bincount(groups[rows]).tolist() == [4] * 5
    free, wanted = np.ones(500, dtype=bool), []
    for _ in range(20):
        wanted += definition(x, [0, *wanted], 1, free & (np.bincount(groups[wanted], minlength=5) < 4)[groups])[0]
        free[wanted] = False
    assert rows == wanted
