"""Standardised rows, derived gradients and products with error bounds, against plain float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from queryselect_service.maths.descriptors import (
    Head,
    Term,
    alive,
    coarse,
    error_bound,
    paired,
    product,
    residuals,
    similarity,
    standardized,
    total,
)

seeds = st.integers(0, 2**32 - 1)


def plain(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-10)


@given(seeds, st.integers(2, 70), st.floats(-7, 7), st.floats(-7, 7))
def test_standardised_rows_are_those_of_float64(seed, width, scale, shift):
    """Wherever the mean, whatever the deviation: no digits are lost but those that float32 has lost already."""
    rng = np.random.default_rng(seed)
    x = (10.0**scale * rng.normal(size=(5, width)) + 10.0**shift).astype(np.float32)
    x[3] = x[3, 0]
    got = standardized(torch.from_numpy(x), torch.float32).double().numpy()
    wanted = plain(x)
    wanted[3] = 0
    flat = np.ptp(x, axis=1) == 0  # the spread was less than a digit
    assert (got[flat] == 0).all()
    np.testing.assert_allclose(got[~flat], wanted[~flat], atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_rows_neither_overflow_nor_vanish(dtype):
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = torch.tensor(
        [[most, -most, 0.0], [most, most, most], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0 + torch.finfo(dtype).eps]],
        dtype=dtype,
    )
    got = standardized(x, dtype)
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], torch.tensor([1.0, -1.0, 0.0], dtype=dtype))
    assert not got[1:3].any()
    tiny = standardized(torch.tensor([[least, 0.0, 0.0]], dtype=dtype), dtype)
    assert tiny.isfinite().all()
    assert tiny.abs().max() < 1e-6  # 1e-10 is far more than its deviation


def test_one_feature_has_no_variance():
    assert not standardized(torch.tensor([[3.0], [4.0]]), torch.float32).any()


@given(seeds, st.integers(2, 12), st.integers(2, 12))
def test_derived_gradients_have_the_products_of_the_true_ones(seed, classes, width):
    """Also where there are fewer classes than features, and rows are in the space of classes alone."""
    rng = np.random.default_rng(seed)
    w, p = rng.normal(size=(classes, width)), rng.dirichlet(np.ones(classes), 7)
    y = rng.integers(0, classes, 7)
    found = residuals(torch.from_numpy(p), torch.from_numpy(y))
    np.testing.assert_allclose(found, p - np.eye(classes)[y], atol=1e-15)
    rows = Head(torch.from_numpy(w)).standardized(found, torch.float64)
    assert rows.shape == (7, min(classes, width))
    g = plain((p - np.eye(classes)[y]) @ w)
    np.testing.assert_allclose(rows @ rows.T, g @ g.T, atol=1e-7 * width)


def test_residuals_of_sure_predictions_keep_their_digits():
    p = torch.tensor([[1.0, 1e-30, 3e-30]], dtype=torch.float64)
    torch.testing.assert_close(
        residuals(p, torch.tensor([0])), torch.tensor([[-4e-30, 1e-30, 3e-30]], dtype=torch.float64), rtol=1e-12, atol=0
    )


def terms_of(x, y, dtype, form):
    """The terms of rows with two factors (n, 40) and (n, 7), and what they are in float64."""
    x, y = (standardized(torch.from_numpy(each), dtype) for each in (x, y))
    if form == "sum":
        return total([x, y], [40, 7])
    return [product(x, y, widths=(40, 7))] if form == "product" else [product(x, widths=(40,)), product(y, widths=(7,))]


@given(seeds, st.sampled_from(["sum", "product", "apart"]), st.sampled_from(["f32", "f64", "bf16"]))
def test_similarities_are_no_more_wrong_than_is_said(seed, form, kind):
    rng = np.random.default_rng(seed)
    raw = [[rng.normal(size=(n, w)) for w in (40, 7)] for n in (6, 9)]
    dtype = torch.float64 if kind == "f64" else torch.float32
    exact = [terms_of(*each, torch.float64, form) for each in raw]
    z, g = (plain(raw[0][at]) @ plain(raw[1][at]).T for at in (0, 1))
    wanted = z * g if form == "product" else z + g
    np.testing.assert_allclose(similarity(*exact), wanted, atol=1e-9)
    pairs = [[Term(tuple(f[rows] for f in term.factors), term.lengths[rows]) for term in terms]
             for terms, rows in zip(exact, (torch.arange(6), torch.arange(6)), strict=True)]  # fmt: skip
    np.testing.assert_allclose(paired(*pairs), wanted[np.arange(6), np.arange(6)], atol=1e-9)
    theirs, ours = (
        terms_of(*(x.astype("f4" if dtype is torch.float32 else "f8") for x in each), dtype, form) for each in raw
    )
    if kind == "bf16":
        theirs, ours = coarse(theirs), coarse(ours)
    wrong = np.abs(similarity(theirs, ours).double().numpy() - wanted)
    bound = error_bound(theirs, ours)
    assert (wrong <= bound.numpy()[:, None]).all()
    assert (bound < {"f64": 1e-10, "f32": 1e-2, "bf16": 16}[kind]).all()  # lengths are 39 and 6


def test_a_row_is_alive_where_one_term_has_all_its_factors():
    zero, one = torch.zeros(4, 5), torch.ones(4, 5)
    late = torch.zeros(4, 5)
    late[2, 4] = 1e-30
    assert alive([product(one, late, widths=(5, 5))]).tolist() == [False, False, True, False]
    assert alive([product(one, zero, widths=(5, 5)), product(late, widths=(5,))]).tolist() == [
        False,
        False,
        True,
        False,
    ]
    assert alive([product(one, widths=(5,))]).all()
