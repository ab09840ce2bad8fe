"""Committee and Bayesian scores against other libraries', run unchanged (tests/data/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from queryselect import Client
from queryselect_service.choice import Choice
from queryselect_service.kernels import power_bald
from queryselect_service.kernels.batch_bald import _conditional_gains
from queryselect_service.maths.configurations import Configurations
from queryselect_service.shards import Whole

DATA = np.load(Path(__file__).parents[1] / "data" / "bayesian.npz")
S = DATA["single/probs_N_K_C"]
COLUMNS = [
    ("bald", "bald__epig_probs", 1e-10),
    ("bald", "bald__redux", 1e-10),
    ("variation_ratio", "variation_ratio_votes__skactiveml", 1e-10),
    ("mean_std", "mean_std_pop__epig", 1e-10),
    ("predictive_entropy", "consensus_entropy__modAL", 1e-10),
    ("vote_entropy", "vote_entropy__modAL", 1e-10),
    ("vote_entropy", "vote_entropy__skactiveml", 1e-10),
    ("consensus_kl", "kl_mean_consensus__skactiveml", 1e-6),  # which moves probabilities by 1e-7
    ("max_disagreement", "kl_max_disagreement__modAL", 1e-10),
    ("least_confidence", "least_confidence__modAL", 1e-10),
    ("margin", "margin__skactiveml", 1e-10),
    ("entropy", "entropy__modAL", 1e-10),
]


def scores(client, name, **options):
    return client.select(name, 3, return_pool_scores=True, **options).pool_scores


@pytest.mark.parametrize(("name", "column", "tolerance"), COLUMNS, ids=[each[1] for each in COLUMNS])
def test_scores_are_theirs(local: Client, name, column, tolerance):
    np.testing.assert_allclose(scores(local, name, samples=S), DATA[f"single/{column}"], rtol=0, atol=tolerance)
    narrow = scores(local, name, samples=S.astype(np.float32))
    np.testing.assert_allclose(narrow, DATA[f"single/{column}"], rtol=0, atol=max(tolerance, 1e-5))


def test_nats_are_bits_times_ln_2(local: Client):
    theirs = DATA["single/bald_log2__smalltext"] * np.log(2)
    np.testing.assert_allclose(scores(local, "bald", samples=S), theirs, rtol=0, atol=1e-7)


def test_zeros_are_exact_where_others_have_nan(local: Client):
    np.testing.assert_allclose(
        scores(local, "bald", samples=DATA["edge/probs_N_K_C"]), DATA["edge/bald__epig_probs"], rtol=0, atol=1e-10
    )


def test_batch_bald_picks_what_they_pick_with_their_information(local: Client):
    samples, most = DATA["exact/probs_N_K_C"], int(DATA["exact/num_samples"])
    got = local.select("batch_bald", 8, samples=samples, params={"num_samples": most}, return_pool_scores=True)
    assert got.indices.tolist() == DATA["exact/idx__redux_f64"].tolist()
    np.testing.assert_allclose(np.cumsum(got.scores), DATA["exact/scores__redux_f64"], rtol=0, atol=1e-10)
    assert got.scores.sum() == pytest.approx(float(DATA["exact/bruteforce_joint_MI_of_selected"]), abs=1e-10)
    np.testing.assert_allclose(got.pool_scores, DATA["exact/utilities__redux_f64"][0], rtol=0, atol=1e-10)


def test_drawn_configurations_come_within_a_tenth_of_a_nat(local: Client):
    samples = DATA["sampled/probs_N_K_C"]
    for seed in range(3):
        got = local.select("batch_bald", 8, samples=samples, seed=seed)
        mean = DATA["sampled/scores_M10000"].mean(0)
        np.testing.assert_allclose(np.cumsum(got.scores), mean, rtol=0, atol=0.1)
        assert got.indices[:5].tolist() == DATA["sampled/idx_M10000"][0, :5].tolist()  # exact so far


@pytest.mark.parametrize(("most", "tolerance"), [(1000, 0.01), (9_999, 0.005)])
def test_drawn_gains_differ_between_rows_as_exact_ones_do(most, tolerance):
    """H(y_S, y_n) of a fixed batch, from drawn configurations and from all of them."""
    samples = torch.from_numpy(DATA["sampled/probs_N_K_C"])
    batch = Configurations(samples.shape[1], most, 0, samples.device)
    history = DATA["sampled/fixed_history"]
    for row in history:
        batch.add(samples[row][:, None])
    assert not batch.exact
    own = torch.special.entr(samples).sum(-1)  # (N, K)
    gains = (batch.weights @ _conditional_gains(batch.posteriors, samples[:, :, None], own)).numpy()
    exact = DATA["sampled/fixed_history_exact_joint_entropy_N"] - own.mean(1).numpy()
    rest = np.setdiff1d(np.arange(len(samples)), history)
    apart = (gains - gains[rest].mean()) - (exact - exact[rest].mean())
    assert np.abs(apart[rest]).std() < tolerance


def test_epig_is_theirs(local: Client):
    pool, targets = DATA["epig/pool_N_K_C"], DATA["epig/targ_T_K_C"]
    for extra, column in (({}, "epig"), ({"weights": DATA["epig/weights"]}, "epig_weighted")):
        found = scores(local, "epig", samples=pool, reference={"samples": targets, **extra})
        np.testing.assert_allclose(found, DATA[f"epig/{column}"], rtol=0, atol=1e-10)


def test_label_vectors_are_exact_and_their_sum_is_the_labels(local: Client):
    samples = DATA["multilabel/probs_N_K_L"]
    for how, column in (("JOINT", "bald_joint_exact"), ("SUM", "bald_sum")):
        found = scores(local, "bald", samples=samples, task="MULTILABEL", params={"label_aggregation": how})
        np.testing.assert_allclose(found, DATA[f"multilabel/{column}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 8.0])
def test_rows_are_drawn_with_baals_probabilities(temperature):
    """Their temperature is the inverse of the power."""
    s = torch.from_numpy(DATA["stochastic/scores"])
    n = len(s)
    for form, name in (("POWER", "power"), ("SOFTMAX", "gibbs"), ("SOFTRANK", "rank")):
        spec = power_bald.PowerBald(form=power_bald.PowerForm(form), beta=1 / temperature)
        choice, pool = Choice(1, torch.ones(n, dtype=torch.bool), Whole(n)), Whole(n)
        noise = power_bald.power_bald(
            torch.ones_like(s), choice=choice, seed=0, pool=pool, spec=power_bald.PowerBald(beta=0.0)
        )
        weights = torch.softmax(power_bald.power_bald(s, choice=choice, seed=0, pool=pool, spec=spec) - noise, 0)
        np.testing.assert_allclose(weights, DATA[f"stochastic/{name}_T{temperature}"], rtol=1e-6, atol=1e-12)


def test_the_mistake_of_calling_bald_on_probabilities(local: Client):
    """A formula for logarithms, given probabilities, ranks other rows first. Here that call is refused, or right."""
    samples = DATA["edge/axis_probs_N_K_C"]

    def of_logarithms(x):  # (N, K, C)
        mean = np.log(np.exp(x).mean(1))
        return -(np.exp(mean) * mean).sum(-1) + (np.exp(x) * x).sum(-1).mean(1)

    np.testing.assert_allclose(of_logarithms(np.log(samples)), DATA["edge/seed_bald_on_logprobs"], atol=1e-6)
    wrong, right = DATA["edge/seed_bald_called_on_probs"], scores(local, "bald", samples=samples)
    np.testing.assert_allclose(right, DATA["edge/seed_bald_on_logprobs"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(right, DATA["edge/baal_right_axis_N_C_K"], rtol=0, atol=1e-6)
    assert np.argsort(-wrong).tolist() != np.argsort(-right).tolist()
