"""EPIG: brute force over pairs, weights, several target sets, labels."""

from __future__ import annotations

import numpy as np
import pytest

from queryselect import Client, InvalidInput
from tests.kernels.bayesian import C, K, SampleScore, binary, entropy, information, softmax
from tests.strategy_case import ROWS

TARGETS = 5


def pair(p, q):
    """I(y; y') of samples (K, C) and (K, C')."""
    joint = np.einsum("kc,kd->cd", p, q) / len(p)
    return entropy(p.mean(0)) + entropy(q.mean(0)) - entropy(joint.ravel())


class TestEpig(SampleScore):
    name = "epig"
    reference = {"samples": np.random.default_rng(5).dirichlet(np.ones(C), (TARGETS, K)), "weights": np.ones(TARGETS)}

    def score(self, p):
        return np.mean([pair(p, q) for q in self.reference["samples"]])


class TestWeightedEpig(TestEpig):
    reference = {**TestEpig.reference, "weights": np.array([0.5, 0.0, 2.0, 1.0, 0.25])}

    def score(self, p):
        both = zip(self.reference["samples"], self.reference["weights"], strict=True)
        return np.mean([weight * pair(p, q) for q, weight in both])


class TestEpigOfLabels(SampleScore):
    name = "epig"
    options = {"samples_kind": "LOGITS", "task": "MULTILABEL"}
    reference = {"samples": np.random.default_rng(5).random((TARGETS, K, C)), "weights": np.ones(TARGETS)}

    def scores(self, inputs):
        p, q = binary(1 / (1 + np.exp(-inputs["samples"]))), binary(self.reference["samples"])
        each = [[np.mean([pair(row[:, at], t[:, at]) for t in q]) for at in range(C)] for row in p]
        return np.sum(each, axis=1)


def epig(client, samples, reference, **options):
    return client.select(
        "epig", 1, samples=samples, reference=reference, return_pool_scores=True, **options
    ).pool_scores


@pytest.fixture
def p():
    return np.random.default_rng(0).dirichlet(np.ones(C), (ROWS, K))


def test_it_tells_no_more_of_targets_than_of_the_parameters(local: Client, p):
    found = epig(local, p, {"samples": p[:9]})
    assert (found >= 0).all()
    assert (found <= [information(row) + 1e-12 for row in p]).all()


def test_targets_that_all_samples_agree_on_tell_exactly_nothing(local: Client, p):
    agreed = np.repeat(p[:5, :1], K, axis=1)
    assert (epig(local, p, {"samples": agreed}) == 0).all()
    assert (epig(local, np.repeat(p[:, :1], K, axis=1), {"samples": p[:5]}) == 0).all()


def test_sets_of_targets_are_one(local: Client, p):
    both = local.select(
        "epig", 1, samples=p, references=[{"samples": p[:3]}, {"samples": p[3:9]}], return_pool_scores=True
    )
    np.testing.assert_allclose(both.pool_scores, epig(local, p, {"samples": p[:9]}), rtol=1e-12)


def test_targets_may_be_of_another_kind_than_the_pool(local: Client, remote: Client, p):
    z = np.log(p)
    for client in (local, remote):
        mixed = epig(client, p, {"samples": z[:9], "samples_kind": "LOG_PROBABILITIES"})
        np.testing.assert_allclose(mixed, epig(client, p, {"samples": p[:9]}), rtol=1e-11)
        other = epig(client, z, {"samples": p[:9]}, samples_kind="LOGITS")
        np.testing.assert_allclose(other, epig(client, p, {"samples": p[:9]}), rtol=1e-11)
    with pytest.raises(InvalidInput, match=r"references\[1\] has samples_kind LOGITS where references\[0\]") as caught:
        local.select(
            "epig", 1, samples=p, references=[{"samples": p[:3]}, {"samples": z[:3], "samples_kind": "LOGITS"}]
        )
    assert caught.value.field == "references[1].samples_kind"


def test_more_rows_and_targets_than_fit_a_tile(local: Client, remote: Client):
    rng = np.random.default_rng(0)
    p, q = softmax(rng.normal(size=(9000, 5, 3)) * 2), softmax(rng.normal(size=(700, 5, 3)) * 2)
    some = rng.choice(9000, 40, replace=False)
    expected = [np.mean([pair(p[row], t) for t in q]) for row in some]
    for client in (local, remote):
        np.testing.assert_allclose(epig(client, p, {"samples": q})[some], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("reference", "field", "words"),
    [
        (None, "references", "needs references of role TARGET with samples"),
        ({"samples": np.full((3, K + 1, C), 1 / C)}, "references[0].samples", "K = 6"),
        ({"samples": np.full((3, K, C + 1), 1 / (C + 1))}, "references[0].samples", "C = 4"),
        ({"samples": np.full((3, K, C), 0.5)}, "references[0].samples", "row 0 sums to 2"),
        (
            {"samples": np.full((3, K, C), 1 / C), "weights": -np.ones(3)},
            "references[0].weights",
            "must not be negative",
        ),
        ({"probabilities": np.full((3, C), 1 / C)}, "references[0].samples", "needs references"),
    ],
    ids=["none", "other samples", "other classes", "bad values", "negative weights", "no samples"],
)
def test_what_is_wrong_is_named(local: Client, remote: Client, p, reference, field, words):
    for client in (local, remote):
        with pytest.raises(InvalidInput) as caught:
            client.select("epig", 1, samples=p, reference=reference)
        assert caught.value.field == field
        assert words in str(caught.value)
