"""Best rows and the order of the fill, against sorting everything."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from queryselect_service.maths.rank_fill import BestRows, Ranked


@st.composite
def tables(draw):
    """Values (c, n) with many ties, and how many are kept."""
    c, n = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    values = draw(st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=c, max_size=c))
    return np.array(values, float), draw(st.integers(1, n))


def best_of(values, keep, parts):
    """The table of all pairs, told in so many parts of the rows."""
    best = BestRows(len(values), keep, torch.device("cpu"))
    for rows in np.array_split(np.arange(values.shape[1]), parts):
        centre, at = np.divmod(np.arange(len(values) * len(rows)), max(1, len(rows)))
        row = rows[at] if len(rows) else at
        best.add(*(torch.from_numpy(x) for x in (centre, row, values[centre, row])))
    return best


@given(tables(), st.integers(1, 4))
def test_the_best_rows_are_the_first_of_a_stable_sort(table, parts):
    values, keep = table
    best = best_of(values, keep, parts)
    wanted = np.argsort(-values, axis=1, kind="stable")[:, :keep]
    assert best.rows.tolist() == wanted.tolist()
    assert best.values.tolist() == np.take_along_axis(values, wanted, 1).tolist()
    assert best.bar.tolist() == best.values[:, -1].tolist()


@given(tables(), st.integers(0, 5))
def test_rows_stand_where_the_list_has_them_first(table, cut):
    """However the centres are split: rank by rank, each in descending order of values, then of rows."""
    values, keep = table
    ranking = np.argsort(-values, axis=1, kind="stable")[:, :keep]
    listed = []
    for rank in range(keep):
        listed += sorted(((rank, -values[c, row], row) for c, row in enumerate(ranking[:, rank])))
    first = list({row: (rank, row, -value) for rank, value, row in reversed(listed)}.values())[::-1]
    first.sort(key=lambda each: (each[0], -each[2], each[1]))
    best = best_of(values, keep, 1)
    got = Ranked.of(best)
    assert got.rows.tolist() == [row for _, _, row in listed]
    distinct = got.distinct()
    assert list(zip(*(x.tolist() for x in (distinct.ranks, distinct.rows, distinct.values)), strict=True)) == first
    cut = min(cut, len(values))
    halves = [Ranked.of(best_of(part, keep, 1)) for part in (values[:cut], values[cut:]) if len(part)]
    joined = halves[0] if len(halves) == 1 else halves[0].distinct().joined(halves[1]).distinct()
    assert joined.distinct().rows.tolist() == distinct.rows.tolist()


def test_a_place_of_the_list_is_left_out():
    got = Ranked.of(best_of(np.array([[3.0, 2.0, 1.0]]), 3, 1))
    assert got.without(1).rows.tolist() == [0, 2]
    assert got.without(7).rows.tolist() == [0, 1, 2]
