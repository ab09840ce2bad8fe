"""Expected gradient length, against gradients written out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.fisher import softmax
from tests.strategy_case import ROWS, StrategyCase


def length(h: np.ndarray, p: np.ndarray, *, squared: bool = False, bias: bool = False) -> np.ndarray:
    """E_y |g_y|, or of its square, g_y = (p - e_y) ⊗ h."""
    if bias:
        h = np.hstack([h, np.ones((len(h), 1))])
    found = np.zeros(len(h))
    for row, (x, q) in enumerate(zip(h, p, strict=True)):
        for label, mass in enumerate(q):
            norm = np.linalg.norm(np.outer(q - np.eye(len(q))[label], x))
            found[row] += mass * (norm**2 if squared else norm)
    return found


class TestExpectedGradientLength(StrategyCase):
    name = "expected_gradient_length"

    def make(self, rng):
        return {"embeddings": rng.standard_normal((ROWS, 6)), "probabilities": rng.dirichlet(np.ones(4), ROWS)}

    def scores(self, inputs):
        return length(inputs["embeddings"], inputs["probabilities"], **self.params)

    def oracle(self, inputs, k, context, candidates):
        scores = self.scores(inputs)
        picks = np.argsort(-np.where(candidates, scores, -np.inf), kind="stable")[:k]
        return picks, scores[picks], scores


class TestSquaredWithBias(TestExpectedGradientLength):
    params = {"squared": True, "bias": True}


class TestPerLabel(TestExpectedGradientLength):
    options = {"task": "MULTILABEL"}

    def make(self, rng):
        return {"embeddings": rng.standard_normal((ROWS, 6)), "probabilities": rng.uniform(size=(ROWS, 4))}

    def scores(self, inputs):
        q = inputs["probabilities"]
        return np.linalg.norm(inputs["embeddings"], axis=1) * np.sqrt((q * (1 - q)).sum(1))


@pytest.mark.parametrize("params", [{}, {"bias": True}, {"squared": True}], ids=str)
def test_a_nearly_certain_prediction_keeps_its_digits(local, params):
    h, z = np.random.default_rng(0).standard_normal((2, 3)), np.array([[0.0, -40.0, -45.0], [0.0, -40.1, -45.0]])
    got = local.select("expected_gradient_length", 2, embeddings=h, logits=z, params=params, return_pool_scores=True)
    rest = np.exp([-40, -45]), np.exp([-40.1, -45])
    for row, (a, b) in enumerate(rest):
        norm = (h[row] @ h[row] + ("bias" in params)) ** 0.5
        if "squared" in params:
            expected = norm**2 * 2 * (a + b)
        else:
            expected = norm * (np.hypot(a + b, np.hypot(a, b)) + a * np.hypot(1, 1) + b * np.hypot(1, 1))
        assert got.pool_scores[row] == pytest.approx(expected, rel=1e-12)


def test_predictions_of_the_mode_alone(local):
    p = softmax(np.array([[900.0, 0, 0], [1, 1, 1]]))
    got = local.select("expected_gradient_length", 2, embeddings=np.ones((2, 2)), probabilities=p)
    assert got.indices.tolist() == [1, 0]
    assert got.scores[1] == 0
