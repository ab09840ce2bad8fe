"""prob_cover: the greedy written out with the matrix of all pairs, and the authors' picks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from queryselect import Client, InvalidInput, ProbCover
from queryselect_service.kernels import prob_cover
from queryselect_service.maths.distances import Points
from queryselect_service.maths.neighbourhoods import pure_radius
from queryselect_service.shards import Whole
from tests.kernels.leaving import checks
from tests.kernels.test_max_herding import DATA, distances, unit
from tests.strategy_case import LISTS, ROWS, StrategyCase


def cover(x, k, context, candidates, delta, mass=None):
    """Picks, scores and the degrees at the first step of rows x as they are, by the definition."""
    apart, mass = distances(x), np.ones(len(x)) if mass is None else mass
    edges = apart < delta
    covered, free = edges[context].any(0), candidates.copy()
    near = list(context)
    picks, scores, first = [], [], None
    for _ in range(k):
        degree = (edges * np.where(covered, 0, mass)).sum(1)
        first = degree if first is None else first
        if degree[free].max() == 0:
            degree = apart[:, near].min(1)
        picks.append(int(np.where(free, degree, -np.inf).argmax()))
        scores.append(degree[picks[-1]])
        free[picks[-1]] = False
        near.append(picks[-1])
        covered |= edges[picks[-1]]
    return np.array(picks), np.array(scores), first


def radius_of_purity(x, labels, purity):
    """The largest distance of two rows at which so large a part of the balls is pure."""
    apart = distances(x)
    others = np.where(labels[:, None] != labels[None], apart, np.inf).min(1)
    pure = [delta for delta in np.unique(others) if (others >= delta).mean() >= purity]
    return max(pure)


class ProbCoverCase(StrategyCase):
    def test_rows_may_come_in_any_order(self, local):
        """Rows with the same neighbours are ties, whatever the weights; what they cover is the same."""
        inputs, order = self.inputs(), np.random.default_rng(1).permutation(ROWS)
        plain = self.select(local, inputs, 4, labeled=[0, 1])
        moved = self.select(local, self.take(inputs, order), 4, labeled=np.flatnonzero(order < 2))
        assert not plain.warnings
        np.testing.assert_allclose(moved.scores, plain.scores, rtol=1e-12)


class TestProbCover(ProbCoverCase):
    """With weights, since numbers of rows have ties, and a seed that does not matter where delta is given."""

    name, seeded = "prob_cover", False
    params: ClassVar = {"delta": 0.9}

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 4)), "weights": rng.exponential(size=ROWS)}

    def oracle(self, inputs, k, context, candidates):
        return cover(unit(inputs["embeddings"]), k, context, candidates, 0.9, inputs["weights"])


class TestProbCoverOfManyDimensions(TestProbCover):
    """There the lists of all neighbours take less memory than the rows, and are kept."""

    def make(self, rng):
        inputs = super().make(rng)
        return {**inputs, "embeddings": np.pad(inputs["embeddings"], [(0, 0), (0, 96)])}


class TestProbCoverByPurity(ProbCoverCase):
    """Clusters that k-means finds whatever the seed; two rows on their edges are near each other."""

    name, seeded = "prob_cover", False
    params: ClassVar = {"num_classes": 3, "purity": 1.0, "normalize": False}

    def make(self, rng):
        x = 9 * np.eye(4)[np.arange(ROWS) % 3] + rng.normal(size=(ROWS, 4))
        x[27:29] = [[5.5, 3.5, 0, 0], [3.5, 5.5, 0, 0]]
        return {"embeddings": x, "weights": rng.exponential(size=ROWS)}

    def oracle(self, inputs, k, context, candidates):
        x, labels = inputs["embeddings"], np.arange(ROWS) % 3
        return cover(x, k, context, candidates, radius_of_purity(x, labels, 1.0), inputs["weights"])


@pytest.mark.parametrize("kept", [0, 1000])
def test_neighbours_that_are_kept_are_those_that_are_found_again(local: Client, monkeypatch, kept):
    """Ten clusters of rows, so that most rows are covered soon, by picks that were covered before as well."""
    monkeypatch.setattr(prob_cover, "GRAPH", kept)
    rng = np.random.default_rng(0)
    x = 4 * rng.normal(size=(10, 12))[rng.integers(0, 10, 700)] + rng.normal(size=(700, 12))
    context = np.arange(0, 700, 90)
    picks, scores, first = cover(x, 60, context, np.arange(700) % 90 > 0, 4.2)
    params = {"delta": 4.2, "normalize": False}
    got = local.select("prob_cover", 60, embeddings=x, labeled=context, params=params, return_pool_scores=True)
    assert got.indices.tolist() == picks.tolist()
    assert got.scores.tolist() == scores.tolist()
    assert np.array_equal(got.pool_scores[1:90], first[1:90])


@pytest.mark.parametrize("case", ["small", "large"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_the_picks_are_those_of_the_authors_code(local: Client, case, dtype):
    """1500 digits, 40 picks in order (tests/data/README.md)."""
    x, theirs = np.load(DATA / "kcenter_digits.npz")["X"][:1500], np.load(DATA / "prob_cover_digits.npz")
    delta = float(theirs[f"{case}_delta"])
    got = local.select(ProbCover(delta=delta), 40, embeddings=x.astype(dtype), labeled=theirs["labeled"])
    assert got.indices.tolist() == theirs[f"{case}_picks"].tolist()
    assert got.scores.tolist() == theirs[f"{case}_scores"].tolist()


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("delta", [0.2, 0.6, 1.5])
def test_rows_are_counted_where_they_have_no_weights(local: Client, lists, delta):
    """Ties at every step, and rows many times over."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20, 3))[rng.integers(0, 20, ROWS)]
    context = np.array(sorted({*lists.get("labeled", ()), *lists.get("pending", ())}), dtype=int)
    candidates = np.isin(np.arange(ROWS), lists.get("candidates", np.setdiff1d(np.arange(ROWS), context)))
    picks, scores, first = cover(unit(x), 12, context, candidates, delta)
    got = local.select(ProbCover(delta=delta), 12, embeddings=x, return_pool_scores=True, **lists)
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-9)
    assert got.pool_scores.tolist() == np.where(candidates, first, -np.inf).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_row_at_delta_is_outside_exactly(local: Client, dtype):
    """A fixed-point grid at an offset, where hundreds of pairs are at distance delta: 3-4-5 triangles."""
    rng = np.random.default_rng(0)
    x = (rng.integers(0, 12, size=(150, 2)) / 16 + 3).astype(dtype)
    picks, scores, _ = cover(x.astype(np.float64), 60, np.arange(2), np.arange(150) > 1, 5 / 16)
    params = {"delta": 5 / 16, "normalize": False}
    got = local.select("prob_cover", 60, embeddings=x, labeled=[0, 1], params=params)
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-12)


def test_a_far_mean_in_single_precision_changes_nothing(local: Client):
    x = (np.random.default_rng(0).normal(size=(300, 8)) + 1000).astype(np.float32)
    picks, scores, _ = cover(x.astype(np.float64), 100, np.arange(5), np.arange(300) > 4, 2.5)
    params = {"delta": 2.5, "normalize": False}
    for dtype in (np.float32, np.float64):
        got = local.select("prob_cover", 100, embeddings=x.astype(dtype), labeled=np.arange(5), params=params)
        assert got.indices.tolist() == picks.tolist()
        np.testing.assert_allclose(got.scores, scores, rtol=1e-9)


def test_once_all_is_covered_the_farthest_follow_and_that_is_told(local: Client):
    x = np.array([[0.0], [1.0], [10.0], [10.5], [14.0], [11.0]])
    params = {"delta": 5, "normalize": False}
    got = local.select("prob_cover", 5, embeddings=x, labeled=[0], params=params)
    assert got.indices.tolist() == [2, 4, 1, 5, 3]
    assert got.scores.tolist() == [4, 4, 1, 1, 0.5]
    (warning,) = got.warnings
    assert (warning.code, warning.rows.tolist()) == ("COVERED", [4, 1, 5, 3])
    assert "4 picks cover nothing new at delta 5" in warning.message


def test_rows_that_cannot_be_chosen_have_to_be_covered_too(local: Client):
    x = np.array([[0.0], [1.0], [10.0], [10.5], [11.0]])
    params = {"delta": 2, "normalize": False}
    got = local.select("prob_cover", 1, embeddings=x, candidates=[0, 2], params=params)
    assert (got.indices.tolist(), got.scores.tolist()) == ([2], [3])


def test_a_minimum_that_gives_way_lets_go_of_rows_that_cover(local: Client):
    """Class 7 wants two rows that cover nothing; the second is too dear, and other rows are free again."""
    x, costs = np.array([[0.0], [0.0], [0.0], [5.0], [9.0], [9.5]]), [0, 2, 2, 0, 0, 0]
    quota = {"name": "class", "values": [7, 7, 7, 0, 0, 0], "limits": {7: (2, None)}}
    options = {"quotas": [quota], "costs": costs, "cost_budget": 3, "params": {"delta": 1, "normalize": False}}
    got = local.select("prob_cover", 4, embeddings=x, labeled=[0], **options)
    assert got.indices.tolist() == [4, 3, 1, 5]
    assert got.scores.tolist() == [2, 1, 0, 0.5]
    assert [each.code for each in got.warnings] == ["COVERED", "CONSTRAINED"]
    assert got.warnings[0].rows.tolist() == [1, 5]


def test_rows_without_mass_are_covered_by_nobody_and_need_no_cover(local: Client):
    x, params = np.array([[0.0], [1.0], [10.0], [20.0]]), {"delta": 2, "normalize": False}
    for unit_of_mass in (1.0, 1e-290, 1e300):
        weights = np.array([0, 0, 3, 1]) * unit_of_mass
        got = local.select("prob_cover", 4, embeddings=x, weights=weights, params=params)
        assert got.indices.tolist() == [2, 3, 0, 1]
        np.testing.assert_allclose(got.scores, [3 * unit_of_mass, unit_of_mass, 10, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("purity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_radius_is_the_largest_at_which_balls_are_pure(dtype, purity, normalize):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(300, 5)) + 50).to(dtype)
    labels = rng.integers(0, 4, 300)
    exact = x.double().numpy()
    exact = unit(exact) if normalize else exact
    points = Points(x, Whole(300), normalize=normalize)
    found = pure_radius(points, torch.from_numpy(labels), purity)
    np.testing.assert_allclose(found, radius_of_purity(exact, labels, purity), rtol=1e-9)


def test_the_number_of_classes_is_that_of_labels_or_else_of_columns(local: Client):
    x = np.random.default_rng(2).normal(size=(60, 4))
    options = {"embeddings": x, "labeled": [0, 1, 2, 3], "budget": 20}
    expected = {n: local.select(ProbCover(num_classes=n), **options).scores.tolist() for n in (2, 4)}
    assert expected[2] != expected[4]
    p = np.full((60, 4), 0.25)
    for classes, more in (
        (4, {"labels": [7, 5, 1, 0]}),
        (2, {"labels": [7, 5, 5, 7]}),
        (2, {"labels": [7, 5, 5, 7], "probabilities": p}),
        (4, {"probabilities": p}),
        (4, {"logits": p}),
    ):
        assert local.select("prob_cover", **options, **more).scores.tolist() == expected[classes]


def test_what_the_estimate_needs_is_said(local: Client):
    with pytest.raises(InvalidInput, match="needs delta, or to estimate it num_classes, pool"):
        local.select("prob_cover", 1, embeddings=np.eye(3))
    with pytest.raises(InvalidInput, match="has 1: give num_classes, or delta"):
        local.select("prob_cover", 1, embeddings=np.eye(3), labeled=[0, 1], labels=[4, 4])


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_delta_is_above_zero(local: Client, value):
    with pytest.raises(InvalidInput, match="delta must be") as caught:
        local.select("prob_cover", 1, embeddings=np.eye(3), params={"delta": value})
    assert caught.value.field == "strategy.prob_cover.delta"


def test_rows_without_length_are_told_when_length_matters(local: Client):
    x = np.random.default_rng(0).normal(size=(10, 3))
    x[[4, 6]] = 0
    got = local.select(ProbCover(delta=0.5), 5, embeddings=x, labeled=[0])
    assert got.warnings[0].code == "INERT_ROWS"
    assert got.warnings[0].rows.tolist() == [4, 6]


@pytest.mark.parametrize("delta", [1e-300, 1e300])
@pytest.mark.parametrize("factor", [1e-300, 1.0, 1e300])
def test_the_largest_and_the_smallest_radius_are_numbers(local: Client, delta, factor):
    x = np.random.default_rng(0).uniform(-1, 1, size=(30, 3)) * factor
    x[20:] = x[:10]
    picks, _, _ = cover(x / factor, 25, np.arange(2), np.arange(30) > 1, delta / factor)
    got = local.select("prob_cover", 25, embeddings=x, labeled=[0, 1], params={"delta": delta, "normalize": False})
    assert got.indices.tolist() == picks.tolist()
    assert np.isfinite(got.scores).all()


def test_a_caller_who_leaves_is_heard_at_every_step():
    x = torch.randn(400, 8, generator=torch.manual_seed(0))
    assert checks("prob_cover", {"embeddings": x}, {"num_classes": 3}, k=20) > 60
