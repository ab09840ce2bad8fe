"""Pools that bring codes of the representation strategies down: they get their budget of rows, and are told why.

Rows that repeat one another, rows without length, clusters of one row, everything covered, predictions of one class
alone; and embeddings far from the origin in single precision.
"""

from __future__ import annotations

import numpy as np
import pytest

from queryselect import Client

ROWS, CLASSES = 40, 4
#: By strategy the parameters that it has no default for, and which of the inputs below it reads besides embeddings.
STRATEGIES = {
    "k_center_greedy": ({}, []),
    "typiclust": ({}, []),
    "prob_cover": ({"delta": 0.5}, []),
    "badge": ({}, ["probabilities"]),
    "max_herding": ({}, []),
    "uncertainty_herding": ({}, ["probabilities"]),
    "k_means": ({}, []),
    "drop_query": ({}, ["head_weights", "head_bias"]),
    "discriminative": ({}, []),
    "typiclust_to_margin": ({"switch_at": 1000}, ["probabilities"]),
}
#: Those that can tell rows that are all equal apart: one cluster has enough rows, gradients differ, a classifier is
#: unsure of all.
NEVER_OUT = {"typiclust", "typiclust_to_margin", "badge", "discriminative"}


def pool(rng, x):
    """Inputs for all, by name; the embeddings are given."""
    head, bias = rng.normal(size=(x.shape[1], CLASSES)).T, rng.normal(size=CLASSES)
    return {
        "embeddings": x,
        "probabilities": rng.dirichlet(np.ones(CLASSES), len(x)),
        "head_weights": head,
        "head_bias": bias,
    }


def select(local, name, inputs, k, **options):
    params, more = STRATEGIES[name]
    given = {each: inputs[each] for each in ["embeddings", *more]}
    return local.select(name, k, params=params | options.pop("params", {}), seed=3, **given, **options)


def all_equal(rng):
    return np.tile(rng.normal(size=5), (ROWS, 1))


def no_length(_):
    return np.zeros((ROWS, 5))


def few_distinct(rng):
    return rng.normal(size=(3, 5))[rng.integers(0, 3, ROWS)]


def some_without_length(rng):
    return rng.normal(size=(ROWS, 5)) * (np.arange(ROWS) % 3 > 0)[:, None]


def far_apart(rng):
    """Every row is a cluster of its own, once the others are in one place."""
    x = np.tile(rng.normal(size=5), (ROWS, 1))
    x[::10] = 100 * rng.normal(size=(4, 5))
    return x


@pytest.mark.parametrize("labeled", [[], [1, 17]], ids=["cold", "labeled"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [all_equal, no_length, few_distinct, some_without_length, far_apart])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_row_of_a_hard_pool_can_be_asked_for(local: Client, name, make, dtype, labeled):
    rng = np.random.default_rng(7)
    inputs = {each: x.astype(dtype) for each, x in pool(rng, make(rng)).items()}
    for k in (5, ROWS - len(labeled)):
        got = select(local, name, inputs, k, labeled=labeled)
        assert len(set(got.indices.tolist())) == k
        assert not set(got.indices.tolist()) & set(labeled)
        assert np.isfinite(got.scores).all()
    told = {warning.code for warning in got.warnings} & {"COVERED", "FALLBACK", "SATURATED"}
    if make is all_equal and not (name == "discriminative" and not labeled):  # which starts as others end
        assert bool(told) == (name not in NEVER_OUT), name
    if make is no_length and name == "badge":
        assert told == {"SATURATED"}


@pytest.mark.parametrize(
    ("name", "params", "told"),
    [
        ("badge", {}, ["SATURATED"]),
        ("uncertainty_herding", {}, ["COVERED"]),
        ("typiclust_to_margin", {"switch_at": 0}, []),  # where margin takes over, all rows have the same score
    ],
)
def test_a_model_that_is_certain_of_every_row(local: Client, name, params, told):
    rng = np.random.default_rng(0)
    inputs = pool(rng, rng.normal(size=(ROWS, 5)))
    inputs["probabilities"] = np.eye(CLASSES)[rng.integers(0, CLASSES, ROWS)]
    got = select(local, name, inputs, ROWS - 2, labeled=[0, 5], params=params)
    assert len(set(got.indices.tolist())) == ROWS - 2
    assert [warning.code for warning in got.warnings] == told


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_far_mean_in_single_precision_changes_no_pick(local: Client, name):
    """A mean 1000 times as far away as rows are from each other; the values are those that float32 holds."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(300, 8)) + 1000).astype(np.float32)
    inputs = {each: value.astype(np.float32) for each, value in pool(rng, x).items()}
    params = {} if name == "discriminative" else {"normalize": False}
    params |= {"delta": 1.5} if name == "prob_cover" else {"bandwidth": 2.0} if "herding" in name else {}
    options = {"labeled": np.arange(6), "params": params}
    single = select(local, name, inputs, 40, **options)
    double = select(local, name, {each: value.astype(np.float64) for each, value in inputs.items()}, 40, **options)
    assert single.indices.tolist() == double.indices.tolist()
    np.testing.assert_allclose(single.scores, double.scores, rtol=1e-6)
