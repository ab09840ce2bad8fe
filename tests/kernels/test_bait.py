"""BAIT over all classes, over the likeliest, and per label."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from queryselect import InvalidInput
from queryselect_service.maths import class_blocks, class_inverse, sieve
from queryselect_service.maths import fisher as maths_fisher
from tests.kernels import fisher
from tests.kernels.fisher import Design
from tests.strategy_case import ROWS, Inputs, StrategyCase


def pool(rng: np.random.Generator, dims: int = 5, classes: int = 4) -> Inputs:
    """Rows without ties, their predictions neither flat nor saturated."""
    x = rng.standard_normal((ROWS, dims)) + 0.3
    return {"embeddings": x, "probabilities": fisher.softmax(x @ rng.standard_normal((dims, classes)))}


class FisherCase(StrategyCase):
    """What the strategies share that minimise tr(M^-1 F)."""

    tolerance = 1e-8

    def make(self, rng):
        return pool(rng)

    def information(self, inputs: Inputs) -> np.ndarray:
        """Every row's (N, P, P)."""
        raise NotImplementedError

    def design(self, inputs: Inputs, *arguments: Any, **options: Any) -> Design:
        """The brute force: k, context, and the options of Design."""
        return Design(inputs["embeddings"], self.information(inputs), *arguments, **options)

    def oracle(self, inputs, k, context, candidates):
        return self.design(inputs, k, context).greedy(k, candidates)

    def test_higher_is_more_worth_choosing(self, local):
        """The best of all comes first, where no backward phase can drop it."""
        params = {**self.params, "oversampling": 1}
        got = self.select(local, self.inputs(), return_pool_scores=True, labeled=[1, 2], params=params)
        assert got.indices[0] == got.pool_scores.argmax()
        assert got.scores[0] == pytest.approx(got.pool_scores.max(), rel=1e-9)

    def test_a_shorter_budget_is_a_prefix(self, local):
        """It is not: the backward phase drops picks of either phase. With as many candidates as picks nothing is."""
        got = self.select(local, self.inputs(), ROWS - 1, labeled=[0])
        assert sorted(got.indices) == list(range(1, ROWS))
        assert got.scores[0] == max(got.scores)

    @pytest.mark.parametrize("params", [{"ridge": 0.01}, {"ridge": 3.0, "ridge_scale": "ABSOLUTE"}], ids=str)
    @pytest.mark.parametrize("scale", ["MEAN", "SUM"])
    def test_ridges_and_scales(self, local, params, scale):
        inputs, context = self.inputs(4), np.array([1, 4, 8])
        candidates = ~np.isin(np.arange(ROWS), context)
        relative = "ridge_scale" not in params
        design = self.design(inputs, 5, context, ridge=params["ridge"], relative=relative, total=scale == "SUM")
        picks, scores, _ = design.greedy(5, candidates)
        got = self.select(local, inputs, labeled=context, params={**self.params, **params, "fisher_scale": scale})
        assert got.indices.tolist() == picks
        np.testing.assert_allclose(got.scores, scores, rtol=1e-8)

    @pytest.mark.parametrize("oversampling", [1, 3, 100])
    def test_oversampling(self, local, oversampling):
        inputs = self.inputs(5)
        picks, _, _ = self.design(inputs, 6, np.array([], dtype=int)).greedy(6, np.ones(ROWS, dtype=bool), oversampling)
        got = self.select(local, inputs, 6, params={**self.params, "oversampling": oversampling})
        assert got.indices.tolist() == picks

    def test_weights_and_labelled_rows_elsewhere(self, local):
        inputs, rng = self.inputs(6), np.random.default_rng(7)
        weights, beside = rng.uniform(0, 2, ROWS), {name: x[:6] for name, x in self.make(rng).items()}
        context = np.array([2, 3])
        elsewhere = (beside["embeddings"], self.information(beside))
        design = self.design(inputs, 4, context, weights=weights, beside=elsewhere)
        picks, scores, _ = design.greedy(4, ~np.isin(np.arange(ROWS), context))
        got = self.select(
            local, {**inputs, "weights": weights}, 4, labeled=context, reference={"role": "LABELED", **beside}
        )
        assert got.indices.tolist() == picks
        np.testing.assert_allclose(got.scores, scores, rtol=1e-8)

    def test_the_scale_of_the_embeddings_changes_nothing(self, local):
        inputs = self.inputs()
        one = self.select(local, inputs, labeled=[1])
        two = self.select(local, {**inputs, "embeddings": inputs["embeddings"] * 1e60}, labeled=[1])
        assert one.indices.tolist() == two.indices.tolist()
        np.testing.assert_allclose(one.scores, two.scores, rtol=1e-9)

    def test_an_absolute_ridge_that_float64_cannot_hold(self, local):
        inputs = self.inputs()
        with pytest.raises(InvalidInput, match="ridge_scale RELATIVE") as caught:
            self.select(
                local,
                {**inputs, "embeddings": inputs["embeddings"] * 1e200},
                params={**self.params, "ridge_scale": "ABSOLUTE"},
            )
        assert caught.value.field == f"strategy.{self.name}.ridge"

    @pytest.mark.parametrize("ridge", [0.0, -1.0, np.nan, np.inf])
    def test_a_ridge_is_above_zero(self, local, ridge):
        with pytest.raises(InvalidInput, match="ridge must be"):
            self.select(local, self.inputs(), params={**self.params, "ridge": ridge})

    def test_saturated_predictions_bring_nothing_and_a_warning(self, local):
        inputs = self.inputs()
        certain = np.eye(inputs["probabilities"].shape[1])[inputs["probabilities"].argmax(1)]
        certain[7] = inputs["probabilities"][7]
        got = self.select(local, {**inputs, "probabilities": certain}, 4)
        assert got.indices.tolist() == [7, 0, 1, 2]
        assert got.scores[1:].tolist() == [0, 0, 0]
        assert [each.code for each in got.warnings] == ["SATURATED"]

    def test_more_than_half_of_the_candidates(self, local):
        """Twice the budget is more than there are: nothing is picked twice."""
        got = self.select(local, self.inputs(), 20, candidates=list(range(25)))
        assert len(set(got.indices)) == 20


class TestBait(FisherCase):
    name = "bait"

    def information(self, inputs):
        return fisher.all_classes(inputs["embeddings"], inputs["probabilities"])


class TestBaitTopClasses(FisherCase):
    name = "bait"
    params = {"top_classes": 2}

    def information(self, inputs):
        return fisher.top_classes(2)(inputs["embeddings"], inputs["probabilities"])


class TestBaitPerLabel(FisherCase):
    name = "bait"
    options = {"task": "MULTILABEL"}

    def make(self, rng):
        x = rng.standard_normal((ROWS, 5)) + 0.3
        return {"embeddings": x, "probabilities": 1 / (1 + np.exp(-x @ rng.standard_normal((5, 3))))}

    def information(self, inputs):
        return fisher.labels(inputs["embeddings"], inputs["probabilities"])


class TestBaitPerLabelBySieve(TestBaitPerLabel):
    """Where inputs are not float64, few rows are computed in it."""

    @pytest.fixture(autouse=True)
    def always(self, monkeypatch):
        monkeypatch.setattr(sieve, "LEAST_ENTRIES", 0)


class TestBaitWithoutMatrices(TestBait):
    """The same with nothing of the size (D C)² written out."""

    @pytest.fixture(autouse=True)
    def nothing_written_out(self, monkeypatch):
        monkeypatch.setattr(class_blocks, "SMALL_SIDE", 0)
        monkeypatch.setattr(class_blocks, "LARGE_SIDE", 0)

    def test_few_candidates(self, local):
        """Then others are read for F alone."""
        inputs, context = self.inputs(3), np.array([0, 5])
        candidates = np.isin(np.arange(ROWS), [1, 4, 6, 7, 12, 20, 21])
        picks, scores, _ = self.design(inputs, 3, context).greedy(3, candidates)
        got = self.select(local, inputs, 3, labeled=context, candidates=candidates)
        assert got.indices.tolist() == picks
        np.testing.assert_allclose(got.scores, scores, rtol=1e-8)


class TestBaitThatReadsRowsEachTime(TestBaitWithoutMatrices):
    """The same where there are too many rows for their factors to be kept."""

    @pytest.fixture(autouse=True)
    def nothing_kept(self, monkeypatch):
        monkeypatch.setattr(class_inverse, "READY", 0)


@pytest.mark.parametrize("name", ["bait", "bait_binary"])
def test_identical_rows_leave_by_number_however_small_the_ridge(local, name):
    """Where rounding tells them apart: of those that are as good as each other the highest is dropped first."""
    rng = np.random.default_rng(0)
    x, logits = rng.standard_normal((14, 6)), 10 * rng.standard_normal((14, 3))
    x[5:9], logits[5:9] = x[4], logits[4]
    x *= 48 / np.linalg.norm(x, axis=1, keepdims=True)
    params = {"ridge": 1e-6, "ridge_scale": "ABSOLUTE"}
    for k in range(5, 12):
        got = local.select(name, k, embeddings=x, logits=logits, labeled=[0, 1], params=params).indices.tolist()
        twins = [row for row in got if 4 <= row <= 8]
        assert twins == list(range(4, 4 + len(twins))), "the first of them, in their order"


@pytest.mark.parametrize("name", ["bait", "bait_binary"])
def test_picks_do_not_depend_on_when_matrices_are_changed(local, monkeypatch, name):
    """What dropped picks take from Q and J may be taken at any time."""
    inputs, params = pool(np.random.default_rng(3)), {"oversampling": 4}
    once = local.select(name, 4, params=params, **inputs)
    real = maths_fisher._Backward
    monkeypatch.setattr(maths_fisher, "_Backward", lambda forward, room, pool: real(forward, min(room, 2), pool))
    often = local.select(name, 4, params=params, **inputs)
    assert often.indices.tolist() == once.indices.tolist()
    np.testing.assert_allclose(often.scores, once.scores, rtol=1e-12)


@pytest.mark.parametrize("name", ["bait", "bait_binary"])
def test_matrices_shrink_with_the_picks_where_most_are_dropped(local, monkeypatch, name):
    """Or dropping the last of many picks would take as long as dropping the first, and longer with each."""
    rng, sides = np.random.default_rng(4), []
    inputs = {"embeddings": rng.standard_normal((200, 8)), "probabilities": rng.dirichlet(np.ones(3), 200)}
    read = maths_fisher._Backward._read

    def noted(self, some):
        sides.append(self._q.shape[-1] // self._columns)
        return read(self, some)

    monkeypatch.setattr(maths_fisher._Backward, "_read", noted)
    got = local.select(name, 4, params={"oversampling": 100}, **inputs)
    assert len(sides) == 195
    assert sides[0] == 200
    assert sides[-1] < 100
    monkeypatch.setattr(maths_fisher, "FLUSHED", 10_000)
    assert local.select(name, 4, params={"oversampling": 100}, **inputs).indices.tolist() == got.indices.tolist()
    assert sides[-1] == 200


@pytest.mark.parametrize("how", ["dense", "free", "free, with rows read each time"])
@pytest.mark.parametrize(
    ("classes", "top", "renormalize"), [(2, None, True), (2, 1, True), (5, 3, False), (5, 4, True)]
)
def test_any_number_of_classes(local, monkeypatch, how, classes, top, renormalize):
    if how != "dense":
        monkeypatch.setattr(class_blocks, "SMALL_SIDE", 0)
        monkeypatch.setattr(class_blocks, "LARGE_SIDE", 0)
    if how == "free, with rows read each time":
        monkeypatch.setattr(class_inverse, "READY", 0)
    inputs, context = pool(np.random.default_rng(classes), classes=classes), np.array([3, 9, 11])
    information = fisher.top_classes(top, renormalize=renormalize) if top else fisher.all_classes
    design = Design(inputs["embeddings"], information(**inputs), 6, context)
    picks, scores, _ = design.greedy(6, ~np.isin(np.arange(ROWS), context))
    params = {"top_classes": top, "renormalize_top_classes": renormalize}
    got = local.select("bait", 6, labeled=context, params=params, **inputs)
    assert got.indices.tolist() == picks
    np.testing.assert_allclose(got.scores, scores, rtol=1e-8)


def test_top_classes_are_of_those_there_are(local):
    inputs = pool(np.random.default_rng(0))
    with pytest.raises(InvalidInput, match="top_classes must be at most C = 4; it is 5") as caught:
        local.select("bait", 3, params={"top_classes": 5}, **inputs)
    assert caught.value.field == "strategy.bait.top_classes"


def test_all_of_the_likeliest_classes_are_all_classes(local):
    inputs = pool(np.random.default_rng(0))
    one, two = (local.select("bait", 5, params=params, **inputs) for params in ({}, {"top_classes": 4}))
    assert one.indices.tolist() == two.indices.tolist()


def test_one_class_tells_nothing(local):
    got = local.select("bait", 2, embeddings=np.ones((4, 2)), probabilities=np.ones((4, 1)))
    assert got.indices.tolist() == [0, 1]
    assert got.scores.tolist() == [0, 0]
