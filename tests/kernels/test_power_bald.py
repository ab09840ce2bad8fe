"""PowerBALD and its kin: which rows are drawn, and how often."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from queryselect import Client, InvalidInput
from queryselect_service import errors
from queryselect_service.choice import Choice
from queryselect_service.kernels.power_bald import PowerBald, PowerForm, power_bald
from queryselect_service.maths.noise import uniform
from queryselect_service.shards import Whole
from tests.kernels.bayesian import C, K, SampleScore, information
from tests.strategy_case import ROWS, StrategyCase


def gumbel(seed, rows):
    return -np.log(-np.log(uniform(seed, torch.arange(rows), 1).numpy()))


class PowerCase(SampleScore):
    name = "power_bald"
    form = "POWER"
    beta = 1.0

    @property
    def params(self):
        return {"form": self.form, "beta": self.beta}

    def score(self, p):
        return information(p)

    def weights(self, scores, candidates):
        """The logarithms of what each row is drawn in proportion to, (N,)."""
        return self.beta * np.log(scores)

    def oracle(self, inputs, k, context, candidates):
        scores = self.scores(inputs)
        perturbed = self.weights(scores, candidates) + gumbel(self.seed, len(scores))
        order = sorted(np.flatnonzero(candidates), key=lambda row: -perturbed[row])[:k]
        return np.array(order), perturbed[order], perturbed

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("lists", StrategyCase.test_picks_and_scores_are_those_of_brute_force.pytestmark[0].args[1])
    def test_picks_and_scores_are_those_of_brute_force(self, local, seed, lists):
        self.seed = seed
        super().test_picks_and_scores_are_those_of_brute_force(local, seed, lists)


class TestPowerBald(PowerCase):
    pass


class TestSoftmaxBald(PowerCase):
    form, beta = "SOFTMAX", 4.0

    def weights(self, scores, candidates):
        return self.beta * scores


class TestSoftrankBald(PowerCase):
    form, beta = "SOFTRANK", 2.0

    def weights(self, scores, candidates):
        ranks = [1 + (scores[candidates] > each).sum() for each in scores]
        return -self.beta * np.log(ranks)

    def test_picks_and_scores_are_those_of_brute_force(self, local):
        """Rows that may not be chosen have no rank: theirs are those between which they would stand."""
        inputs = self.inputs()
        for seed in range(3):
            self.seed = seed
            candidates = np.isin(np.arange(ROWS), np.arange(4, 25))
            picks, scores, _ = self.oracle(inputs, 8, np.arange(4), candidates)
            got = self.select(local, inputs, 8, seed=seed, candidates=candidates)
            assert got.indices.tolist() == picks.tolist()
            np.testing.assert_allclose(got.scores, scores, rtol=1e-12)

    # The ranks of other rows change with the rows that may be chosen.
    test_rows_that_no_limit_allows_are_as_good_as_no_candidates = None


def drawn(scores, seeds, k=1, **params):
    """The first k picks of every seed, (seeds, k)."""
    n = len(scores)
    found = []
    for seed in range(seeds):
        choice = Choice(k, torch.ones(n, dtype=torch.bool), Whole(n))
        perturbed = power_bald(
            torch.from_numpy(scores), choice=choice, seed=seed, pool=Whole(n), spec=PowerBald(**params)
        )
        found.append(perturbed.topk(k).indices.numpy())
    return np.array(found)


@pytest.mark.parametrize("form", ["POWER", "SOFTMAX", "SOFTRANK"])
def test_rows_are_drawn_as_often_as_they_should(form):
    scores, seeds, beta = np.array([0.5, 0.1, 0.0, 0.3, 0.3]), 6000, 1.5
    weights = {
        "POWER": scores**beta,
        "SOFTMAX": np.exp(beta * scores),
        "SOFTRANK": np.array([1, 4, 5, 2.5, 2.5]) ** -beta,
    }[form]
    expected = weights / weights.sum()
    picks = drawn(scores, seeds, k=2, form=PowerForm(form), beta=beta)
    got = np.bincount(picks[:, 0], minlength=5) / seeds
    np.testing.assert_allclose(got, expected, atol=4 * 0.5 / np.sqrt(seeds))
    # and the second in proportion to what is left
    second = sum(expected[i] * np.where(np.arange(5) == i, 0, weights) / (weights.sum() - weights[i]) for i in range(5))
    np.testing.assert_allclose(np.bincount(picks[:, 1], minlength=5) / seeds, second, atol=4 * 0.5 / np.sqrt(seeds))


def test_a_score_of_0_comes_last_and_in_random_order():
    scores = np.array([0.0, 1e-9, 0.0, 2.0, 0.0])
    picks = drawn(scores, 200, k=5, form=PowerForm.POWER)
    assert {tuple(sorted(each)) for each in picks[:, :2]} == {(1, 3)}
    assert len({tuple(each) for each in picks[:, 2:]}) == 6
    assert np.isfinite(picks).all()


def test_a_power_of_0_is_chance():
    picks = drawn(np.array([0.9, 0.1]), 2000, form=PowerForm.POWER, beta=0.0)
    assert abs(picks.mean() - 0.5) < 0.05


def test_the_noise_is_the_rows_own_whatever_the_base(local: Client):
    p = np.random.default_rng(0).dirichlet(np.ones(C), (ROWS, K))
    options = {"samples": p, "seed": 9, "return_pool_scores": True}
    for base in ("margin", "entropy", "variation_ratio", "mean_std"):
        plain = local.select(base, 3, samples=p, return_pool_scores=True).pool_scores
        got = local.select("power_bald", 3, params={"base": base, "form": "SOFTMAX", "beta": 2.0}, **options)
        np.testing.assert_allclose(got.pool_scores, 2 * plain + gumbel(9, ROWS), rtol=1e-12)


def test_it_reads_what_its_base_reads(local: Client, remote: Client):
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(C), (ROWS, K)), rng.dirichlet(np.ones(C), ROWS)
    for client in (local, remote):
        for base, inputs in (
            ("margin", {"probabilities": q}),
            ("margin", {"logits": np.log(q)}),
            ("epig", {"samples": p, "reference": {"samples": p[:5]}}),
            ("expected_gradient_length", {"embeddings": rng.normal(size=(ROWS, 3)), "probabilities": q}),
        ):
            got = client.select("power_bald", 4, params={"base": base}, **inputs)
            assert len(got) == 4
            assert not got.warnings
        with pytest.raises(InvalidInput, match=r"power_bald needs pool.samples") as caught:
            client.select("power_bald", 4, probabilities=q)
        assert caught.value.field == "pool.samples"
        with pytest.raises(InvalidInput, match="K at least 2"):
            client.select("power_bald", 4, samples=p[:, :1])
        got = client.select("power_bald", 4, samples=p, probabilities=q)  # which stays with the client
        assert not got.warnings


@pytest.mark.parametrize("base", ["random", "power_bald", "k_center_greedy", "batch_bald", "nothing"])
def test_a_base_that_scores_no_rows_one_by_one_is_refused(local: Client, remote: Client, base):
    p = np.random.default_rng(0).dirichlet(np.ones(C), (ROWS, K))
    for client in (local, remote):
        with pytest.raises(InvalidInput, match=r"base must be one of bald, consensus_kl, .*; it is ") as caught:
            client.select("power_bald", 4, samples=p, params={"base": base})
        assert caught.value.field == "strategy.power_bald.base"


def test_labels(local: Client):
    q = np.random.default_rng(0).random((ROWS, K, C))
    plain = local.select("bald", 3, samples=q, task="MULTILABEL", return_pool_scores=True).pool_scores
    got = local.select("power_bald", 3, samples=q, task="MULTILABEL", seed=4, return_pool_scores=True).pool_scores
    np.testing.assert_allclose(got, np.log(plain) + gumbel(4, ROWS), rtol=1e-12)


def test_a_streamed_pool_is_perturbed_alike(local: Client, remote: Client):
    p = np.random.default_rng(0).dirichlet(np.ones(10), (7000, 20)).astype(np.float32)
    here, there = (client.select("power_bald", 9, samples=p, seed=1, excluded=[3, 4000]) for client in (local, remote))
    assert here.indices.tolist() == there.indices.tolist()
    assert here.scores.tolist() == there.scores.tolist()


def test_negative_scores_have_no_power():
    choice = Choice(1, torch.ones(2, dtype=torch.bool), Whole(2))
    with pytest.raises(errors.InvalidInput, match="at least 0"):
        power_bald(torch.tensor([0.5, -0.1]).double(), choice=choice, seed=0, pool=Whole(2))
