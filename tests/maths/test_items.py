"""Scores of items against a loop over them, whatever the order of rows and however they are cut into blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from queryselect_service.maths import items
from queryselect_service.maths.items import aggregate_items
from queryselect_service.shards import Whole

HOW = ("MEAN", "SUM", "MAX", "TOP_K_MEAN")


def one_by_one(scores: np.ndarray, of: np.ndarray, size: int, how: str, k: int) -> np.ndarray:
    """The definition."""
    found = np.zeros(size)
    for item in range(size):
        mine = np.sort(scores[of == item])[::-1]
        if len(mine):
            found[item] = {
                "MEAN": mine.mean(), "SUM": mine.sum(), "MAX": mine.max(), "TOP_K_MEAN": mine[:k].mean(),
            }[how]  # fmt: skip
    return found


def ours(scores: np.ndarray, of: np.ndarray, size: int, how: str, k: int | None, dtype=torch.int64) -> np.ndarray:
    x = torch.from_numpy(scores)
    return aggregate_items(x, torch.from_numpy(of).to(dtype), size, how, k, Whole(len(x))).numpy()


@pytest.mark.parametrize("how", HOW)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_items_score_is_that_of_its_definition(how, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    size, k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    of = rng.integers(0, size, data.draw(st.integers(1, 40)))
    scores = rng.normal(size=len(of)).round(data.draw(st.sampled_from([0, 9])))  # with and without equal ones
    of = np.sort(of) if data.draw(st.booleans()) else of
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    np.testing.assert_allclose(
        ours(scores, of, size, how, k, dtype), one_by_one(scores, of, size, how, k), rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("how", HOW)
def test_how_rows_are_cut_into_blocks_changes_no_bit(monkeypatch, how, block):
    rng = np.random.default_rng(0)
    of = np.concatenate([rng.integers(0, 60, 700), np.full(150, 17), rng.integers(70, 90, 30)])
    for rows in (np.sort(of), rng.permutation(of)):
        scores = rng.normal(size=len(rows))
        whole = ours(scores, rows, 100, how, 3)
        with monkeypatch.context() as patch:
            patch.setattr(items, "BLOCK_ROWS", block)
            assert ours(scores, rows, 100, how, 3).tobytes() == whole.tobytes()
        np.testing.assert_allclose(whole, one_by_one(scores, rows, 100, how, 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", HOW)
def test_a_row_that_is_an_item_keeps_its_score_to_the_last_bit(how):
    scores = np.random.default_rng(0).normal(size=10_000) * 10.0 ** np.random.default_rng(1).integers(-300, 300, 10_000)
    order = np.random.default_rng(2).permutation(10_000)
    assert ours(scores, np.arange(10_000), 10_000, how, 2).tobytes() == scores.tobytes()
    assert ours(scores[order], order, 10_000, how, 2).tobytes() == scores.tobytes()


@pytest.mark.parametrize("how", HOW)
def test_only_what_is_no_number_spreads_and_only_within_its_item(how):
    of = np.array([0, 1, 1, 2, 2, 3])
    found = ours(np.array([1.0, np.nan, 2.0, 1e308, 1.7e308, -4.0]), of, 6, how, 2)
    assert np.isnan(found[1])
    assert np.isfinite(np.delete(found, 1)).all()
    assert found[[0, 3, 4, 5]].tolist() == [1, -4, 0, 0]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("ascending", [True, False])
def test_a_check_comes_often(how, ascending):
    rows, checks = 4 * items.BLOCK_ROWS, []
    of = torch.arange(rows) // 10
    of = of if ascending else of.flip(0)
    pool = Whole(rows, lambda: checks.append(1))
    aggregate_items(torch.zeros(rows, dtype=torch.float64), of, rows // 10 + 1, how, 2, pool)
    assert len(checks) >= 8 + 4 * (not ascending)
    checks.clear()
    aggregate_items(torch.zeros(1, dtype=torch.float64), of[:1] * 0, rows, how, 2, pool)  # many items, one row
    assert len(checks) >= 4
