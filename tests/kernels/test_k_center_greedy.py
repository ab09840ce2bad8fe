"""k_center_greedy: exact in every float type, far offsets and exact ties included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from queryselect import Client, KCenterGreedy
from queryselect_service.maths.distances import Points
from queryselect_service.shards import Whole
from tests.strategy_case import CUTS, ROWS, StrategyCase, assert_promised

DATA = Path(__file__).parent.parent / "data"


def farthest_first(x, k, context, candidates):
    """The definition, by direct differences in float64, ties to the lowest row."""
    x = x.astype(np.float64)
    free = candidates.copy()
    picks, scores = [], []
    if len(context):
        distance = np.linalg.norm(x[:, None] - x[context][None], axis=2).min(1)
        first = distance.copy()
    else:
        to_mean = np.linalg.norm(x - x.mean(0), axis=1)
        first = -to_mean
        picks.append(int(np.where(free, to_mean, np.inf).argmin()))
        scores.append(to_mean[picks[0]])
        free[picks[0]] = False
        distance = np.linalg.norm(x - x[picks[0]], axis=1)
    while len(picks) < k:
        best = int(np.where(free, distance, -np.inf).argmax())
        picks.append(best)
        scores.append(distance[best])
        free[best] = False
        distance = np.minimum(distance, np.linalg.norm(x - x[best], axis=1))
    return np.array(picks), np.array(scores), first


class TestKCenterGreedy(StrategyCase):
    name = "k_center_greedy"

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 7))}

    def oracle(self, inputs, k, context, candidates):
        return farthest_first(inputs["embeddings"], k, context, candidates)

    @pytest.mark.parametrize("cuts", CUTS[1:], ids=str)
    def test_slices_of_rows_far_away_score_the_first_pick_alike(self, slices, cuts):
        for seed in range(5):
            inputs = {"embeddings": torch.from_numpy(self.inputs(seed)["embeddings"] + 1e8)}
            assert_promised(*self.whole_and_sliced(slices, cuts, inputs, 6), 1e-9)


class TestKCenterGreedyNormalized(StrategyCase):
    name, params = "k_center_greedy", {"normalize": True}

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 7))}

    def oracle(self, inputs, k, context, candidates):
        x = inputs["embeddings"]
        return farthest_first(x / np.linalg.norm(x, axis=1, keepdims=True), k, context, candidates)


def test_the_picks_are_those_of_the_authors_code(local: Client):
    """Digits with 20 labelled rows: 40 picks by the published core-set code in float64 (tests/data/README.md)."""
    case = np.load(DATA / "kcenter_digits.npz")
    for dtype in (np.float64, np.float32, np.float16):
        got = local.select("k_center_greedy", 40, embeddings=case["X"].astype(dtype), labeled=case["labeled"])
        assert got.indices.tolist() == case["picks"].tolist()


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.9, 4.1, 1e3, 1e5])  # rows are moved from about 4 on
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_far_mean_changes_nothing(local: Client, offset, dtype):
    x = (np.random.default_rng(0).normal(size=(500, 16)) + offset).astype(dtype)
    picks, scores, _ = farthest_first(x, 60, np.arange(5), np.arange(500) > 4)
    got = local.select("k_center_greedy", 60, embeddings=x, labeled=np.arange(5))
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-12)


def test_far_clusters_do_not_blur_what_is_near(local: Client):
    """Norms of 1e4 and distances of 1: the fast distances can't tell the rows apart, the exact ones do."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300, 8)) + rng.choice([-1e4, 1e4], size=(300, 1))).astype(np.float32)
    picks, scores, _ = farthest_first(x, 40, np.arange(2), np.arange(300) > 1)
    got = local.select("k_center_greedy", 40, embeddings=x, labeled=[0, 1])
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_exact_ties_of_a_grid_stay_ties(local: Client, dtype):
    """Rows of a fixed-point grid at an offset: hundreds of exact ties, each to the lowest row."""
    rng = np.random.default_rng(1)
    x = (rng.integers(0, 4, size=(200, 3)) / 16 + 3).astype(dtype)
    picks, scores, _ = farthest_first(x, 100, np.array([7]), np.arange(200) != 7)
    got = local.select("k_center_greedy", 100, embeddings=x, labeled=[7])
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-12)


def test_when_every_row_is_covered_the_rest_is_told(local: Client):
    x = np.repeat(np.eye(3), 4, axis=0)
    got = local.select("k_center_greedy", 6, embeddings=x, labeled=[0])
    assert got.indices.tolist() == [4, 8, 1, 2, 3, 5]
    assert got.scores[2:].tolist() == [0, 0, 0, 0]
    (warning,) = got.warnings
    assert warning.code == "COVERED"
    assert warning.rows.tolist() == [1, 2, 3, 5]


def test_when_every_row_is_covered_limits_still_hold(local: Client):
    x = np.repeat(np.eye(3), 4, axis=0)
    got = local.select("k_center_greedy", 6, embeddings=x, labeled=[0], groups=np.arange(12) % 4)
    assert got.indices.tolist() == [4, 9, 2, 3]
    assert got.scores[2:].tolist() == [0, 0]
    assert got.stop_reason == "QUOTAS"
    assert [each.code for each in got.warnings] == ["COVERED", "CONSTRAINED"]
    assert got.warnings[0].rows.tolist() == [2, 3]


def test_covered_rows_that_a_quota_wants_do_not_hide_those_behind_them(local: Client):
    """Class 7 wants two rows that repeat the labelled one; the second is too dear, and other rows are free again."""
    x, costs = np.array([[0.0], [0.0], [0.0], [5.0], [9.0]]), [0, 2, 2, 0, 0]
    quota = {"name": "class", "values": [7, 7, 7, 0, 0], "limits": {7: (2, None)}}
    got = local.select("k_center_greedy", 3, embeddings=x, labeled=[0], quotas=[quota], costs=costs, cost_budget=3)
    assert got.indices.tolist() == [4, 1, 3]
    assert got.scores.tolist() == [9, 0, 4]
    assert got.stop_reason == "MAX_ITEMS"
    covered, constrained = got.warnings
    assert covered.rows.tolist() == [1]
    assert constrained.message == "quota 'class': value 7 wants at least 2, has 1: 2 candidates"


def test_limits_may_leave_no_row_for_a_cold_start(local: Client):
    got = local.select("k_center_greedy", 2, embeddings=np.eye(3), costs=np.ones(3), cost_budget=0.5)
    assert len(got) == 0
    assert got.stop_reason == "MAX_COST"


def test_rows_without_length_are_told_when_length_matters(local: Client):
    x = np.random.default_rng(0).normal(size=(10, 3))
    x[[4, 6]] = 0
    got = local.select(KCenterGreedy(normalize=True), 9, embeddings=x, labeled=[0], excluded=[])
    assert [each.code for each in got.warnings] == ["INERT_ROWS", "COVERED"]
    assert got.warnings[0].rows.tolist() == [4, 6]
    assert not local.select(KCenterGreedy(), 3, embeddings=x, labeled=[0]).warnings


def test_the_cold_start_is_the_row_nearest_to_the_mean(local: Client):
    x = np.array([[0.0], [1.0], [4.0], [11.0]])
    got = local.select("k_center_greedy", 2, embeddings=x, return_pool_scores=True)
    assert got.indices.tolist() == [2, 3]
    assert got.scores.tolist() == [0.0, 7.0]
    assert got.pool_scores.tolist() == [-4.0, -3.0, 0.0, -7.0]
    assert local.select("k_center_greedy", 1, embeddings=x, candidates=[0, 1]).indices.tolist() == [1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_and_the_smallest_numbers_are_numbers(local: Client, dtype):
    """Squares of these overflow, or vanish; distances don't."""
    x = np.random.default_rng(0).uniform(-0.4, 0.4, size=(40, 3))
    picks, _, _ = farthest_first(x, 10, np.array([0]), np.arange(40) > 0)
    big = (x * np.finfo(dtype).max).astype(dtype)
    got = local.select("k_center_greedy", 10, embeddings=big, labeled=[0])
    assert got.indices.tolist() == picks.tolist()
    grid = np.round(x * 16)
    picks, _, _ = farthest_first(grid, 10, np.array([0]), np.arange(40) > 0)
    small = (grid * np.finfo(dtype).smallest_subnormal).astype(dtype)
    got = local.select("k_center_greedy", 10, embeddings=small, labeled=[0])
    assert got.indices.tolist() == picks.tolist()
    assert np.isfinite(got.scores).all()


def unit(x):
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths == 0, 1, lengths)


HARD = {
    "a cone: all directions close together": lambda rng, d: 1 + 1e-5 * rng.normal(size=(300, d)),
    "unit noise far away": lambda rng, d: 1e4 + rng.normal(size=(300, d)),
    "two labelled outliers": lambda rng, d: np.concatenate([[[3e21] * d, [-1e23] * d], rng.normal(size=(298, d))]),
    "squares that vanish": lambda rng, d: np.concatenate([[[1.0] * d, [-1.0] * d], 1e-22 * rng.normal(size=(298, d))]),
    "two far clusters": lambda rng, d: rng.normal(size=(300, d)) + rng.choice([-300.0, 300.0], size=(300, 1)),
    "heavy tails": lambda rng, d: rng.standard_cauchy(size=(300, d)),
    "integers": lambda rng, d: rng.integers(-3, 4, size=(300, d)).astype(float),
}


@pytest.mark.parametrize("dims", [2, 16, 64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", HARD)
def test_hard_data_in_single_precision(local: Client, kind, normalize, dims):
    """The picks are those of float64 until the two best scores differ by less than 1e-9, relative."""
    x = HARD[kind](np.random.default_rng(dims), dims).astype(np.float32)
    options = {"budget": 80, "labeled": [0, 1], "params": {"normalize": normalize}}
    got = local.select("k_center_greedy", embeddings=x, **options)
    exact = x.astype(np.float64)
    exact, noise = (unit(exact), 1e-15) if normalize else (exact, 0)  # a unit row is rounded itself
    distance = np.linalg.norm(exact[:, None] - exact[:2][None], axis=2).min(1)
    for row, score in got:
        free = np.delete(distance, [0, 1])
        assert distance[row] >= free.max() * (1 - 1e-9) - noise
        np.testing.assert_allclose(score, distance[row], rtol=1e-9, atol=noise)
        distance = np.minimum(distance, np.linalg.norm(exact - exact[row], axis=1))
        distance[row] = 0


@pytest.mark.parametrize("dims", [1, 3, 64, 384])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", HARD)
def test_fast_distances_keep_within_their_bound(kind, normalize, dims):
    """What the kernel's exactness hangs on: a fast squared distance is wrong by less than it says."""
    x = torch.from_numpy(HARD[kind](np.random.default_rng(0), dims).astype(np.float32))
    points = Points(x, Whole(len(x)), normalize=normalize)
    for centres in (x[:1], x[:40]):
        fast = torch.full((len(x),), np.inf)
        points.update_nearest(fast, centres)
        exact = points.direct(torch.arange(len(x)), centres).square()
        wrong, bound = (fast.double() - exact).abs(), points.error_bound(fast).double()
        assert (wrong <= bound).all(), f"{(wrong / bound).max():.2f} times the bound"


def test_a_cold_start_is_exact_on_unit_rows(local: Client):
    x = (1 + 1e-5 * np.random.default_rng(0).normal(size=(300, 4))).astype(np.float32)
    exact = unit(x.astype(np.float64))
    to_mean = np.linalg.norm(exact - exact.mean(0), axis=1)
    got = local.select(KCenterGreedy(normalize=True), 1, embeddings=x, return_pool_scores=True)
    assert got.indices[0] == to_mean.argmin()
    np.testing.assert_allclose(-got.pool_scores, to_mean, rtol=1e-9)


def test_a_process_that_allows_coarse_products_gets_the_same_picks(local: Client):
    """torch.set_float32_matmul_precision is the caller's own, in their own process."""
    x = np.random.default_rng(0).normal(size=(500, 32)).astype(np.float32)
    plain = local.select("k_center_greedy", 60, embeddings=x, labeled=[0])
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            coarse = local.select("k_center_greedy", 60, embeddings=x, labeled=[0])
            assert coarse.indices.tolist() == plain.indices.tolist()
    finally:
        torch.set_float32_matmul_precision(before)
