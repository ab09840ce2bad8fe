"""least_confidence, margin and entropy: multi-class, multi-label, from probabilities and from logits."""

from __future__ import annotations

import numpy as np
import pytest

from queryselect import Client, Entropy, InvalidInput, LeastConfidence, Margin
from tests.kernels.fisher import softmax
from tests.strategy_case import ROWS, StrategyCase


def entropy_of(p):
    return -sum(x * np.log(x) for x in p if x > 0)


#: The textbook formulas, of one distribution.
FORMULAS = {
    "least_confidence": lambda p: 1 - max(p),
    "margin": lambda p: 1 - np.diff(sorted(p)[-2:])[0],
    "entropy": entropy_of,
}
AGGREGATIONS = {
    "MEAN": np.mean,
    "SUM": np.sum,
    "MAX": np.max,
    "TOP_K_MEAN": lambda scores: np.mean(sorted(scores)[-2:]),
}


class Uncertainty(StrategyCase):
    def make(self, rng):
        return {"probabilities": rng.dirichlet(np.full(5, 0.7), ROWS)}

    def row(self, p):
        return FORMULAS[self.name](p)

    def oracle(self, inputs, k, context, candidates):
        scores = np.array([self.row(p) for p in inputs["probabilities"]])
        order = sorted(np.flatnonzero(candidates), key=lambda row: (-scores[row], row))[:k]
        return np.array(order), scores[order], scores


class TestLeastConfidence(Uncertainty):
    name = "least_confidence"


class TestMargin(Uncertainty):
    name = "margin"


class TestEntropy(Uncertainty):
    name = "entropy"


class MultiLabel(Uncertainty):
    options = {"task": "MULTILABEL"}
    how = "MEAN"

    def make(self, rng):
        return {"probabilities": rng.uniform(size=(ROWS, 6))}

    def row(self, q):
        return AGGREGATIONS[self.how]([FORMULAS[self.name]([1 - x, x]) for x in q])

    def exactly(self, inputs, dtype):
        q = inputs["probabilities"]
        return super().exactly({"logits": np.log(q / (1 - q))}, dtype)


class TestLeastConfidenceMultiLabel(MultiLabel):
    name = "least_confidence"


class TestMarginMultiLabelMax(MultiLabel):
    name, how, params = "margin", "MAX", {"label_aggregation": "MAX"}


class TestEntropyMultiLabelSum(MultiLabel):
    name, how, params = "entropy", "SUM", {"label_aggregation": "SUM"}


class TestEntropyMultiLabelTopK(MultiLabel):
    name, how, params = "entropy", "TOP_K_MEAN", {"label_aggregation": "TOP_K_MEAN", "top_k": 2}


@pytest.mark.parametrize("name", FORMULAS)
def test_logits_mean_the_same_as_their_probabilities(local: Client, name):
    z = np.random.default_rng(0).normal(size=(200, 6)) * 3
    for task, p in (("MULTICLASS", softmax(z)), ("MULTILABEL", 1 / (1 + np.exp(-z)))):
        one = local.select(name, 50, logits=z, task=task, return_pool_scores=True)
        two = local.select(name, 50, probabilities=p, task=task, return_pool_scores=True)
        np.testing.assert_allclose(one.pool_scores, two.pool_scores, rtol=1e-9)
        assert one.indices.tolist() == two.indices.tolist()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
def test_saturated_logits_keep_their_order(local: Client, name, task):
    """Probabilities of 1 - 1e-30 are all 1 in any float type; the logits still tell them apart."""
    certainty = np.array([40.0, 90.0, 70.0, 60.0, 80.0])
    z = np.stack([np.zeros(5), certainty], axis=1) if task == "MULTICLASS" else certainty[:, None]
    assert local.select(name, 5, logits=z, task=task).indices.tolist() == [0, 3, 2, 4, 1]


@pytest.mark.parametrize("name", FORMULAS)
def test_minus_infinity_is_a_class_that_cannot_be(local: Client, name):
    z = np.array([[0.0, 0.0, -np.inf], [0.0, -1.0, -1.0], [0.0, -np.inf, -np.inf]])
    got = local.select(name, 3, logits=z, return_pool_scores=True).pool_scores
    np.testing.assert_allclose(got, [FORMULAS[name](p) for p in softmax(z)], atol=1e-15)
    assert got[2] == 0
    with pytest.raises(InvalidInput, match="row 1 has none"):
        local.select(name, 1, logits=np.array([[0.0, 1.0], [-np.inf, -np.inf]]))


@pytest.mark.parametrize("name", FORMULAS)
def test_one_class_is_always_certain(local: Client, name):
    assert local.select(name, 2, probabilities=np.ones((4, 1))).scores.tolist() == [0, 0]


@pytest.mark.parametrize("name", FORMULAS)
def test_more_rows_than_one_block(local: Client, name):
    p = np.random.default_rng(0).dirichlet(np.ones(3), 10_001)
    scores = np.array([FORMULAS[name](row) for row in p])
    got = local.select(name, 9_000, probabilities=p, return_pool_scores=True)
    np.testing.assert_allclose(got.pool_scores, scores, rtol=1e-9)
    assert got.indices.tolist() == np.argsort(-got.pool_scores, kind="stable")[:9_000].tolist()


def test_sums_may_be_off_by_rounding_and_are_renormalised(local: Client):
    p = np.random.default_rng(0).dirichlet(np.ones(4), 20)
    off = p * np.linspace(0.9991, 1.0009, 20)[:, None]
    one, two = (local.select(Entropy(), 20, probabilities=each) for each in (p, off))
    assert one.indices.tolist() == two.indices.tolist()
    np.testing.assert_allclose(one.scores, two.scores, rtol=1e-12)


def test_label_parameters_are_checked(local: Client):
    q = np.full((3, 4), 0.25)
    cases = (
        (Margin(label_aggregation=4), "top_k", "needs top_k"),
        (LeastConfidence(top_k=0), "top_k", "at least 1"),
        (Entropy(top_k=5), "top_k", "at most C = 4"),
    )
    for strategy, field, words in cases:
        with pytest.raises(InvalidInput, match=words) as caught:
            local.select(strategy, 1, probabilities=q, task="MULTILABEL")
        assert caught.value.field.startswith("strategy.")
        assert caught.value.field.endswith(field)
