"""Gains that are bounded before they are computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from queryselect_service.maths.class_gains import Gains
from queryselect_service.shards import Whole


def brute(g, h):
    eye = torch.eye(g.shape[1], dtype=g.dtype)
    return torch.linalg.solve(eye + g, h).diagonal(dim1=1, dim2=2).sum(1)


def positive(generator, rows, columns, rank):
    root = torch.randn(rows, columns, rank, generator=generator, dtype=torch.float64)
    return root @ root.mT


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, 6), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_the_best_is_exact_and_others_are_bounded_while_g_falls(seed, columns, scale):
    rows, generator = 12, torch.Generator().manual_seed(seed)
    falls = [scale * positive(generator, rows, columns, 1) for _ in range(8)]
    g = torch.stack(falls).sum(0) + scale * positive(generator, rows, columns, columns)
    h = positive(generator, rows, columns, columns)
    gains = Gains(g, h, Whole(rows))
    found, _ = gains.restart()
    torch.testing.assert_close(found, brute(g, h), rtol=1e-9, atol=0)
    free = torch.ones(rows, dtype=torch.bool)
    for fall in falls:
        g -= fall
        h += positive(generator, rows, columns, 1) - 0.01 * h
        found, errors = gains.now(free)
        exact = brute(g, h)
        best = torch.where(free, exact, -torch.inf).argmax()
        assert torch.where(free, found, -torch.inf).argmax() == best
        torch.testing.assert_close(found[best], exact[best], rtol=1e-9, atol=0)
        assert bool((found >= exact * (1 - 1e-9) - 2 * columns * errors).all())
        free[best] = False


def test_rows_far_from_the_best_are_not_computed(monkeypatch):
    """Unless the best of them has gone."""
    generator, computed = torch.Generator().manual_seed(0), []
    real = Gains._exactly
    monkeypatch.setattr(Gains, "_exactly", lambda self, at: computed.append(at) or real(self, at))
    g, h = positive(generator, 50, 4, 4), positive(generator, 50, 4, 4)
    h[7] *= 100
    gains = Gains(g, h, Whole(50))
    gains.restart()
    computed.clear()
    free = torch.ones(50, dtype=torch.bool)
    gains.now(free)
    assert [at.tolist() for at in computed] == [[7]]
    free[7] = False
    found, _ = gains.now(free)
    assert 7 not in computed[1]
    assert len(computed[1]) < 10
    assert found[computed[1]].max() == pytest.approx(float(torch.where(free, brute(g, h), 0).max()), rel=1e-12)
