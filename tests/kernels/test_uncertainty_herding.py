"""uncertainty_herding: the greedy written out with the matrix of all pairs, and the authors' picks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from queryselect import Client, InvalidInput, UncertaintyHerding
from tests.kernels.test_max_herding import DATA, herd, unit
from tests.strategy_case import ROWS, StrategyCase


def uncertainty(logits, which="MARGIN", temperature=1.0):
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max(1, keepdims=True))
    p = np.sort(p / p.sum(1, keepdims=True))[:, ::-1]
    if which == "ENTROPY":
        return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1)
    return 1 - p[:, 0] + (p[:, 1] if which == "MARGIN" else 0)


class UncertaintyHerdingCase(StrategyCase):
    name = "uncertainty_herding"
    slice_tolerance = 1e-5

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 6)), "probabilities": rng.dirichlet(np.ones(5), ROWS)}

    def oracle(self, inputs, k, context, candidates):
        settings = {name: x for name, x in self.params.items() if name == "temperature"}
        mass = uncertainty(np.log(inputs["probabilities"]), self.params.get("uncertainty", "MARGIN"), **settings)
        mass[context] = 0
        mass = mass if len(context) else np.ones(ROWS)
        options = {"adaptive": self.params.get("adaptive_bandwidth", False), "h": self.params.get("bandwidth", 1.0)}
        return herd(unit(inputs["embeddings"]), k, context, candidates, mass=mass * inputs.get("weights", 1), **options)


class TestMargin(UncertaintyHerdingCase):
    pass


class TestEntropyWithWeights(UncertaintyHerdingCase):
    params: ClassVar = {"uncertainty": "ENTROPY", "temperature": 2.5, "adaptive_bandwidth": True}

    def make(self, rng):
        return super().make(rng) | {"weights": rng.exponential(size=ROWS)}


class TestConfidence(UncertaintyHerdingCase):
    params: ClassVar = {"uncertainty": "CONFIDENCE", "temperature": 0.5, "bandwidth": 0.8}


@pytest.mark.parametrize(("case", "adaptive", "temperature"), [("unsure", False, 1.0), ("adapted", True, 2.5)])
def test_the_picks_are_those_of_the_authors_code(local: Client, case, adaptive, temperature):
    """Digits with 40 labelled rows, 30 picks in order (tests/data/README.md)."""
    x, theirs = np.load(DATA / "kcenter_digits.npz")["X"], np.load(DATA / "herding_digits.npz")
    strategy = UncertaintyHerding(adaptive_bandwidth=adaptive, temperature=temperature)
    inputs = {"embeddings": x.astype(np.float32), "logits": theirs["logits"]}
    got = local.select(strategy, 30, **inputs, labeled=theirs[f"{case}_labeled"])
    assert got.indices.tolist() == theirs[f"{case}_picks"].tolist()


def test_logits_that_saturate_are_divided_before_the_softmax(local: Client):
    """At temperature 1000 the rows differ by e; as probabilities all of them are one-hot."""
    logits = np.array([[0.0, 0.0, 0.0], [2000.0, 0.0, 0.0], [1000.0, 0.0, 0.0], [3000.0, 0.0, 0.0]])
    x, params = np.eye(4) * 100, {"normalize": False, "temperature": 1000.0}
    got = local.select("uncertainty_herding", 3, embeddings=x, logits=logits, labeled=[0], params=params)
    assert got.indices.tolist() == [2, 1, 3]
    np.testing.assert_allclose(got.scores, uncertainty(logits, temperature=1000)[[2, 1, 3]] / 4, rtol=1e-9)


def test_labelled_rows_have_no_mass_and_without_any_all_rows_have_the_same(local: Client):
    x, p = np.repeat(np.eye(3), [3, 1, 2], axis=0) * 100, np.full((6, 2), 0.5)
    p[5] = [1, 0]
    params = {"normalize": False}
    cold = local.select("uncertainty_herding", 3, embeddings=x, probabilities=p, params=params)
    assert cold.indices.tolist() == [0, 4, 3]
    np.testing.assert_allclose(cold.scores, [3 / 6, 2 / 6, 1 / 6])
    warm = local.select("uncertainty_herding", 4, embeddings=x, probabilities=p, labeled=[0], params=params)
    assert warm.indices.tolist() == [3, 4, 1, 2]  # row 5, beside row 4, is certain
    np.testing.assert_allclose(warm.scores, [1 / 6, 1 / 6, 0, 0], atol=1e-15)


def test_where_the_model_is_certain_of_all_rows_come_in_order(local: Client):
    x = np.random.default_rng(0).normal(size=(8, 3))
    got = local.select("uncertainty_herding", 7, embeddings=x, probabilities=np.eye(8), labeled=[2])
    assert got.indices.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert got.scores.tolist() == [0] * 7


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_a_temperature_is_above_zero(local: Client, value):
    with pytest.raises(InvalidInput, match="temperature must be") as caught:
        local.select(
            "uncertainty_herding", 1, embeddings=np.eye(2), probabilities=np.eye(2), params={"temperature": value}
        )
    assert caught.value.field == "strategy.uncertainty_herding.temperature"


def test_it_is_for_one_of_several_classes(local: Client):
    with pytest.raises(InvalidInput, match="MULTICLASS"):
        local.select("uncertainty_herding", 1, embeddings=np.eye(2), probabilities=np.eye(2), task="MULTILABEL")
