"""BAIT of one logit."""

from __future__ import annotations

import numpy as np
import pytest

from queryselect_service.maths import rank_one
from tests.kernels import fisher
from tests.kernels.fisher import Design
from tests.kernels.test_bait import FisherCase, pool
from tests.strategy_case import ROWS


class TestBaitBinary(FisherCase):
    name = "bait_binary"

    def information(self, inputs):
        return fisher.binary(inputs["embeddings"], inputs["probabilities"])


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
