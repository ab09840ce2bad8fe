"""queryselect.simulate: a loop that does what a real project would do, and counts right."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from queryselect import Bald, Client, InvalidInput, KCenterGreedy
from queryselect.simulate import Curves, LinearProbes, Offer, curves


@pytest.fixture(scope="module")
def blobs():
    """Four separated classes in two dimensions, one of them rare: features, labels, test features, test labels."""
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [8, 0], [0, 8], [8, 8]])
    y = np.repeat([0, 1, 2, 3], [60, 60, 60, 6])
    test = np.repeat(np.arange(4), 25)
    return centres[y] + rng.normal(size=(186, 2)), y + 5, centres[test] + rng.normal(size=(100, 2)), test + 5


@pytest.fixture(scope="module")
def found(blobs, local: Client):
    x, y, test_x, test_y = blobs
    return curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=["random", "k_center_greedy", "entropy"],
        rounds=3, budget=4, initial=3, seeds=[0, 1, 2], progress=False,
    )  # fmt: skip


def test_shapes_and_counts(found: Curves):
    assert found.counts == [3, 7, 11, 15]
    assert list(found.accuracy) == ["random", "k_center_greedy", "entropy"]
    assert all(each.shape == (3, 4) for each in found.accuracy.values())
    assert found.initial.shape == (3, 3)
    assert found.metric == "accuracy"
    assert found.accuracy is found.values
    assert all(each.shape == (3, 3, 4) for each in found.rows.values())
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_every_strategy_starts_from_the_same_labels_and_never_picks_a_row_twice(found: Curves):
    first = {tuple(each[:, 0]) for each in found.accuracy.values()}
    assert len(first) == 1
    for runs in found.picks.values():
        for start, rounds in zip(found.initial, runs, strict=True):
            rows = [*start, *(row for picks in rounds for row in picks.indices)]
            assert len(rows) == len(set(rows)) == 15
    for name, runs in found.picks.items():
        np.testing.assert_array_equal(found.rows[name], [[picks.indices for picks in rounds] for rounds in runs])


def test_coverage_finds_the_rare_class_that_chance_misses(found: Curves):
    assert found.mean("k_center_greedy")[-1] > 0.95
    assert found.mean("k_center_greedy")[-1] >= found.mean("random")[-1]


def test_the_area_is_that_under_the_curve(found: Curves):
    expected = np.trapezoid(found.accuracy["random"], found.counts, axis=1) / 12
    np.testing.assert_allclose(found.area("random"), expected)


def test_the_same_seeds_give_the_same_curves_over_any_transport(found: Curves, blobs, remote: Client):
    x, y, test_x, test_y = blobs
    again = curves(
        remote, x, y, test_features=test_x, test_labels=test_y, strategies=["random", "k_center_greedy"],
        rounds=3, budget=4, initial=3, seeds=[0, 1, 2], progress=False,
    )  # fmt: skip
    for name, accuracy in again.accuracy.items():
        assert (accuracy == found.accuracy[name]).all()


def test_strategies_may_be_messages_or_named_with_parameters(blobs, local: Client):
    x, y, test_x, test_y = blobs
    got = curves(
        local, x, y, test_features=test_x, test_labels=test_y,
        strategies={"plain": KCenterGreedy(), "unit": ("k_center_greedy", {"normalize": True})},
        rounds=1, budget=2, initial=1, seeds=[0], progress=False,
    )  # fmt: skip
    assert got.picks["unit"][0][0].strategy.normalize
    assert not got.picks["plain"][0][0].strategy.normalize
    assert np.isnan(got.standard_error("plain")).all()
    assert "nan" not in got.table()


def test_one_class_to_begin_with_is_no_obstacle(blobs, local: Client):
    x, y, test_x, test_y = blobs
    got = curves(
        local, x[:60], y[:60], test_features=test_x, test_labels=test_y, strategies=["margin"],
        rounds=1, budget=1, initial=1, seeds=[0], progress=False,
    )  # fmt: skip
    assert got.accuracy["margin"].tolist() == [[0.25, 0.25]]


def test_the_table_tells_means_errors_and_gains(found: Curves):
    lines = found.table().splitlines()
    assert lines[0].split()[:5] == ["labels", "3", "7", "11", "15"]
    assert f"{100 * found.mean('random')[-1]:.1f} ±" in lines[1]
    gain = (found.area("entropy") - found.area("random")).mean()
    assert f"{100 * gain:+.1f} ±" in lines[3]


def test_progress_is_shown_and_can_be_silenced(blobs, local: Client, capsys):
    x, y, test_x, test_y = blobs
    for progress in (True, False):
        curves(
            local, x, y, test_features=test_x, test_labels=test_y, strategies=["random"],
            rounds=1, budget=1, initial=2, seeds=[0], progress=progress,
        )  # fmt: skip
        assert ("random: 100%" in capsys.readouterr().err) == progress


def test_what_cannot_be_is_said(blobs, local: Client):
    x, y, test_x, test_y = blobs
    options = {"test_features": test_x, "test_labels": test_y, "strategies": ["random"], "progress": False}
    with pytest.raises(ValueError, match="need 210 rows; there are 186"):
        curves(local, x, y, rounds=20, budget=10, initial=10, **options)
    with pytest.raises(ValueError, match="a round, a budget and a seed"):
        curves(local, x, y, **{**options, "seeds": []})
    with pytest.raises(ValueError, match="the same name"):
        curves(local, x, y, **{**options, "strategies": [KCenterGreedy(), KCenterGreedy(normalize=True)]})
    with pytest.raises(ValueError, match="186 rows of features and 185 labels"):
        curves(local, x, y[1:], **options)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"budget": 1.5}, "budget is a whole number of rows or a share of the pool between 0 and 1; it is 1.5"),
        ({"initial": 0.0}, "initial is a whole number"),
        ({"initial": 187}, "187 of 186"),
        ({"initial": [[1, 2]]}, r"\(seeds, n\) for 2 seeds; they are \(1, 2\)"),
        ({"initial": [[1.0, 2.0], [1.0, 2.0]]}, "whole numbers"),
        ({"initial": [[1, 2], [1, 1]]}, "different rows of the pool, from 0 to 185"),
        ({"initial": [[1, 2], [1, 186]]}, "different rows of the pool, from 0 to 185"),
        ({"task": "REGRESSION"}, "task must be MULTICLASS or MULTILABEL; it is 'REGRESSION'"),
        ({"task": "MULTILABEL"}, r"the shape \(N, L\); they have \(186,\) and \(100,\)"),
        ({"metric": "f1"}, "metric must be accuracy, auroc or a function; it is 'f1'"),
        ({"retrain": False}, "retrain=False needs a model with continue_fit; Pipeline has none"),
    ],
)
def test_options_that_cannot_be_are_refused(blobs, local: Client, wrong, says):
    x, y, test_x, test_y = blobs
    options = {"test_features": test_x, "test_labels": test_y, "strategies": ["random"], "seeds": [0, 1], **wrong}
    with pytest.raises(ValueError, match=says):
        curves(local, x, y, **options, progress=False)


def test_shares_are_of_the_pool(blobs, local: Client):
    x, y, test_x, test_y = blobs
    got = curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=["random"],
        rounds=2, budget=0.02, initial=0.1, seeds=[0], progress=False,
    )  # fmt: skip
    assert got.counts == [19, 23, 27]
    assert got.initial.shape == (1, 19)


def test_a_run_can_start_from_given_rows(found: Curves, blobs, local: Client):
    x, y, test_x, test_y = blobs
    got = curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=["entropy"],
        rounds=3, budget=4, initial=found.initial[1:2], seeds=[1], progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(got.rows["entropy"][0], found.rows["entropy"][1])


def surest(offer: Offer):
    """A mistake: the rows that the model is surest of."""
    best = offer.log_probabilities.max(axis=1)
    best[offer.labeled] = -np.inf
    return np.argsort(-best, kind="stable")[: offer.budget]


def test_a_function_is_a_strategy_too(found: Curves, blobs, local: Client):
    """It is told what the service is told, so that one can do the same as the other."""
    x, y, test_x, test_y = blobs
    offers = []

    def least_sure(offer: Offer):
        offers.append(offer)
        p = np.exp(offer.log_probabilities)
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=1)
        entropy[offer.labeled] = -np.inf
        return np.argsort(-entropy, kind="stable")[: offer.budget]

    got = curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=[least_sure, surest],
        rounds=3, budget=4, initial=3, seeds=[0, 1, 2], progress=False,
    )  # fmt: skip
    assert list(got.values) == ["least_sure", "surest"]
    np.testing.assert_array_equal(np.sort(got.rows["least_sure"]), np.sort(found.rows["entropy"]))
    assert not np.array_equal(got.rows["surest"], got.rows["least_sure"])
    assert got.picks["surest"] == [[], [], []]
    assert [each.seed for each in offers[:4]] == [0, 1, 2, 1000]
    assert offers[0].task == "MULTICLASS"
    np.testing.assert_array_equal(offers[0].embeddings, x)


@pytest.mark.parametrize(
    "choose",
    [
        lambda offer: offer.labeled[: offer.budget],
        lambda offer: [0, 0, 1, 2],
        lambda offer: [186, 0, 1, 2],
        lambda offer: np.zeros(4),
        lambda offer: [],
    ],
)
def test_what_a_function_chooses_is_checked(blobs, local: Client, choose):
    x, y, test_x, test_y = blobs
    with pytest.raises(ValueError, match="4 different unlabelled rows"):
        curves(
            local, x, y, test_features=test_x, test_labels=test_y, strategies={"wrong": choose},
            rounds=1, budget=4, initial=[[50, 51, 52, 53]], seeds=[0], progress=False,
        )  # fmt: skip


def test_auroc_is_the_mean_over_classes_of_both_kinds(blobs, local: Client):
    x, y, test_x, test_y = blobs
    models = []

    def make(seed: int):
        models.append((seed, LogisticRegression()))
        return models[-1][1]

    some = test_y != 8  # no test row has the rare class, so that it has no curve
    got = curves(
        local, x, y, test_features=test_x[some], test_labels=test_y[some], strategies=["random"], model=make,
        rounds=1, budget=40, initial=40, seeds=[3], metric="auroc", progress=False,
    )  # fmt: skip
    assert [seed for seed, _ in models] == [3000, 3001]
    model = models[-1][1]
    p = model.predict_proba(test_x[some])
    each = [roc_auc_score(test_y[some] == c, p[:, model.classes_ == c]) for c in (5, 6, 7)]
    assert got.values["random"][0, -1] == pytest.approx(np.mean(each))
    assert got.metric == "auroc"
    with pytest.raises(AttributeError, match="curves of auroc, not of accuracy"):
        _ = got.accuracy
    with pytest.raises(ValueError, match="auroc needs a class or label that some test rows have and others have not"):
        curves(
            local, x, y, test_features=test_x[:5], test_labels=test_y[:5], strategies=["random"], metric="auroc",
            progress=False,
        )  # fmt: skip


def test_a_metric_may_be_a_function_of_labels_and_probabilities(blobs, local: Client):
    x, y, test_x, test_y = blobs
    seen = []

    def brier(labels, p):
        seen.append((labels, p))
        return 0.25

    got = curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=["random"], metric=brier,
        rounds=1, budget=1, initial=30, seeds=[0], progress=False,
    )  # fmt: skip
    assert got.metric == "brier"
    assert got.values["random"].tolist() == [[0.25, 0.25]]
    np.testing.assert_array_equal(seen[0][0], test_y)
    np.testing.assert_allclose(seen[0][1].sum(axis=1), 1)
    assert seen[0][1].shape == (100, 4)


class Heard(LogisticRegression):
    """Tells what it was asked; its samples are of three sharpnesses."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def fit(self, x, y):
        self.asked.append(("fit", len(y)))
        return super().fit(x, y)

    def continue_fit(self, x, y):
        self.asked.append(("continue", len(y)))
        return super().fit(x, y)

    def sample_logits(self, x):
        self.asked.append(("samples", len(x)))
        return self.predict_log_proba(x)[:, None] * np.array([0.5, 1, 2])[:, None]


def heard(models):
    def make():
        models.append(Heard())
        return models[-1]

    return make


@pytest.mark.parametrize("retrain", [True, False])
def test_a_model_is_new_in_every_round_or_goes_on(blobs, local: Client, retrain):
    x, y, test_x, test_y = blobs
    models = []
    curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=["k_center_greedy"], model=heard(models),
        rounds=2, budget=4, initial=[[0, 1]], seeds=[0], retrain=retrain, progress=False,
    )  # fmt: skip
    asked = [each.asked for each in models]
    # Two rows of one class teach nothing; the first round's model is never fitted.
    assert asked == ([[], [("fit", 6)], [("fit", 10)]] if retrain else [[("fit", 6), ("continue", 10)]])


def test_samples_are_computed_only_for_what_reads_them(blobs, local: Client):
    x, y, test_x, test_y = blobs
    models, shapes = [], []

    def by_samples(offer: Offer):
        shapes.append(offer.samples.shape)
        assert offer.samples is offer.samples
        unlabeled = np.setdiff1d(np.arange(len(x)), offer.labeled)
        unseen = ~np.isfinite(offer.samples).all(axis=(0, 1))
        assert unseen.sum() == 4 - len(np.unique(y[offer.labeled]))
        return unlabeled[: offer.budget]

    curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=["random", "k_center_greedy", by_samples],
        model=heard(models), rounds=1, budget=4, initial=[[0, 1, 70]], seeds=[0], progress=False,
    )  # fmt: skip
    assert [("samples", 186) in each.asked for each in models] == [False, False, False, False, True, False]
    assert shapes == [(186, 3, 4)]


@pytest.mark.parametrize("strategy", ["bald", Bald(), ("power_bald", {"base": "bald", "beta": 1e6}), "entropy"])
def test_strategies_that_read_samples_are_given_them(blobs, local: Client, strategy):
    """Those that can do with logits too, such as entropy, score by what all samples say together."""
    x, y, test_x, test_y = blobs
    models = []
    start = [0, 70, 130, 185]
    got = curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies={"this": strategy},
        model=heard(models), rounds=1, budget=2, initial=[start], seeds=[0], progress=False,
    )  # fmt: skip
    assert ("samples", 186) in models[0].asked
    p = np.exp(models[0].sample_logits(x))
    p /= p.sum(axis=2, keepdims=True)
    scores = -(p.mean(axis=1) * np.log(p.mean(axis=1))).sum(axis=1)
    if strategy != "entropy":
        scores += (p * np.log(p)).sum(axis=2).mean(axis=1)
    scores[start] = -np.inf
    assert got.rows["this"][0, 0].tolist() == np.argsort(-scores)[:2].tolist()


def test_a_multi_label_model_s_samples_are_log_odds(labelled, local: Client):
    x, y, test_x, test_y = labelled

    class Model(LinearProbes):
        def sample_logits(self, rows):
            return np.stack([rows @ [[1, 0, 2], [0, 1, 1]], rows @ [[0, 1, 1], [3, 0, 0]]], axis=1)

    got = curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=["bald"], model=Model,
        rounds=1, budget=3, initial=2, seeds=[0], task="MULTILABEL", progress=False,
    )  # fmt: skip
    q = 1 / (1 + np.exp(-Model().sample_logits(x)))
    entropies = [-(each * np.log(each) + (1 - each) * np.log(1 - each)) for each in (q.mean(axis=1), q)]
    scores = (entropies[0] - entropies[1].mean(axis=1)).sum(axis=1)
    scores[got.initial[0]] = -np.inf
    assert got.rows["bald"][0, 0].tolist() == np.argsort(-scores)[:3].tolist()


def test_samples_need_a_model_that_has_them(blobs, local: Client):
    x, y, test_x, test_y = blobs
    with pytest.raises(ValueError, match="samples need a trained model with sample_logits, not this Pipeline"):
        curves(
            local, x, y, test_features=test_x, test_labels=test_y, strategies={"own": lambda offer: offer.samples},
            rounds=1, initial=30, seeds=[0], progress=False,
        )  # fmt: skip


def test_a_model_that_speaks_of_other_classes_is_refused(blobs, local: Client):
    x, y, test_x, test_y = blobs

    class Wrong(LogisticRegression):
        def predict_log_proba(self, x):
            return np.zeros((len(x), 3))

    with pytest.raises(ValueError, match="speaks of 3 classes; it has seen 2 of 4"):
        curves(
            local, x, y, test_features=test_x, test_labels=test_y, strategies=["random"], model=Wrong,
            rounds=1, initial=[[0, 70]], seeds=[0], progress=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def labelled():
    """Three labels, each a half-plane, the third that of nearly no row; features, labels, and the same held out."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(260, 2))
    y = np.stack([x[:, 0] > 0, x[:, 1] > 0.5, x.sum(axis=1) > 2.5], axis=1).astype(int)
    return x[:160], y[:160], x[160:], y[160:]


@pytest.mark.parametrize("metric", ["accuracy", "auroc"])
def test_multi_label_tasks(labelled, local: Client, metric):
    x, y, test_x, test_y = labelled
    got = curves(
        local, x, y, test_features=test_x, test_labels=test_y, strategies=["random", "margin"],
        rounds=4, budget=10, initial=4, seeds=[0, 1], task="MULTILABEL", metric=metric, progress=False,
    )  # fmt: skip
    assert got.values["margin"].shape == (2, 5)
    assert (got.values["margin"][:, -1] > got.values["margin"][:, 0]).all()
    rows = np.concatenate([got.initial[0], got.rows["margin"][0].ravel()])
    model = LinearProbes().fit(x[rows], y[rows])
    p = np.exp(model.predict_log_proba(test_x))
    wanted = ((p > 0.5) == test_y).mean() if metric == "accuracy" else roc_auc_score(test_y, p)
    assert got.values["margin"][0, -1] == pytest.approx(wanted)
    # The service was told of a multi-label task: it asks for the row whose labels are least certain on average.
    start = LinearProbes().fit(x[got.initial[0]], y[got.initial[0]])
    closeness = -np.abs(2 * np.exp(start.predict_log_proba(x)) - 1).mean(axis=1)
    closeness[got.initial[0]] = -np.inf
    assert got.rows["margin"][0, 0, 0] == closeness.argmax()


def test_a_label_that_nobody_or_everybody_has_is_no_obstacle():
    x = np.arange(6.0)[:, None]
    y = np.array([[0, 1, 0]] * 3 + [[0, 1, 1]] * 3)
    p = np.exp(LinearProbes().fit(x, y).predict_log_proba(x))
    np.testing.assert_allclose(p[:, :2], [[1 / 8, 7 / 8]] * 6)
    assert (np.diff(p[:, 2]) > 0).all()


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.zeros((160, 2)), r"the shape \(N, L\); they have \(160, 2\) and \(100, 3\)"),
        (np.full((160, 3), 2), "zeros and ones"),
    ],
)
def test_multi_label_labels_are_checked(labelled, local: Client, labels, says):
    x, _, test_x, test_y = labelled
    options = {"test_features": test_x, "test_labels": test_y, "strategies": ["random"], "task": "MULTILABEL"}
    with pytest.raises(ValueError, match=says):
        curves(local, x, labels, **options, progress=False)


def test_strategies_that_need_what_no_model_gives_say_so(blobs, local: Client):
    x, y, test_x, test_y = blobs
    with pytest.raises(InvalidInput, match="fisher_kernel"):
        curves(
            local, x, y, test_features=test_x, test_labels=test_y, strategies=["fisher_kernel"],
            rounds=1, initial=30, seeds=[0], progress=False,
        )  # fmt: skip
