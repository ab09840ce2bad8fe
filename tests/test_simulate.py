"""queryselect.simulate: a loop that does what a real project would do, and counts right."""

from __future__ import annotations

import numpy as np
import pytest

from queryselect import Client, KCenterGreedy
from queryselect.simulate import Curves, curves


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
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_every_strategy_starts_from_the_same_labels_and_never_picks_a_row_twice(found: Curves):
    first = {tuple(each[:, 0]) for each in found.accuracy.values()}
    assert len(first) == 1
    for runs in found.picks.values():
        for start, rounds in zip(found.initial, runs, strict=True):
            rows = [*start, *(row for picks in rounds for row in picks.indices)]
            assert len(rows) == len(set(rows)) == 15


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
