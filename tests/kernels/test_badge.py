"""badge: its first pick, its distances, and that it draws by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from queryselect import Client
from queryselect_service.choice import Choice
from queryselect_service.kernels import badge as module
from queryselect_service.kernels.badge import Badge, badge
from queryselect_service.maths.noise import uniform
from queryselect_service.maths.predictions import Predictions
from queryselect_service.shards import Whole
from tests.kernels.fisher import softmax
from tests.strategy_case import ROWS, StrategyCase

DATA = Path(__file__).parent.parent / "data"
CLASSES = 4


def gradients(h, p):
    """(N, C D), written out as the paper has them."""
    a = p.copy()
    a[np.arange(len(p)), p.argmax(1)] -= 1
    return (a[:, :, None] * h[:, None, :]).reshape(len(p), -1)


def draw(g, k, candidates, seed, together=module.TOGETHER):
    """k-means++ by rejection against distances that are out of date, with gradients written out."""
    squared = (g**2).sum(1)
    rows = [int(np.where(candidates, squared, -1).argmax())]
    scores, upper, shortest, weights, met = [squared[rows[0]]], np.full(len(g), np.inf), np.inf, None, 0
    while len(rows) < k:
        if squared[rows[-1]] < shortest:
            shortest, weights = squared[rows[-1]], None
            upper = np.minimum(upper, (np.sqrt(squared) + np.sqrt(shortest)) ** 2)
        true = ((g[:, None] - g[rows][None]) ** 2).sum(2).min(1)
        weights = np.where(candidates, upper, 0) if weights is None else weights
        for attempt in range(len(rows) - met > together, 3):
            if attempt:
                upper, met = np.minimum(upper, true), len(rows)
                weights = np.where(candidates, upper, 0)
            numbers = torch.arange(2 * attempt * module.PROPOSALS, 2 * (attempt + 1) * module.PROPOSALS)
            where, whether = np.split(uniform(seed, numbers, len(rows)).numpy(), 2)
            at = np.searchsorted(weights.cumsum(), where * weights.sum(), side="right")
            accepted = np.flatnonzero(whether * weights[at] < true[at])
            if len(accepted):
                weights = None if attempt == 2 else weights
                break
        rows.append(int(at[accepted[0]]))
        scores.append(true[rows[-1]])
    return np.array(rows), np.array(scores)


class TestBadge(StrategyCase):
    name = "badge"
    slice_tolerance = 1e-5

    def make(self, rng):
        self.seed = int(rng.bit_generator.seed_seq.entropy)
        return {"embeddings": rng.normal(size=(ROWS, 5)), "probabilities": rng.dirichlet(np.ones(CLASSES), ROWS)}

    def oracle(self, inputs, k, context, candidates):
        g = gradients(inputs["embeddings"], inputs["probabilities"])
        return *draw(g, k, candidates, self.seed), None


class TestBadgeByLogits(TestBadge):
    def make(self, rng):
        self.seed = int(rng.bit_generator.seed_seq.entropy)
        return {"embeddings": rng.normal(size=(ROWS, 5)), "logits": 3 * rng.normal(size=(ROWS, CLASSES))}

    def oracle(self, inputs, k, context, candidates):
        return *draw(gradients(inputs["embeddings"], softmax(inputs["logits"])), k, candidates, self.seed), None


class TestBadgeNormalized(TestBadge):
    params = {"normalize": True}

    def oracle(self, inputs, k, context, candidates):
        h = inputs["embeddings"]
        unit = h / np.linalg.norm(h, axis=1, keepdims=True)
        return *draw(gradients(unit, inputs["probabilities"]), k, candidates, self.seed), None


def test_first_pick_and_distances_are_those_of_the_authors_code():
    """Of digits. Their draws are by another generator; after their picks the distances must be theirs."""
    data = np.load(DATA / "badge.npz")
    h, p = torch.from_numpy(data["embeddings"]), Predictions(torch.from_numpy(data["probabilities"]))
    pool, picks = Whole(len(h)), data["picks"]
    choice = Choice(1, torch.ones(len(h), dtype=torch.bool), pool)
    none = torch.tensor([], dtype=torch.int64)
    assert badge(h, p, choice=choice, context=none, seed=0, pool=pool).indices.tolist() == [picks[0]]
    of = module._Gradients(h, p, pool, normalize=False)
    nearest = np.full(len(h), np.inf)
    for row in picks[:-1]:
        a, b = of.factors(torch.tensor([row]))
        theirs = module._Picks(a, b, of.lengths[[row]])
        nearest = np.minimum(nearest, of.squared(*of.factors(slice(None)), of.lengths, theirs).numpy())
    np.testing.assert_allclose(nearest, data["squared_distances"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("together", [0, 2, 64])
def test_draws_are_by_squared_distance(monkeypatch, together):
    """The third and the fourth pick of many draws, against their exact probabilities."""
    monkeypatch.setattr(module, "TOGETHER", together)
    rng = np.random.default_rng(0)
    h, p = rng.normal(size=(7, 3)), rng.dirichlet(np.ones(3), 7)
    g = gradients(h, p)
    between = ((g[:, None] - g[None]) ** 2).sum(2)
    first, draws = int((g**2).sum(1).argmax()), 4000
    chance: dict[tuple[int, ...], float] = {}
    for second in range(7):
        for third in range(7):
            near = between[first] / between[first].sum()
            then = np.minimum(between[first], between[second])
            odds = near[second] * then[third] / then.sum()
            if odds > 0:
                chance[second, third] = odds
    pool, inputs = Whole(7), (torch.from_numpy(h), Predictions(torch.from_numpy(p)))
    none, seen = torch.tensor([], dtype=torch.int64), dict.fromkeys(chance, 0)
    for seed in range(draws):
        choice = Choice(3, torch.ones(7, dtype=torch.bool), pool)
        rows = badge(*inputs, choice=choice, context=none, seed=seed, pool=pool).indices.tolist()
        assert rows[0] == first
        seen[tuple(rows[1:])] += 1
    counts, expected = np.array(list(seen.values())), draws * np.array(list(chance.values()))
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_most_picks_come_without_another_look_at_all_rows(monkeypatch, local: Client):
    meetings = []
    meet = module._Draws._meet

    def counted(self):
        meetings.append(1)
        meet(self)

    monkeypatch.setattr(module._Draws, "_meet", counted)
    rng = np.random.default_rng(0)
    picks = local.select("badge", 200, embeddings=rng.normal(size=(5000, 8)), logits=rng.normal(size=(5000, 5)))
    assert len(set(picks.indices)) == 200
    assert len(meetings) < 10


def test_rows_like_a_pick_are_never_drawn_before_others(local: Client):
    rng = np.random.default_rng(0)
    rows = np.arange(90) % 30
    x, p = 1000 + rng.normal(size=(30, 6))[rows], rng.dirichlet(np.ones(3), 30)[rows]
    for dtype in (np.float32, np.float64):
        picks = local.select("badge", 90, embeddings=x.astype(dtype), probabilities=p, seed=1)
        assert len(set(rows[picks.indices[:30]])) == 30
        assert (picks.scores[30:] == 0).all()
        (warning,) = picks.warnings
        assert (warning.code, warning.rows.tolist()) == ("SATURATED", picks.indices[30:].tolist())


def test_saturated_predictions_fall_back_to_farthest_first(local: Client):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    sure = np.eye(4)[rng.integers(0, 4, 40)]
    for lists in ({}, {"labeled": [1, 2]}):
        picks = local.select("badge", 9, embeddings=x, probabilities=sure, **lists)
        wanted = local.select("k_center_greedy", 9, embeddings=x, **lists)
        assert picks.indices.tolist() == wanted.indices.tolist()
        assert picks.scores.tolist() == wanted.scores.tolist()
        (warning,) = picks.warnings
        assert warning.code == "SATURATED"
        assert warning.message.startswith("9 picks are farthest-first by embedding")


def test_the_few_gradients_that_there_are_come_first(local: Client):
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(40, 3)), np.eye(4)[rng.integers(0, 4, 40)]
    p[[5, 17, 30]] = 0.25
    picks = local.select("badge", 8, embeddings=x, probabilities=p)
    assert {5, 17, 30} < set(picks.indices[:4])  # one of the rows without gradient is away from the others
    (warning,) = picks.warnings
    assert warning.rows.tolist() == picks.indices[4:].tolist()


def test_nearly_saturated_predictions_keep_their_digits(local: Client):
    """Logits tell the order of gradients that probabilities next to 1 would have lost."""
    gaps = np.linspace(40, 60, 20)
    logits = np.stack([gaps, np.zeros(20)], axis=1)
    picks = local.select("badge", 1, embeddings=np.ones((20, 2)), logits=logits)
    assert picks.indices.tolist() == [0]
    assert picks.scores[0] == pytest.approx(2 * 2 * np.exp(-40) ** 2, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e150])
def test_the_largest_and_the_smallest_numbers_are_numbers(local: Client, scale):
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(30, 3)), rng.dirichlet(np.ones(3), 30)
    plain = local.select("badge", 10, embeddings=x, probabilities=p)
    scaled = local.select("badge", 10, embeddings=x * scale, probabilities=p)
    assert scaled.indices.tolist() == plain.indices.tolist()


def test_defaults():
    assert Badge() == Badge(normalize=False)
