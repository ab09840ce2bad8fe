"""variation_ratio, mean_std, predictive_entropy, vote_entropy, consensus_kl and max_disagreement."""

from __future__ import annotations

import numpy as np
import pytest

from queryselect import Client, InvalidInput
from tests.kernels.bayesian import C, K, LabelSampleScore, SampleScore, binary, entropy, information, kl, votes
from tests.strategy_case import ROWS

DISAGREEMENT = ["bald", "consensus_kl", "max_disagreement", "mean_std", "variation_ratio", "vote_entropy"]


class Voted:
    """Samples whose votes differ from row to row, so that no two rows are a tie."""

    def make(self, rng):
        members = 64
        z = rng.normal(size=(ROWS, members, C))
        for row, most in enumerate(rng.permutation(np.arange(20, 20 + ROWS))):
            voted = np.concatenate(
                [np.full(most, row % C), rng.choice(np.delete(np.arange(C), row % C), members - most)]
            )
            z[row, np.arange(members), rng.permutation(voted)] += 9
        return {"samples": z}


class VotedLabels:
    def make(self, rng):
        members = 64
        shares = rng.permutation(np.arange(1, 1 + ROWS))  # of 64; distinct, and below a half
        q = np.arange(members)[None, :, None] < np.stack([shares, *[np.zeros(ROWS, int)] * (C - 1)], axis=1)[:, None]
        return {"samples": np.where(q, 1.0, -1.0) * rng.uniform(0.5, 2, size=q.shape)}


class TestVariationRatio(Voted, SampleScore):
    name = "variation_ratio"

    def score(self, p):
        return 1 - votes(p).max()


class TestVariationRatioOfLabels(VotedLabels, LabelSampleScore):
    name = "variation_ratio"

    def score(self, p):
        return 1 - votes(p).max()


class TestMeanStd(SampleScore):
    name = "mean_std"

    def score(self, p):
        return p.std(axis=0).mean()


class TestMeanStdOfLabels(LabelSampleScore):
    name = "mean_std"

    def score(self, p):
        return p[:, 1].std()


class TestPredictiveEntropy(SampleScore):
    name = "predictive_entropy"

    def score(self, p):
        return entropy(p.mean(0))


class TestPredictiveEntropyOfLabels(LabelSampleScore):
    name = "predictive_entropy"
    how = staticmethod(np.sum)

    def score(self, p):
        return entropy(p.mean(0))


class TestVoteEntropy(Voted, SampleScore):
    name = "vote_entropy"

    def score(self, p):
        return entropy(votes(p))


class TestSoftVoteEntropy(SampleScore):
    name = "vote_entropy"
    params = {"soft": True, "normalize": True}

    def score(self, p):
        return entropy(p.mean(0)) / np.log(C)


class TestVoteEntropyOfLabels(VotedLabels, LabelSampleScore):
    name = "vote_entropy"
    params = {"normalize": True, "label_aggregation": "MAX"}
    how = staticmethod(np.max)

    def score(self, p):
        return entropy(votes(p)) / np.log(2)


class TestConsensusKl(SampleScore):
    name = "consensus_kl"

    def score(self, p):
        return np.mean([kl(each, p.mean(0)) for each in p])


class TestConsensusKlOfLabels(LabelSampleScore):
    name = "consensus_kl"
    how = staticmethod(np.sum)

    def score(self, p):
        return information(p)


class TestMaxDisagreement(SampleScore):
    name = "max_disagreement"

    def score(self, p):
        return max(kl(each, p.mean(0)) for each in p)


class TestMaxDisagreementOfLabels(LabelSampleScore):
    """A member diverges by the sum over its labels, and then the largest counts."""

    name = "max_disagreement"

    def scores(self, inputs):
        q = binary(1 / (1 + np.exp(-inputs["samples"])))
        return kl(q, q.mean(1, keepdims=True)).sum(-1).max(1)


def test_votes_for_other_classes_are_a_tie(local: Client):
    """3, 2 and 1 votes have one entropy, in whatever order they are added up."""
    counts = np.array([[3, 2, 1], [1, 2, 3], [2, 3, 1], [1, 3, 2]])
    samples = np.stack([np.eye(3)[np.repeat(np.arange(3), row)] for row in counts]) * 0.6 + 0.4 / 3
    assert local.select("vote_entropy", 4, samples=samples).indices.tolist() == [0, 1, 2, 3]


def test_the_normalised_entropy_of_votes_is_1_at_the_most(local: Client):
    for members, classes in ((3, 5), (5, 3)):
        samples = np.eye(classes)[np.arange(members) % classes][None]
        got = local.select("vote_entropy", 1, samples=samples, params={"normalize": True})
        most = min(members, classes)
        shares = np.bincount(np.arange(members) % classes) / members
        np.testing.assert_allclose(got.scores, [entropy(shares) / np.log(most)], rtol=1e-12)
        assert got.scores[0] <= 1 + 1e-12


@pytest.mark.parametrize("name", DISAGREEMENT)
@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
def test_samples_that_agree_score_exactly_0(local: Client, name, task):
    rng = np.random.default_rng(0)
    for members in (2, 3, 7, 20, 100):
        p = np.repeat(rng.dirichlet(np.full(C, 0.2), (40, 1)), members, axis=1)
        got = local.select(name, 1, samples=p, task=task, return_pool_scores=True)
        assert (got.pool_scores == 0).all()


@pytest.mark.parametrize("name", DISAGREEMENT)
@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
def test_one_sample_disagrees_with_nobody(local: Client, remote: Client, name, task):
    p = np.full((5, 1, C), 1 / C)
    for client in (local, remote):
        with pytest.raises(InvalidInput, match=r"K at least 2.* it has \(5 1 4\)") as caught:
            client.select(name, 1, samples=p, task=task)
        assert caught.value.field == "pool.samples"


@pytest.mark.parametrize("name", ["predictive_entropy", "least_confidence", "margin", "entropy"])
def test_one_sample_is_uncertain_all_the_same(local: Client, name):
    p = np.random.default_rng(0).dirichlet(np.ones(C), (ROWS, 1))
    plain = "entropy" if name == "predictive_entropy" else name
    one = local.select(name, 5, samples=p, return_pool_scores=True)
    two = local.select(plain, 5, probabilities=p[:, 0], return_pool_scores=True)
    np.testing.assert_allclose(one.pool_scores, two.pool_scores, rtol=1e-12)


@pytest.mark.parametrize("name", ["least_confidence", "margin", "entropy"])
@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
def test_uncertainty_of_samples_is_that_of_their_mean(local: Client, remote: Client, name, task):
    p = np.random.default_rng(0).dirichlet(np.ones(C), (ROWS, K))
    for client in (local, remote):
        one = client.select(
            name, 5, samples=np.log(p), samples_kind="LOG_PROBABILITIES", task=task, return_pool_scores=True
        )
        two = client.select(name, 5, probabilities=p.mean(1), task=task, return_pool_scores=True)
        np.testing.assert_allclose(one.pool_scores, two.pool_scores, rtol=1e-11)
        both = client.select(name, 5, probabilities=p.mean(1), samples=p[::-1], task=task, return_pool_scores=True)
        assert both.pool_scores.tolist() == two.pool_scores.tolist()


@pytest.mark.parametrize("how", ["MEAN", "SUM", "MAX", "TOP_K_MEAN"])
@pytest.mark.parametrize(
    "name", ["bald", "consensus_kl", "mean_std", "predictive_entropy", "variation_ratio", "vote_entropy"]
)
def test_every_way_to_aggregate_labels(local: Client, name, how):
    q = np.random.default_rng(0).random((12, K, C))
    params = {"label_aggregation": how, **({"top_k": 2} if how == "TOP_K_MEAN" else {})}
    got = local.select(name, 1, samples=q, task="MULTILABEL", params=params, return_pool_scores=True).pool_scores
    single = {"label_aggregation": "SUM"}
    each = np.stack(
        [
            local.select(
                name, 1, samples=q[..., [label]], task="MULTILABEL", params=single, return_pool_scores=True
            ).pool_scores
            for label in range(C)
        ],
        axis=1,
    )
    expected = {
        "MEAN": each.mean(1),
        "SUM": each.sum(1),
        "MAX": each.max(1),
        "TOP_K_MEAN": np.sort(each)[:, -2:].mean(1),
    }
    np.testing.assert_allclose(got, expected[how], rtol=1e-12)


def test_the_mean_divergence_is_bald_bit_by_bit(local: Client):
    p = np.random.default_rng(0).dirichlet(np.ones(C), (ROWS, K))
    one, two = (local.select(name, 5, samples=p, return_pool_scores=True) for name in ("bald", "consensus_kl"))
    assert one.pool_scores.tolist() == two.pool_scores.tolist()
