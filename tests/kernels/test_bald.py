"""BALD: of classes, of labels, of label vectors; how samples may be sent, and what a wrong call looks like."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from queryselect import Client, InvalidInput
from queryselect_service.checks import BLOCK_ROWS
from queryselect_service.kernels import bald as kernel
from tests.kernels.bayesian import (
    C,
    K,
    LabelSampleScore,
    SampleScore,
    binary,
    entropy,
    information,
    joint_information,
    pointwise,
    sigmoid,
    softmax,
)
from tests.strategy_case import ROWS


class TestBald(SampleScore):
    name = "bald"

    def score(self, p):
        return information(p)


class TestBaldOfLabels(LabelSampleScore):
    name = "bald"
    how = staticmethod(np.sum)

    def score(self, p):
        return information(p)


class TestJointBald(LabelSampleScore):
    name = "bald"
    params = {"label_aggregation": "JOINT"}

    def scores(self, inputs):
        q = binary(sigmoid(inputs["samples"]))
        return np.array([joint_information([row[:, label] for label in range(C)]) for row in q])


def bald(client, samples, **options):
    return client.select("bald", 1, samples=samples, return_pool_scores=True, **options).pool_scores


@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
def test_probabilities_logarithms_and_logits_say_the_same(local: Client, remote: Client, task):
    z = np.random.default_rng(0).normal(size=(ROWS, K, C)) * 3
    p = softmax(z) if task == "MULTICLASS" else sigmoid(z)
    for client in (local, remote):
        plain = bald(client, p, task=task)
        np.testing.assert_allclose(
            bald(client, np.log(p), samples_kind="LOG_PROBABILITIES", task=task), plain, rtol=1e-11
        )
        np.testing.assert_allclose(bald(client, z, samples_kind="LOGITS", task=task), plain, rtol=1e-10)


@pytest.mark.parametrize("name", pointwise())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_types_score_within_their_rounding(local: Client, name, dtype):
    """1e-5 in float32, as probabilities."""
    p = np.random.default_rng(0).dirichlet(np.ones(C), (200, K))
    reference = {"reference": {"samples": p[:7]}} if name == "epig" else {}
    if name == "expected_gradient_length":
        return
    wide = local.select(name, 1, samples=p, return_pool_scores=True, **reference).pool_scores
    narrow = local.select(
        name, 1, samples=torch.from_numpy(p).to(dtype), return_pool_scores=True, **reference
    ).pool_scores
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    if name in ("variation_ratio", "vote_entropy"):  # a vote may change where two classes are as good as equal
        assert (np.abs(narrow - wide) < tolerance).mean() > 0.9
    else:
        np.testing.assert_allclose(narrow, wide, rtol=0, atol=tolerance)


@given(
    st.sampled_from(["PROBABILITIES", "LOGITS"]),
    hnp.arrays(float, st.tuples(st.just(4), st.integers(2, 9), st.integers(1, 6)), elements=st.floats(-800, 800)),
)
@settings(max_examples=60, deadline=None)
def test_it_is_never_negative_nor_above_what_can_be_known(kind, z):
    from queryselect_service.maths.predictions import Samples, SamplesKind

    for multilabel in (False, True):
        values = z if kind == "LOGITS" else (sigmoid(z / 100) if multilabel else softmax(z))
        samples = Samples(torch.from_numpy(values), SamplesKind(kind), multilabel=multilabel)[:]
        found = kernel.bald(samples)
        classes = 2 if multilabel else z.shape[2]
        assert (found >= 0).all()
        assert (found <= math.log(min(classes, z.shape[1])) + 1e-15).all()


def test_as_much_as_can_be_known(local: Client):
    """Every sample is sure, each of another class: ln K; with more samples than classes, ln C."""
    for members, classes in ((4, 6), (6, 3)):
        p = np.eye(classes)[np.arange(members) % classes][None]
        np.testing.assert_allclose(bald(local, p), [math.log(min(members, classes))], rtol=1e-15)


def test_impossible_classes_count_for_nothing(local: Client):
    p = np.random.default_rng(0).dirichlet(np.ones(3), (20, K))
    wider = np.concatenate([p, np.zeros((20, K, 2))], axis=2)
    np.testing.assert_allclose(bald(local, wider), bald(local, p), rtol=1e-13)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(
            bald(local, np.log(wider), samples_kind="LOG_PROBABILITIES"), bald(local, p), rtol=1e-12
        )


def test_the_joint_information_of_labels_is_at_most_their_sum(local: Client):
    rng = np.random.default_rng(0)
    q = sigmoid(rng.normal(size=(50, 20, 1)) * 2 + rng.normal(size=(50, 20, 5)))
    joint = bald(local, q, task="MULTILABEL", params={"label_aggregation": "JOINT"})
    each = bald(local, q, task="MULTILABEL")
    assert (joint <= each + 1e-12).all()
    assert (joint >= bald(local, q, task="MULTILABEL", params={"label_aggregation": "MAX"}) - 1e-12).all()
    assert joint.mean() < 0.95 * each.mean()


@pytest.mark.parametrize("labels", [1, 2, 3, 13])
def test_joint_information_is_exact_up_to_13_labels(local: Client, labels):
    """That of labels which tell nothing is 0, so that 13 have what the few have that matter."""
    rng = np.random.default_rng(0)
    matter = min(labels, 3)
    q = rng.random((6, 5, matter))
    wider = np.concatenate([q, np.full((6, 5, labels - matter), 0.3)], axis=2)
    expected = [joint_information([binary(row[:, label]) for label in range(matter)]) for row in q]
    got = bald(local, wider, task="MULTILABEL", params={"label_aggregation": "JOINT"})
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def test_joint_information_is_drawn_beyond_13_labels(local: Client):
    rng = np.random.default_rng(0)
    q = rng.random((6, 5, 3))
    wider = np.concatenate([q, np.full((6, 5, 12), 0.3)], axis=2)
    expected = np.array([joint_information([binary(row[:, label]) for label in range(3)]) for row in q])
    got = bald(local, wider, task="MULTILABEL", params={"label_aggregation": "JOINT"})
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02)
    assert not np.allclose(got, expected, rtol=0, atol=1e-9)
    assert bald(local, wider[[3, 3]], task="MULTILABEL", params={"label_aggregation": "JOINT"}).tolist() == [got[3]] * 2
    certain = np.zeros((2, 5, 20))
    certain[1] = 1
    assert bald(local, certain, task="MULTILABEL", params={"label_aggregation": "JOINT"}).tolist() == [0, 0]


def test_joint_is_bald_alone(local: Client):
    q = np.full((3, K, 4), 0.25)
    with pytest.raises(InvalidInput, match=r"must be one of MEAN, SUM, MAX, TOP_K_MEAN; it is JOINT") as caught:
        local.select("mean_std", 1, samples=q, task="MULTILABEL", params={"label_aggregation": "JOINT"})
    assert caught.value.field == "strategy.mean_std.label_aggregation"


# What can't be what it is said to be.


@pytest.mark.parametrize(
    ("samples", "kind", "words"),
    [
        (np.log(np.full((30, K, C), 1 / C)), "PROBABILITIES", "must not be negative; row 0 has -1.38629"),
        (np.full((30, K, C), 0.5), "PROBABILITIES", "must sum to 1 within 0.001; row 0 sums to 2"),
        (np.full((30, K, C), 1 / C), "LOG_PROBABILITIES", "must be logarithms .* row 0 has a sum of 5.1361"),
        (np.zeros((30, K, C)), "LOG_PROBABILITIES", "must be logarithms .* row 0 has a sum of 4"),
    ],
    ids=[
        "logarithms as probabilities",
        "logits as probabilities",
        "probabilities as logarithms",
        "logits as logarithms",
    ],
)
def test_a_wrong_kind_is_refused(local: Client, remote: Client, samples, kind, words):
    for client in (local, remote):
        with pytest.raises(InvalidInput, match=words) as caught:
            bald(client, samples, samples_kind=kind)
        assert caught.value.field == "pool.samples"


def test_labels_that_are_no_logarithms_are_refused(local: Client):
    with pytest.raises(InvalidInput, match=r"must be logarithms of at most 0; row 2 has 0.5"):
        bald(local, np.where(np.arange(4)[:, None, None] < 2, -1.0, 0.5) + np.zeros((4, K, C)),
             samples_kind="LOG_PROBABILITIES", task="MULTILABEL")  # fmt: skip


def test_axes_in_another_order_are_refused(local: Client):
    """Classes before samples, as some libraries have them: no row sums to 1 over its last axis."""
    p = np.random.default_rng(0).dirichlet(np.ones(C), (ROWS, K)).transpose(0, 2, 1)
    with pytest.raises(InvalidInput, match=r"must sum to 1 within 0.001; row 0 "):
        bald(local, p)


@pytest.mark.parametrize("kind", ["PROBABILITIES", "LOG_PROBABILITIES", "LOGITS"])
@pytest.mark.parametrize("row", [0, 1234, BLOCK_ROWS + 1])
def test_a_bad_row_is_named(local: Client, remote: Client, kind, row):
    p = np.random.default_rng(0).dirichlet(np.ones(C), (BLOCK_ROWS + 9, K)).astype(np.float32)
    samples = p if kind == "PROBABILITIES" else np.log(p)
    samples[row, K - 1, 2] = np.nan
    for client in (local, remote):
        with pytest.raises(InvalidInput, match=rf"row {row} has nan") as caught:
            bald(client, samples, samples_kind=kind)
        assert caught.value.field == "pool.samples"


def test_half_precision_logarithms_are_taken_for_what_they_are(local: Client):
    p = np.random.default_rng(0).dirichlet(np.ones(50), (100, K))
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        got = bald(local, torch.from_numpy(np.log(p)).to(dtype), samples_kind="LOG_PROBABILITIES")
        np.testing.assert_allclose(got, bald(local, p), rtol=0, atol=tolerance)


def test_a_pool_that_is_scored_as_it_comes_has_the_same_scores(local: Client, remote: Client):
    """5 MB: by stream, in blocks."""
    p = np.random.default_rng(0).dirichlet(np.ones(10), (7000, 20)).astype(np.float32)
    for name in ("bald", "variation_ratio", "entropy"):
        here, there = (client.select(name, 9, samples=p, return_pool_scores=True) for client in (local, remote))
        assert here.pool_scores.tolist() == there.pool_scores.tolist()
        assert here.indices.tolist() == there.indices.tolist()


def test_the_formulas_helper_agrees_with_itself():
    p = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    assert joint_information([p]) == pytest.approx(information(p), abs=1e-12)
    assert entropy(np.array([1.0, 0.0])) == 0
