"""Numbers at the edges of float64, and limits that leave no row: picks that are what they should be, or a reason."""

from __future__ import annotations

import numpy as np
import pytest

from queryselect import InvalidInput

ROWS, DIMS, CLASSES = 12, 3, 4
RNG = np.random.default_rng(0)
X, P = RNG.normal(size=(ROWS, DIMS)), RNG.dirichlet(np.ones(CLASSES), ROWS)
BAIT = ["bait", "bait_binary", "bait_diagonal"]


def select(local, name, **options):
    return local.select(name, **{"budget": 3, "embeddings": X, "probabilities": P, **options})


def assert_good(picks, budget=3):
    assert len(set(picks.indices.tolist())) == len(picks) == budget
    assert not np.isnan(picks.scores).any()


@pytest.mark.parametrize("name", BAIT)
def test_reference_rows_beyond_all_proportion_to_the_pool_are_refused(local, name):
    far = {"embeddings": 1e160 * X[:4], "probabilities": P[:4]}
    with pytest.raises(InvalidInput, match="of reference sets are up to") as caught:
        select(local, name, reference=far)
    assert caught.value.field == "references"


@pytest.mark.parametrize("name", BAIT)
def test_the_unit_of_weights_changes_nothing_however_large_it_is(local, name):
    weights = RNG.uniform(0.5, 2, ROWS)
    small, large = (select(local, name, weights=unit * weights) for unit in (1.0, 2.0**1020))
    assert_good(large)
    np.testing.assert_array_equal(small.indices, large.indices)
    np.testing.assert_array_equal(small.scores, large.scores)


def heavy(scale, weight):
    """Rows that have all the weight: a ridge relative to them is nothing beside the pool's."""
    return {"embeddings": scale * X[:4], "probabilities": P[:4], "weights": np.full(4, weight)}


@pytest.mark.parametrize(("name", "scale", "weight"), [("bait_binary", 1e-30, 1e38), ("bait_diagonal", 1e-100, 1e300)])
def test_gains_that_overflow_are_refused(local, name, scale, weight):
    with pytest.raises(InvalidInput, match="ridge is too small for float64") as caught:
        select(local, name, reference=heavy(scale, weight))
    assert caught.value.field == f"strategy.{name}.ridge"


@pytest.mark.parametrize("scale", [1e-150, 1e-100, 1e-60])
def test_gains_that_may_overflow_are_refused_or_finite(local, scale):
    """Whether a class's block of `bait` is singular here, rounding decides, and so the processor."""
    try:
        picks = select(local, "bait", reference=heavy(scale, 1e300))
    except InvalidInput as error:
        assert "ridge is too small for float64" in str(error)
        assert error.field == "strategy.bait.ridge"
    else:
        assert_good(picks)
        assert np.isfinite(picks.scores).all()


@pytest.mark.parametrize("ridge_scale", ["RELATIVE", "ABSOLUTE"])
@pytest.mark.parametrize("name", BAIT)
def test_a_ridge_without_a_square_is_refused(local, name, ridge_scale):
    with pytest.raises(InvalidInput, match="can't be told from infinity") as caught:
        select(local, name, params={"ridge": 1e200, "ridge_scale": ridge_scale})
    assert caught.value.field == f"strategy.{name}.ridge"


@pytest.mark.parametrize("scale", [1e-160, 1e160])
@pytest.mark.parametrize("name", ["max_herding", "uncertainty_herding"])
def test_herding_takes_embeddings_whose_squares_no_type_holds(local, name, scale):
    inputs = {"embeddings": scale * X, "params": {"normalize": False, "bandwidth": 5.0}}
    assert_good(local.select(name, 3, **inputs, **({} if name == "max_herding" else {"probabilities": P})))


@pytest.mark.parametrize("top_classes", [1, 2, 3])
def test_bait_notices_that_rounding_left_nothing_of_equal_rows(local, top_classes):
    """Taking one of rows that are all the same leaves the others 1e-10 of their information, and may leave less."""
    inputs = {"embeddings": np.full((3, 3), 65504.0), "probabilities": np.full((3, 6), 1 / 6)}
    params = {"ridge_scale": "ABSOLUTE", "top_classes": top_classes}
    picks = local.select("bait", 3, **inputs, params=params, weights=np.array([1.0, 0.0, 0.0]), min_gain=-np.inf)
    assert_good(picks)


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_badge_takes_embeddings_whose_squares_no_type_holds(local, scale):
    plain, scaled = select(local, "badge"), select(local, "badge", embeddings=scale * X)
    assert_good(scaled)
    assert plain.indices[0] == scaled.indices[0]


def test_a_head_whose_squares_no_type_holds_is_taken(local):
    head = RNG.normal(size=(CLASSES, DIMS))
    reference = {"embeddings": X[:5], "probabilities": P[:5], "labels": np.zeros(5, int)}
    with_head = {"reference": reference, "params": {"reference_subset": "ALL"}}
    plain, scaled = (select(local, "fisher_kernel", head_weights=w, **with_head) for w in (1e3 * head, 1e160 * head))
    np.testing.assert_array_equal(plain.indices, scaled.indices)
    np.testing.assert_allclose(plain.scores, scaled.scores, rtol=1e-6)


def test_a_head_beside_which_a_tiny_variance_is_lost_is_refused(local):
    samples = RNG.dirichlet(np.ones(CLASSES), (ROWS, 2))
    head = 1e12 * RNG.normal(size=(CLASSES, DIMS))
    reference = {"embeddings": X[:5], "probabilities": P[:5], "labels": np.zeros(5, int)}
    params = {"pseudo_label": "MC_MUTUAL_INFORMATION", "reference_subset": "ALL"}
    with pytest.raises(InvalidInput, match="MC_MUTUAL_INFORMATION") as caught:
        select(local, "fisher_kernel", samples=samples, head_weights=head, reference=reference, params=params)
    assert caught.value.field == "pool.head_weights"


@pytest.mark.parametrize("name", [*BAIT, "badge"])
def test_limits_that_leave_no_row_end_the_selection(local, name):
    picks = select(local, name, costs=np.ones(ROWS), cost_budget=0.5)
    assert (len(picks), picks.stop_reason) == (0, "MAX_COST")


@pytest.mark.parametrize("form", ["POWER", "SOFTMAX", "SOFTRANK"])
def test_power_bald_ends_where_limits_leave_no_row(local, form):
    samples = RNG.dirichlet(np.ones(CLASSES), (ROWS, 5))
    options = {"samples": samples, "params": {"form": form}, "costs": np.ones(ROWS), "cost_budget": 0.5}
    picks = local.select("power_bald", 3, **options)
    assert (len(picks), picks.stop_reason) == (0, "MAX_COST")
