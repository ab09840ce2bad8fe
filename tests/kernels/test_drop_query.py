"""drop_query against a plain numpy version: classes under dropout, then k-means on the rows that change theirs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from queryselect import Client, InvalidInput
from queryselect_service.kernels import drop_query
from queryselect_service.maths.noise import uniform
from queryselect_service.shards import Whole
from queryselect_service.strategy import Choice
from tests.kernels.test_k_means import lloyd, nearest_rows
from tests.strategy_case import ROWS, StrategyCase

C, D = 4, 6


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def changes(x, head, bias, passes, dropout, seed):
    """In how many passes the class of each row is another: entry by entry, with dropout's division."""
    plain, changed = (x @ head.T + bias).argmax(1), np.zeros(len(x), int)
    numbers = torch.arange(x.size)
    for at in range(passes):
        kept = uniform(seed, numbers, drop_query.NOISE + at).numpy().reshape(x.shape) >= dropout
        changed += (np.where(kept, x / (1 - dropout), 0) @ head.T + bias).argmax(1) != plain
    return changed


def unsettled(changed, passes, k, candidates):
    threshold = passes // 2
    while (chosen := candidates & (changed > threshold)).sum() < 25 * k and threshold:
        threshold -= 1
    return chosen


def plain(x, rows, some, k, context, candidates, seed):
    """k-means on `some` of the rows, then the farthest of the rest: picks, scores, how many of them by k-means."""
    picks, scores = np.array([], int), np.array([])
    if some.any():
        _, centres, masses = lloyd(x, k, seed, some.astype(float))
        picks, scores = nearest_rows(x, centres, masses, some)
    near, picks, scores = len(picks), list(picks), list(scores)
    free = candidates.copy()
    free[picks] = False
    while len(picks) < k:
        before = [*context, *picks]
        away = np.linalg.norm(x[:, None] - x[before][None], axis=2).min(1)
        picks.append(int(np.where(free, away, -np.inf).argmax()))
        scores.append(away[picks[-1]])
        free[picks[-1]] = False
    return picks, scores, near


class TestDropQuery(StrategyCase):
    name = "drop_query"
    slice_tolerance = 1e-5
    params: ClassVar = {"dropout": 0.25}
    beside: ClassVar = {
        "head_weights": np.random.default_rng(1).normal(size=(C, D)),
        "head_bias": np.random.default_rng(2).normal(size=C),
    }

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, D))}

    def changed(self, inputs, seed):
        """In how many of how many passes."""
        passes = self.params.get("passes", 3)
        head, bias = self.beside["head_weights"], self.beside["head_bias"]
        return changes(inputs["embeddings"], head, bias, passes, self.params.get("dropout", 0.75), seed), passes

    def oracle(self, inputs, k, context, candidates, seed=0):
        some = unsettled(*self.changed(inputs, seed), k, candidates)
        x = inputs["embeddings"] if self.params.get("normalize") is False else unit(inputs["embeddings"])
        return plain(x, inputs["embeddings"], some, k, context, candidates, seed)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("k", [4, 12, 24])
    def test_picks_and_scores_are_those_of_brute_force(self, local, k, seed):
        inputs, context = self.inputs(seed), np.array([2, 9, 1])
        candidates = ~np.isin(np.arange(ROWS), [*context, 20, 21])
        picks, scores, near = self.oracle(inputs, k, context, candidates, seed)
        got = self.select(local, inputs, k, seed=seed, labeled=[2, 9], pending=[1], candidates=candidates)
        assert got.indices.tolist() == picks
        np.testing.assert_allclose(got.scores, scores, rtol=1e-9, atol=1e-9)
        assert [each.rows.tolist() for each in got.warnings] == ([picks[near:]] if near < k else [])

    def test_a_shorter_budget_is_a_prefix(self, local):
        """It is not: fewer picks have fewer clusters."""
        assert len(self.select(local, self.inputs(), 3, labeled=[0])) == 3


class TestManyPasses(TestDropQuery):
    """Few rows change their class in more than half of them, and some in none."""

    params: ClassVar = {"passes": 6, "dropout": 0.1, "normalize": False}


class TestSamples(TestDropQuery):
    params: ClassVar = {"normalize": False}
    beside: ClassVar = {}
    options: ClassVar = {"samples_kind": "LOGITS"}

    def make(self, rng):
        logits = rng.normal(size=(ROWS, 1, C)) * 2 + rng.normal(size=(ROWS, 5, C))
        return {"embeddings": rng.normal(size=(ROWS, D)), "samples": logits}

    def changed(self, inputs, seed):
        p = np.exp(inputs["samples"])
        likeliest = (p / p.sum(-1, keepdims=True)).mean(1).argmax(-1)
        return (p.argmax(-1) != likeliest[:, None]).sum(1), 5


def test_the_threshold_falls_until_there_are_25_rows_per_pick():
    changed = torch.tensor([3] * 10 + [2] * 20 + [1] * 100 + [0] * 100)
    pool = Whole(230)
    for k, found in ((1, 30), (2, 130), (9, 130)):
        choice = Choice(k, torch.ones(230, dtype=torch.bool), pool)
        rows, count = drop_query._unsettled(changed, 3, choice, pool)
        assert (int(rows.sum()), count) == (found, found)


def test_rows_that_no_pass_changes_are_the_last(local: Client):
    """Entries that all speak for one class: only rows 3, 5 and 8, between two classes, can change."""
    x = np.tile(np.eye(2) * 5, (10, 1)).repeat(8, axis=1) / 8
    x[[3, 5, 8]] = np.random.default_rng(0).uniform(0.9, 1, size=(3, 16))
    head = np.eye(2).repeat(8, axis=1)
    got = local.select("drop_query", 6, embeddings=x, head_weights=head, params={"passes": 20, "dropout": 0.2})
    assert set(got.indices[:3]) == {3, 5, 8}
    (warning,) = got.warnings
    assert (warning.code, warning.rows.tolist()) == ("FALLBACK", got.indices[3:].tolist())
    assert (got.scores[3:] >= 0).all()


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_without_a_row_that_changes_the_farthest_are_chosen(local: Client, dropout):
    """Nothing is left out, or everything, which makes all rows of the first class."""
    x = np.array([[1.0, 0.0], [4.0, 0.0], [9.0, 0.0], [5.5, 0.0]])
    params = {"dropout": dropout, "normalize": False}
    got = local.select("drop_query", 3, embeddings=x, head_weights=np.eye(2), labeled=[0], params=params)
    assert got.indices.tolist() == [2, 3, 1]
    assert got.scores.tolist() == [8.0, 3.5, 1.5]
    assert [each.code for each in got.warnings] == ["FALLBACK"]


def test_a_bias_alone_decides_when_everything_is_left_out(local: Client):
    """Row 0 is of class 0 by its entries; the bias speaks for class 1, but not against entries that are kept."""
    x = np.array([[1.0, 0.0], [0.0, 1.0], [9.0, 0.0], [1.1, 0.0]])
    params = {"dropout": 0.5, "passes": 40, "normalize": False}
    head = {"head_weights": np.eye(2), "head_bias": np.array([0.0, 0.5])}
    got = local.select("drop_query", 4, embeddings=x, **head, params=params, labeled=None)
    assert set(got.indices[:3]) == {0, 2, 3}
    assert [each.rows.tolist() for each in got.warnings] == [[1]]


def test_a_head_or_samples_are_needed(local: Client, remote: Client):
    for client in (local, remote):
        with pytest.raises(InvalidInput, match=r"needs pool\.head_weights .* or pool\.samples") as caught:
            client.select("drop_query", 2, embeddings=np.eye(4))
        assert caught.value.field == "pool.head_weights"


def test_labels_of_several_per_row_are_refused(local: Client):
    with pytest.raises(InvalidInput, match="serves task MULTICLASS"):
        local.select("drop_query", 2, embeddings=np.eye(4), head_weights=np.eye(4), task="MULTILABEL")


def test_rows_without_length_never_change(local: Client):
    x = np.random.default_rng(0).normal(size=(40, 5))
    x[7] = 0
    got = local.select("drop_query", 5, embeddings=x, head_weights=np.random.default_rng(1).normal(size=(3, 5)))
    assert 7 not in got.indices
    assert [(each.code, each.rows.tolist()) for each in got.warnings] == [("INERT_ROWS", [7])]
