"""What a third party's kernel may take, and what it is told when it breaks its word."""

from __future__ import annotations

import numpy as np
import pytest

from queryselect import Client, Custom, InvalidInput, ServerBug
from queryselect_service.spec import Spec
from queryselect_service.strategy import ScoreKind, strategy
from tests import plugins  # noqa: F401  # registers them

Z = np.random.default_rng(0).normal(size=(50, 4))
P = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)


def test_a_pointwise_kernel_gets_its_parameters_and_its_whole_inputs(local: Client):
    w = np.arange(8.0).reshape(4, 2)
    scores = P.max(1) ** 3
    for options, factor in (({}, 1.0), ({"head_weights": w}, w.sum())):
        sharp = Custom(name="sharpness", parameters={"power": 3})
        got = local.select(sharp, 5, logits=Z, return_pool_scores=True, **options)
        np.testing.assert_allclose(got.pool_scores, scores * factor)


def test_a_pointwise_kernel_may_reduce_labels_itself(local: Client):
    q = 1 / (1 + np.exp(-Z))
    got = local.select(Custom(name="sharpness"), 5, logits=Z, task="MULTILABEL", return_pool_scores=True)
    np.testing.assert_allclose(got.pool_scores, np.maximum(q, 1 - q).sum(1))


def test_probabilities_are_probabilities_whatever_was_sent(local: Client):
    q = 1 / (1 + np.exp(-Z))
    for inputs, task, expected in (
        ({"probabilities": P}, "MULTICLASS", P),
        ({"logits": Z}, "MULTICLASS", P),
        ({"logits": Z}, "MULTILABEL", q),
        ({"probabilities": q}, "MULTILABEL", q),
    ):
        got = local.select(Custom(name="second_class"), 7, task=task, **inputs)
        order = np.argsort(-expected[:, 1], kind="stable")[:7]
        assert got.indices.tolist() == order.tolist()
        np.testing.assert_allclose(got.scores, expected[order, 1])


def test_a_kernel_that_asks_for_logits_gets_logits(local: Client):
    got = local.select(Custom(name="steepest"), 5, logits=Z, return_pool_scores=True)
    np.testing.assert_allclose(got.pool_scores, Z.max(1))
    with pytest.raises(InvalidInput, match=r"steepest needs pool\.logits of shape \(N C\)"):
        local.select(Custom(name="steepest"), 5, probabilities=P)


def test_a_kernel_that_promised_pool_scores_and_has_none_is_a_bug(local: Client):
    with pytest.raises(ServerBug):
        local.select(Custom(name="second_class"), 7, logits=Z, return_pool_scores=True)


def test_a_kernel_takes_a_choice_or_a_number_and_candidates():
    def both(*, choice, k):
        """Takes too much."""

    with pytest.raises(ValueError, match="both takes choice"):
        strategy(Spec, kind=ScoreKind.POINT, cost="", citation="")(both)
