"""BatchBALD: exact against every configuration of labels, drawn against exact, and what it says of saturation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from queryselect import Client, InvalidInput
from queryselect_service import strategy as strategies
from queryselect_service.kernels import batch_bald as kernel
from queryselect_service.maths.configurations import Configurations
from queryselect_service.shards import Whole
from queryselect_service.spec import build
from tests.kernels.bayesian import C, K, SampleScore, binary, entropy, information, sigmoid, softmax
from tests.strategy_case import ROWS


def greedy(rows, k, candidates):
    """Picks, gains and the gains of the first step, by every configuration: rows (N, V, K, c) of V variables each.

    A row gains the sum over its variables of the information in each, given the labels of the batch.
    """
    members = rows.shape[2]
    joint = np.ones((1, members))  # (M, K), p(y | k)
    picks, scores, first = [], [], None
    for _ in range(k):
        likely = joint.mean(1)  # (M,)
        w = joint[likely > 0] / joint[likely > 0].sum(1, keepdims=True)
        q = likely[likely > 0]
        gains = np.array([sum(q @ (entropy(w @ p) - w @ entropy(p)) for p in row) for row in rows])
        first = gains if first is None else first
        row = max(
            (row for row in np.flatnonzero(candidates) if row not in picks),
            key=lambda row: (round(gains[row], 11), -row),
        )
        picks.append(int(row))
        scores.append(gains[row])
        for p in rows[row]:
            joint = (joint[:, None] * p.T[None]).reshape(-1, members)
    return np.array(picks), np.array(scores), first


class TestBatchBald(SampleScore):
    name = "batch_bald"
    seeded = False  # as long as all configurations are there
    params = {"num_samples": 3**7}

    def oracle(self, inputs, k, context, candidates):
        return greedy(self.distributions(inputs)[:, None], k, candidates)

    def make(self, rng):
        return {"samples": rng.normal(size=(ROWS, 1, 3)) + rng.normal(size=(ROWS, K, 3)) * 1.5}


class TestDrawnBatchBald(SampleScore):
    """Few configurations, so that most picks are by drawn ones; the oracle is that of exact picks alone."""

    name = "batch_bald"
    params = {"num_samples": 40}
    seeded = True
    slice_tolerance = 1e-5

    def make(self, rng):
        return {"samples": rng.normal(size=(ROWS, 1, 3)) + rng.normal(size=(ROWS, K, 3)) * 1.5}

    def oracle(self, inputs, k, context, candidates):
        raise NotImplementedError

    test_picks_and_scores_are_those_of_brute_force = None


class TestBatchBaldOfLabels(SampleScore):
    name = "batch_bald"
    seeded = False
    options = {"samples_kind": "LOGITS", "task": "MULTILABEL"}
    params = {"num_samples": 4**7}

    def make(self, rng):
        return {"samples": rng.normal(size=(ROWS, 1, 2)) + rng.normal(size=(ROWS, K, 2)) * 1.5}

    def oracle(self, inputs, k, context, candidates):
        return greedy(binary(sigmoid(inputs["samples"])).transpose(0, 2, 1, 3), k, candidates)


def correlated(rng, rows=120, members=12, classes=4, noise=1.5):
    """Samples of linear heads on the same features: rows that are near each other tell the same."""
    x = rng.normal(size=(rows, 3))
    heads = rng.normal(size=(1, classes, 3)) + noise * rng.normal(size=(members, classes, 3))
    return softmax(np.einsum("nd,kcd->nkc", x, heads))


def select(samples, k, seed=0, **params):
    strategy, rows = strategies.STRATEGIES["batch_bald"], len(samples)
    return strategies.select(
        strategy,
        {"samples": torch.from_numpy(samples)},
        k=k,
        pool=Whole(rows),
        spec=build(strategy.spec, params),
        candidates=torch.ones(rows, dtype=torch.bool),
        context=torch.empty(0, dtype=torch.int64),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_samples", [300, 5000, 70_000])
def test_rows_that_are_left_out_are_not_the_best(monkeypatch, seed, num_samples):
    """The same picks and gains as where every row's gain is computed in every step."""
    samples = correlated(np.random.default_rng(seed))
    lazy = select(samples, 9, seed, num_samples=num_samples)

    def every_gain(self, bounds):
        gains, _ = self._evaluate(torch.arange(len(bounds)))
        return gains

    monkeypatch.setattr(kernel._Step, "gains", every_gain)
    whole = select(samples, 9, seed, num_samples=num_samples)
    assert lazy.indices.tolist() == whole.indices.tolist()
    np.testing.assert_allclose(lazy.scores, whole.scores, rtol=0, atol=1e-11)


def test_few_gains_are_computed(monkeypatch):
    """Of the joint probabilities that all rows would take, in every step, with all configurations."""
    samples, counted = correlated(np.random.default_rng(0), rows=1000, members=40), []
    gains = kernel._conditional_gains

    def count(posteriors, p, own):
        counted.append(len(posteriors) * len(p))
        return gains(posteriors, p, own)

    monkeypatch.setattr(kernel, "_conditional_gains", count)
    select(samples, 9)
    configurations = [4, 16, 64, 256, 1024, 4096, 10_000, 10_000]
    assert sum(counted) < 0.4 * 1000 * sum(configurations)


@pytest.mark.parametrize("num_samples", [50, 1000])
def test_what_the_batch_knows_never_falls_and_is_at_most_ln_k(num_samples):
    samples = correlated(np.random.default_rng(1), noise=4.0)
    got = select(samples, 40, num_samples=num_samples)
    assert (got.scores >= 0).all()
    known = got.scores.cumsum(0)
    assert known[-1] <= np.log(12) + 0.25  # an estimate of it, one pick after the other
    batch = Configurations(12, num_samples, 0, torch.device("cpu"))
    before = 0.0
    for row in got.indices:
        batch.add(torch.from_numpy(samples[row])[:, None])
        assert 0 <= float(batch.information) <= np.log(12) + 1e-12
        assert float(batch.information) >= before - 0.15
        before = float(batch.information)


def test_drawn_information_comes_near_the_exact_one():
    samples = correlated(np.random.default_rng(2), rows=60)
    exact = select(samples, 7, num_samples=1_000_000)
    for seed in range(5):
        batch = Configurations(12, 3000, seed, torch.device("cpu"))
        for row in exact.indices:
            batch.add(torch.from_numpy(samples[row])[:, None])
        assert not batch.exact
        assert float(batch.information) == pytest.approx(float(exact.scores.sum()), abs=0.1)


def test_more_draws_spread_less():
    samples = correlated(np.random.default_rng(3), rows=60)
    spreads = []
    for num_samples in (100, 6400):
        last = [float(select(samples, 9, seed, num_samples=num_samples).scores.sum()) for seed in range(12)]
        spreads.append(np.std(last))
    assert spreads[1] < 0.4 * spreads[0]


def test_repeats_of_a_row_are_not_asked_for(local: Client):
    """The point of a batch: BALD asks for every copy of its best row, BatchBALD for other rows."""
    samples = np.repeat(correlated(np.random.default_rng(0), rows=20), 4, axis=0)
    alone = local.select("bald", 8, samples=samples).indices // 4
    together = local.select("batch_bald", 8, samples=samples).indices // 4
    assert len(set(alone)) == 2
    assert len(set(together)) >= 5


def test_saturation_is_told(local: Client, remote: Client):
    rng = np.random.default_rng(0)
    samples = np.eye(3)[rng.integers(3, size=(40, 8))] * 0.98 + 0.02 / 3
    for client in (local, remote):
        got = client.select("batch_bald", 6, samples=samples)
        (warning,) = (each for each in got.warnings if each.code == "SATURATED")
        known = np.cumsum(got.scores)
        first = int(np.argmax(known >= 0.95 * np.log(8)))
        assert warning.message.startswith(
            f"the first {first + 1} of 6 picks tell {known[first]:.3g} of the at most ln K = 2.08"
        )
        assert warning.rows.tolist() == got.indices[first:].tolist()
        few = client.select("batch_bald", first, samples=samples)
        assert "SATURATED" not in {each.code for each in few.warnings}


def test_samples_that_agree_are_worth_exactly_nothing(local: Client):
    samples = np.repeat(np.random.default_rng(0).dirichlet(np.ones(C), (9, 1)), K, axis=1)
    got = local.select("batch_bald", 6, samples=samples)
    assert got.scores.tolist() == [0] * 6
    assert got.indices.tolist() == list(range(6))


def test_zeros_are_exact(local: Client):
    """Impossible classes change nothing, and there is no NaN, where logarithms of 0 abound."""
    p = correlated(np.random.default_rng(0), rows=30, members=K)
    wider = np.concatenate([p, np.zeros((30, K, 2))], axis=2)
    one, two = (local.select("batch_bald", 5, samples=each, params={"num_samples": 10_000}) for each in (p, wider))
    assert one.indices.tolist() == two.indices.tolist()
    np.testing.assert_allclose(one.scores, two.scores, rtol=0, atol=1e-12)
    certain = np.eye(C)[np.random.default_rng(0).integers(C, size=(30, K))]
    got = local.select("batch_bald", 20, samples=certain, params={"num_samples": 30})
    assert np.isfinite(got.scores).all()
    assert got.scores.sum() == pytest.approx(np.log(K), abs=1e-9)
    with np.errstate(divide="ignore"):
        logs = local.select(
            "batch_bald", 20, samples=np.log(certain), samples_kind="LOG_PROBABILITIES", params={"num_samples": 30}
        )
    assert logs.indices.tolist() == got.indices.tolist()


def test_the_first_pick_is_that_of_bald(local: Client):
    p = np.random.default_rng(0).dirichlet(np.ones(C), (ROWS, K))
    got = local.select("batch_bald", 1, samples=p, return_pool_scores=True)
    plain = local.select("bald", 1, samples=p, return_pool_scores=True)
    assert got.indices.tolist() == plain.indices.tolist()
    np.testing.assert_allclose(got.pool_scores, plain.pool_scores, rtol=0, atol=1e-14)
    np.testing.assert_allclose(got.pool_scores, [information(row) for row in p], rtol=0, atol=1e-12)


def test_more_samples_than_configurations_are_drawn_once_each():
    got = select(correlated(np.random.default_rng(0), members=12), 8, num_samples=5)
    assert len(set(got.indices.tolist())) == 8
    assert (got.scores >= 0).all()


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"samples": np.full((5, 1, C), 1 / C)}, "pool.samples", "K at least 2"),
        ({"samples": np.full((5, K, C), 0.3)}, "pool.samples", "row 0 sums to 1.2"),
        (
            {"samples": np.full((5, K, C), 1 / C), "params": {"num_samples": 0}},
            "strategy.batch_bald.num_samples",
            "between 1",
        ),
    ],
    ids=["one sample", "bad row", "no configurations"],
)
def test_what_is_wrong_is_named(local: Client, remote: Client, options, field, words):
    for client in (local, remote):
        with pytest.raises(InvalidInput, match=words) as caught:
            client.select("batch_bald", 2, **options)
        assert caught.value.field == field
