"""The nearest reference of every row, found by groups and ever more precisely, against all similarities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from queryselect_service import shards
from queryselect_service.maths import pseudo_labels
from queryselect_service.maths.descriptors import coarse, paired, similarity, standardized, taken, total
from queryselect_service.maths.pseudo_labels import likest, nearest
from queryselect_service.shards import Whole


def terms_of(x, dtype):
    return total([standardized(torch.from_numpy(x), dtype)], [x.shape[1]])


@pytest.mark.parametrize("group", [1, 4, 100])
@pytest.mark.parametrize("span_bytes", [1, 8 << 10, 64 << 20])
@pytest.mark.parametrize("kind", ["f64", "f32", "bf16"])
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([1.0, 1e-4, 0.0]))
def test_the_nearest_are_those_of_float64(group, span_bytes, kind, seed, references, apart):
    """However close the references are to each other: the lowest of equals."""
    rng = np.random.default_rng(seed)
    theirs = (rng.normal(size=(1, 8)) + apart * rng.normal(size=(references, 8))).astype("f4")
    ours = rng.normal(size=(6, 8)).astype("f4")
    exact = [terms_of(x, torch.float64) for x in (ours, theirs)]
    wanted = similarity(*exact)
    rows, others = ([terms_of(x, torch.float64 if kind == "f64" else torch.float32)] for x in (ours, theirs))
    if kind == "bf16":
        rows, others = [coarse(rows[0]), *rows], [coarse(others[0]), *others]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pseudo_labels, "GROUP", group)
        patch.setattr(pseudo_labels, "PAIR_ENTRIES", 40)
        patch.setattr(shards, "SPAN_BYTES", span_bytes)
        at, row, reference = nearest(rows, others, Whole(6))
    if len(row):
        score = paired(taken(exact[0], row), taken(exact[1], reference))
        decided, best = likest(row, reference, score)
        at[decided] = best
    best = wanted.max(1).values
    np.testing.assert_allclose(wanted[torch.arange(6), at], best, rtol=0, atol=1e-12)
    if apart == 0:
        assert at.tolist() == [0] * 6


def test_the_likest_is_the_lowest_of_the_highest():
    row, reference = torch.tensor([4, 4, 4, 2]), torch.tensor([7, 3, 5, 1])
    found, best = likest(row, reference, torch.tensor([1.0, 1.0, 0.5, -2.0], dtype=torch.float64))
    assert dict(zip(found.tolist(), best.tolist(), strict=True)) == {4: 3, 2: 1}
