"""BAIT of one logit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from queryselect_service.maths import rank_one, sieve
from tests.kernels import fisher
from tests.kernels.fisher import Design
from tests.kernels.test_bait import FisherCase, pool
from tests.strategy_case import ROWS


class TestBaitBinary(FisherCase):
    name = "bait_binary"

    def information(self, inputs):
        return fisher.binary(inputs["embeddings"], inputs["probabilities"])


class TestBaitBinaryBySieve(TestBaitBinary):
    """Where inputs are not float64, few rows are computed in it."""

    @pytest.fixture(autouse=True)
    def always(self, monkeypatch):
        monkeypatch.setattr(sieve, "LEAST_ENTRIES", 0)


def test_labels_count_together(local):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((ROWS, 5))
    q = 1 / (1 + np.exp(-x @ rng.standard_normal((5, 3))))
    design = Design(x, fisher.labels_together(x, q), 6, np.array([2]))
    picks, scores, _ = design.greedy(6, np.arange(ROWS) != 2)
    got = local.select("bait_binary", 6, embeddings=x, probabilities=q, task="MULTILABEL", labeled=[2])
    assert got.indices.tolist() == picks
    np.testing.assert_allclose(got.scores, scores, rtol=1e-8)


def test_an_unsure_model_is_warned_of(local):
    rng = np.random.default_rng(3)
    x, z = rng.standard_normal((ROWS, 5)), rng.standard_normal((ROWS, 12))
    got = local.select("bait_binary", 3, embeddings=x, logits=z / 2)
    (warning,) = got.warnings
    assert warning.code == "LOW_CONFIDENCE"
    assert "take bait" in warning.message
    assert not local.select("bait_binary", 3, embeddings=x, logits=9 * z).warnings


@pytest.mark.parametrize("depth", [1, 2, 7, 64])
@pytest.mark.parametrize("team", [1, 3, 30])
def test_guesses_change_nothing(local, monkeypatch, depth, team):
    """However many picks are guessed at once, and among however few rows: no pick that is not the best stands."""
    monkeypatch.setattr(rank_one, "DEPTH", depth)
    monkeypatch.setattr(rank_one, "LEAST_TEAM", team)
    for seed in range(5):
        inputs = pool(np.random.default_rng(seed), dims=3)
        inputs["embeddings"][5:9] = inputs["embeddings"][4]  # ties
        inputs["probabilities"][5:9] = inputs["probabilities"][4]
        design = Design(inputs["embeddings"], fisher.binary(**inputs), 12, np.array([], dtype=int))
        picks, scores, _ = design.greedy(12, np.ones(ROWS, dtype=bool))
        got = local.select("bait_binary", 12, **inputs)
        np.testing.assert_allclose(got.scores, scores, rtol=1e-8)
        assert got.indices.tolist() == picks


@pytest.mark.parametrize("seed", range(3))
def test_gains_that_fall_far_within_a_pass_keep_their_digits(local, seed):
    """Few places with many rows each, nearly the same: once each place has its pick, almost nothing is left to gain."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, 20))[rng.integers(0, 12, 400)] + 1e-5 * rng.standard_normal((400, 20))
    p = fisher.softmax(3 * x @ rng.standard_normal((20, 4)) + rng.standard_normal((400, 4)))
    design = Design(x, fisher.binary(x, p), 20, np.array([], dtype=int), ridge=1e-5)
    picks, scores, _ = design.greedy(20, np.ones(400, dtype=bool))
    got = local.select("bait_binary", 20, embeddings=x, probabilities=p, params={"ridge": 1e-5})
    assert got.indices.tolist() == picks
    np.testing.assert_allclose(got.scores, scores, rtol=1e-8)


class TestBaitBinaryOfManyDimensions(TestBaitBinary):
    """Where eigenvectors would take too long between two checks."""

    @pytest.fixture(autouse=True)
    def never(self, monkeypatch):
        monkeypatch.setattr(rank_one, "TURNED", 0)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 4, 1, 5, 2]], ids=str)
def test_rows_of_small_features_keep_their_digits_beside_large_ones(local, order):
    """Candidates that lie in directions where the pool's information is 1e-16 of what it is elsewhere."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 6)) * [1, 1, 1, 1e-8, 1e-8, 1e-8]
    x[20:, :3] = 0
    x = x[:, order]
    p = fisher.softmax(rng.standard_normal((40, 3)))
    variance = p.max(1) * (1 - p.max(1))
    context, ridge = [0, 1], 1e-2
    pool_fisher = (x.T * variance) @ x / len(x)
    a = np.linalg.inv(ridge * np.eye(6) + (x[context].T * variance[context]) @ x[context] / 3)
    got = local.select(
        "bait_binary",
        1,
        embeddings=x,
        probabilities=p,
        labeled=context,
        candidates=range(20, 40),
        params={"ridge": ridge, "ridge_scale": "ABSOLUTE", "oversampling": 1},
    )
    (row,) = got.indices
    ax = a @ x[row]
    gain = variance[row] / 3 * (ax @ pool_fisher @ ax) / (1 + variance[row] / 3 * (x[row] @ ax))
    np.testing.assert_allclose(got.scores, [gain], rtol=1e-8)


@pytest.fixture
def sifted(monkeypatch):
    """How many picks stood every time that a sieve was used."""
    standing = []
    plain = rank_one.RankOne._sifted

    def counted(self, *arguments):
        standing.append(plain(self, *arguments))
        return standing[-1]

    monkeypatch.setattr(sieve, "LEAST_ENTRIES", 0)
    monkeypatch.setattr(rank_one.RankOne, "_sifted", counted)
    return standing


def narrow(seed: int, rows: int = 300, dims: int = 6) -> dict[str, torch.Tensor]:
    """Rows in float32, many of them twice."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, dims)) + 0.3).astype(np.float32)
    x[rows // 2 :: 3] = x[: len(x[rows // 2 :: 3])]
    p = fisher.softmax(x.astype(np.float64) @ rng.standard_normal((dims, 4)))
    return {"embeddings": torch.from_numpy(x), "probabilities": torch.from_numpy(p)}


@pytest.mark.parametrize("most", [0, 1, 20, 4096])
@pytest.mark.parametrize("labeled", [[], [3, 50, 51, 70, 200, 201, 202]], ids=len)
def test_float32_only_finds_the_rows_that_float64_decides_on(local, monkeypatch, sifted, most, labeled):
    """However few rows may be computed in float64 before all are."""
    monkeypatch.setattr(rank_one, "MOST_CONTENDERS", most)
    monkeypatch.setattr(rank_one, "LEAST_TEAM", 20)
    monkeypatch.setattr(rank_one, "MOST_TEAM", 20)
    for seed in range(4):
        inputs = narrow(seed)
        wide = {name: x.double() for name, x in inputs.items()}
        before = len(sifted)
        want = local.select("bait_binary", 25, **wide, labeled=labeled)
        assert len(sifted) == before, "float64 has no sieve"
        got = local.select("bait_binary", 25, **inputs, labeled=labeled)
        assert len(sifted) > before
        assert got.indices.tolist() == want.indices.tolist()
        np.testing.assert_allclose(got.scores, want.scores, rtol=1e-9)
    assert max(sifted) > 1


def test_products_that_are_as_wrong_as_they_may_be_change_nothing(local, monkeypatch, sifted):
    """Errors ten thousand times those of float32, with bounds that say so; many rows tie, few compete."""
    by, make = 2.0**-10, torch.Generator().manual_seed(0)
    plain_of, plain_products = sieve.Sieve.of, rank_one.RankOne._projected

    def of(*arguments):
        found = plain_of(*arguments)
        if found is not None:
            found._product = by
        return found

    def projected(self, guess):
        for some in plain_products(self, guess):
            if self._sieve is not None:
                lengths = guess.directions().norm(dim=2).permute(0, 2, 1)[..., None]  # (2, R, L, 1)
                products = guess.products[..., some]
                wrong = torch.rand(products.shape, generator=make) * 2 - 1
                products += 0.99 * by * wrong * lengths * self._sieve._lengths[some]
            yield some

    monkeypatch.setattr(sieve.Sieve, "of", staticmethod(of))
    monkeypatch.setattr(rank_one.RankOne, "_projected", projected)
    monkeypatch.setattr(rank_one, "LEAST_TEAM", 6)
    monkeypatch.setattr(rank_one, "MOST_TEAM", 6)
    for seed in range(6):
        inputs = narrow(seed)
        want = local.select("bait_binary", 25, **{name: x.double() for name, x in inputs.items()}, labeled=[1, 2])
        got = local.select("bait_binary", 25, **inputs, labeled=[1, 2])
        assert got.indices.tolist() == want.indices.tolist()
        np.testing.assert_allclose(got.scores, want.scores, rtol=1e-9)
    assert max(sifted) > 1
