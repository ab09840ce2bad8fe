"""max_herding: the greedy written out with the matrix of all pairs, and the authors' picks."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from queryselect import Client, InvalidInput, MaxHerding, UncertaintyHerding
from queryselect_service.maths import herding
from tests.kernels.leaving import checks
from tests.strategy_case import CUTS, ROWS, StrategyCase, assert_promised

DATA = Path(__file__).parent.parent / "data"


def unit(x):
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths == 0, 1, lengths)


def distances(x):
    return np.linalg.norm(x[:, None] - x[None], axis=2)


def least_distance(x):
    apart = distances(x)
    return apart[apart > 0].min(initial=np.inf)


def herd(x, k, context, candidates, *, h=1.0, adaptive=False, mass=None):
    """Picks, gains and the gains at the first step of rows x as they are, by the definition."""
    if adaptive and np.isfinite(least_distance(x[context])):
        h = least_distance(x[context])
    kernel, mass = np.exp(-((distances(x) / h) ** 2)), np.ones(len(x)) if mass is None else mass
    seen, free = kernel[:, context].max(1, initial=0.0), candidates.copy()
    picks, scores, first = [], [], None
    for _ in range(k):
        gains = (mass[:, None] * np.maximum(kernel - seen[:, None], 0)).mean(0)
        gains = np.where(gains < 1e-13, 0, gains)  # what is left of a difference of equal numbers
        first = gains if first is None else first
        best = np.where(free, gains, -np.inf).max()
        picks.append(int(np.flatnonzero(free & (gains >= best * (1 - 1e-10)))[0]))
        scores.append(gains[picks[-1]])
        free[picks[-1]] = False
        seen = np.maximum(seen, kernel[:, picks[-1]])
    return np.array(picks), np.array(scores), first


class TestMaxHerding(StrategyCase):
    name = "max_herding"
    slice_tolerance = 1e-5

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 7))}

    def oracle(self, inputs, k, context, candidates):
        return herd(unit(inputs["embeddings"]), k, context, candidates)


class TestMaxHerdingOfRowsAsTheyAre(StrategyCase):
    """With weights, and a bandwidth that the labelled rows give."""

    name, slice_tolerance = "max_herding", 1e-5
    params: ClassVar = {"normalize": False, "adaptive_bandwidth": True, "bandwidth": 2.5}

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 4)), "weights": rng.exponential(size=ROWS)}

    def oracle(self, inputs, k, context, candidates):
        options = {"h": 2.5, "adaptive": True, "mass": inputs["weights"]}
        return herd(inputs["embeddings"], k, context, candidates, **options)


@pytest.mark.parametrize(("case", "h"), [("cold", 1.0), ("half", 0.5), ("one", 1.0)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_the_picks_are_those_of_the_authors_code(local: Client, case, h, dtype):
    """Digits, 40 picks in order (tests/data/README.md)."""
    x, theirs = np.load(DATA / "kcenter_digits.npz")["X"].astype(dtype), np.load(DATA / "herding_digits.npz")
    got = local.select(MaxHerding(bandwidth=h), 40, embeddings=x, labeled=theirs[f"{case}_labeled"])
    assert got.indices.tolist() == theirs[f"{case}_picks"].tolist()
    assert (np.diff(got.scores) < 0).all()


@pytest.mark.parametrize("h", [0.3, 2.0, 6.0])
def test_lazy_is_plain_greedy_to_the_last_row(local: Client, h):
    """Rows many times over, so that most gains are ties or nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5))[rng.integers(0, 60, 400)]
    context = np.arange(3)
    picks, scores, first = herd(x, 397, context, np.arange(400) > 2, h=h)
    params = {"bandwidth": h, "normalize": False}
    got = local.select("max_herding", 397, embeddings=x, labeled=context, params=params, return_pool_scores=True)
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got.pool_scores[3:], first[3:], rtol=1e-9, atol=1e-12)


def test_rows_without_structure_are_no_more_work_than_a_few_matrices_of_pairs(local: Client, monkeypatch):
    """There every pick takes a little from every gain, so that going by earlier gains alone is all pairs for a pick."""
    x, pairs, kernel = np.random.default_rng(0).normal(size=(800, 300)), [], herding.Coverage._kernel

    def counted(self, some, centres):
        found = kernel(self, some, centres)
        pairs.append(found.numel())
        return found

    monkeypatch.setattr(herding.Coverage, "_kernel", counted)
    picks, scores, _ = herd(unit(x), 80, np.arange(0), np.ones(800, bool))
    got = local.select("max_herding", 80, embeddings=x)
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-9)
    assert sum(pairs) / 800**2 < 9


@pytest.mark.parametrize("h", [4.0, 1e-3])
def test_a_far_mean_in_single_precision_changes_nothing(local: Client, h):
    """With the small bandwidth distances are computed by differences: there a row sees hardly more than itself."""
    x = (np.random.default_rng(0).normal(size=(300, 16)) + 1000).astype(np.float32)
    x[200:] = x[:100] + np.float32(0.0005)
    picks, scores, _ = herd(x.astype(np.float64), 60, np.arange(5), np.arange(300) > 4, h=h)
    params = {"normalize": False, "bandwidth": h}
    for dtype in (np.float32, np.float64):
        got = local.select("max_herding", 60, embeddings=x.astype(dtype), labeled=np.arange(5), params=params)
        assert got.indices.tolist() == picks.tolist()
        np.testing.assert_allclose(got.scores, scores, rtol=1e-9)


@pytest.mark.parametrize("dims", [1, 5, 50])
@pytest.mark.parametrize("h", [0.01, 0.03, 0.125, 0.5, 10.0])
def test_narrow_kernels_change_no_pick(local: Client, h, dims):
    """The narrower a kernel, the more exponents are wrong in float32. Some rows are there twice, some nearly."""
    rng, candidates = np.random.default_rng(dims), np.arange(240) > 2
    x = rng.normal(size=(120, dims))[rng.integers(0, 120, 240)]
    x[80:] += rng.normal(size=(160, dims)) * 0.3 * h / np.sqrt(dims)
    mass = np.where(candidates, rng.choice([0.25, 0.5, 1.0], 240), 0)
    picks, scores, _ = herd(unit(x), 60, np.arange(3), candidates, h=h)
    got = local.select(MaxHerding(bandwidth=h), 60, embeddings=x, labeled=[0, 1, 2])
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-12)
    picks, scores, _ = herd(unit(x), 60, np.arange(3), candidates, h=h, mass=mass)
    unsure = {"probabilities": np.stack([1 - mass / 2, mass / 2], axis=1)}  # 1 - p of the likeliest + that of the other
    got = local.select(UncertaintyHerding(bandwidth=h), 60, embeddings=x, labeled=[0, 1, 2], **unsure)
    assert got.indices.tolist() == picks.tolist()
    np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-12)


def test_where_every_row_sees_itself_alone_the_lowest_is_next(local: Client):
    x = np.random.default_rng(0).normal(size=(300, 8))
    got = local.select(MaxHerding(bandwidth=0.02), 50, embeddings=x, labeled=[0, 7])
    assert got.indices.tolist() == [row for row in range(53) if row not in {0, 7}][:50]
    np.testing.assert_allclose(got.scores, 1 / 300, rtol=1e-9)


def test_weights_move_the_picks(local: Client):
    """Three pairs of rows far apart: the heaviest is seen to first; a row without mass is left to the end."""
    x = np.repeat(np.eye(3), 2, axis=0) * 100
    for unit_of_mass in (1.0, 1e-300, 1e307):
        weights = np.array([1, 1, 3, 3, 0, 0]) * unit_of_mass
        got = local.select("max_herding", 6, embeddings=x, weights=weights, params={"normalize": False})
        assert got.indices.tolist() == [2, 0, 1, 3, 4, 5]
        np.testing.assert_allclose(got.scores / unit_of_mass, [1, 1 / 3, 0, 0, 0, 0], atol=1e-15)


def test_the_bandwidth_is_given_where_labelled_rows_give_none(local: Client):
    x = np.random.default_rng(3).normal(size=(40, 3))
    x[1] = x[0]
    for labeled in ([0], [0, 1], []):
        plain, adaptive = (
            local.select(MaxHerding(bandwidth=0.7, adaptive_bandwidth=some), 9, embeddings=x, labeled=labeled)
            for some in (False, True)
        )
        assert adaptive.indices.tolist() == plain.indices.tolist()
        assert adaptive.scores.tolist() == plain.scores.tolist()


def test_rows_without_length_are_told_when_length_matters(local: Client):
    x = np.random.default_rng(0).normal(size=(10, 3))
    x[[4, 6]] = 0
    got = local.select("max_herding", 9, embeddings=x, labeled=[0])
    picks, _, _ = herd(unit(x), 9, np.array([0]), np.arange(10) > 0)
    assert got.indices.tolist() == picks.tolist()
    assert [(warning.code, warning.rows.tolist()) for warning in got.warnings] == [
        ("INERT_ROWS", [4, 6]),
        ("COVERED", [6]),  # by row 4, which is the same
    ]
    assert not local.select(MaxHerding(normalize=False), 3, embeddings=x, labeled=[0]).warnings


def test_a_minimum_that_gives_way_lets_go_of_rows_with_a_gain(local: Client):
    """Class 7 wants two rows that add nothing; the second is too dear, and other rows are free again."""
    x, costs = np.array([[0.0], [0.0], [0.0], [5.0], [9.0]]), [0, 2, 2, 0, 0]
    quota = {"name": "class", "values": [7, 7, 7, 0, 0], "limits": {7: (2, None)}}
    options = {"quotas": [quota], "costs": costs, "cost_budget": 3, "params": {"normalize": False}}
    got = local.select("max_herding", 3, embeddings=x, labeled=[0], **options)
    assert got.indices.tolist() == [3, 1, 4]
    assert got.scores[1] == 0
    assert got.scores[2] > 0


@pytest.mark.parametrize("cuts", CUTS[1:], ids=str)
def test_slices_of_distances_by_differences(slices, cuts):
    case = TestMaxHerdingOfRowsAsTheyAre()
    case.params = {"normalize": False, "bandwidth": 1e-4}
    x = case.inputs()
    x["embeddings"] = (np.repeat(x["embeddings"][:15], 2, axis=0) + 50) * 10
    inputs = {name: torch.from_numpy(each) for name, each in x.items()}
    whole, sliced = case.whole_and_sliced(slices, cuts, inputs, 28, labeled=[4, 20])
    assert_promised(whole, sliced, 1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_bandwidth_is_above_zero(local: Client, value):
    with pytest.raises(InvalidInput, match="bandwidth must be") as caught:
        local.select("max_herding", 1, embeddings=np.eye(3), params={"bandwidth": value})
    assert caught.value.field == "strategy.max_herding.bandwidth"


def test_a_caller_who_leaves_is_heard_at_every_step():
    x = torch.randn(400, 8, generator=torch.manual_seed(0))
    assert checks("max_herding", {"embeddings": x}, {"adaptive_bandwidth": True}, k=20) > 60
