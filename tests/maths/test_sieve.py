"""The bounds of what float32 products do to g and h."""

from __future__ import annotations

import pytest
import torch

from queryselect_service.maths import sieve
from queryselect_service.maths.fisher import Rows
from queryselect_service.maths.predictions import Predictions
from queryselect_service.maths.sieve import Sieve
from queryselect_service.shards import Whole

N, DIMS = 400, 96


def rows_of(x: torch.Tensor, scale: float = 1) -> Rows:
    flat = Predictions(torch.full((len(x), 2), 0.5))
    return Rows(x, flat, torch.full((len(x),), 1 / len(x), dtype=torch.float64), scale, Whole(len(x)))


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(sieve, "LEAST_ENTRIES", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_what_float32_makes_of_g_and_h_is_within_the_bounds(dtype, offset, length):
    """Whole blocks of directions, some of them counted before; each row within its own bound, which is no idle one."""
    make = torch.Generator().manual_seed(0)
    x = ((torch.randn(N, DIMS, generator=make) + offset) * 10 ** torch.rand(N, 1, generator=make)).to(dtype)
    wide, labels, picks = x.double(), 2, 30
    u = torch.randn(labels, DIMS, 3 * picks, generator=make, dtype=torch.float64) * length
    zeta = torch.randn(labels, DIMS, 3 * picks, generator=make, dtype=torch.float64) / length
    p, q = wide @ u, wide @ zeta  # (L, N, 3 R)
    g0, h0 = p.square().sum(2) * 1.1, (p.abs() * q.abs()).sum(2) * 3
    found = Sieve.of(rows_of(x), g0, h0, picks)
    assert found is not None
    g, h, every = g0.clone(), h0.clone(), slice(0, N)
    for start in range(0, 3 * picks, picks):
        some = slice(start, start + picks)
        directions = torch.stack([u[..., some], zeta[..., some]])
        assert found.holds(directions, directions.new_ones(picks))
        products = (x.float() @ directions.float()).permute(0, 3, 1, 2)  # (2, R, L, N)
        wrong_g, wrong_h = found.errors(found.until(directions), every, products[1])
        g -= products[0].square().sum(0)
        h -= 2 * (products[0] * products[1]).sum(0)
        found.count(every, products[1])
        found.advance(directions)
        right_g, right_h = found.exact(wide, g0, h0)
        done = slice(0, some.stop)
        torch.testing.assert_close(right_g, g0 - p[..., done].square().sum(2), rtol=1e-12, atol=0)
        torch.testing.assert_close(right_h, h0 - 2 * (p * q)[..., done].sum(2), rtol=1e-12, atol=0)
        assert (wrong_g >= (g - right_g).abs()).all()
        assert (wrong_h >= (h - right_h).abs()).all()
        assert (g != right_g).any()
        assert wrong_g.max() < 1e-2 * g0.max()


@pytest.mark.parametrize("by", [1e-7, 1e7])
def test_rows_that_float32_cannot_square_are_left_to_float64(by):
    x = torch.ones(4, 3)
    g = torch.ones(1, 4, dtype=torch.float64)
    assert Sieve.of(rows_of(x), g, g, 1) is not None
    assert Sieve.of(rows_of(torch.cat([x[:3], x[:1] * by])), g, g, 1) is None
    assert Sieve.of(rows_of(torch.cat([x[:3], x[:1] * 0])), g, g, 1) is not None, "0 is 0 in any type"
    assert Sieve.of(rows_of(x.double()), g, g, 1) is None
    assert Sieve.of(rows_of(x, scale=0.5), g, g, 1) is None


@pytest.mark.parametrize("by", [0.0, 1e-7, 1e7, torch.nan])
def test_directions_that_float32_cannot_square_are_left_to_float64(by):
    directions, scores = torch.ones(2, 1, 3, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert Sieve.holds(directions, scores)
    directions[1, 0, :, 2] *= by
    assert not Sieve.holds(directions, scores)


@pytest.mark.parametrize("score", [0.0, 1e-31, 1e31, torch.nan])
def test_gains_that_float32_has_no_digits_for_are_left_to_float64(score):
    directions, scores = torch.ones(2, 1, 3, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    scores[2] = score
    assert not Sieve.holds(directions, scores)


@pytest.mark.parametrize("tau", [1e-3, 1.0, 1e35, torch.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_gains_replayed_in_float32_are_no_less_than_they_are(tau, sign):
    """One product after the other, after as many that count already; h may fall, or rise for its sign's sake."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(N, DIMS, generator=make) + 3
    wide, labels, picks = x.double(), 3, 40
    u = torch.randn(labels, DIMS, 2 * picks, generator=make, dtype=torch.float64)
    zeta = sign * u + 0.3 * torch.randn(u.shape, generator=make, dtype=torch.float64)
    p, q = wide @ u, wide @ zeta  # (L, N, 2 R)
    g0, h0 = p.square().sum(2) * 1.0001, (p.abs() * q.abs()).sum(2) * 3
    found = Sieve.of(rows_of(x), g0, h0, picks)
    assert found is not None
    every, first, second = slice(0, N), slice(0, picks), slice(picks, 2 * picks)
    found.count(every, (x.float() @ zeta[..., first].float()).permute(2, 0, 1))
    found.advance(torch.stack([u[..., first], zeta[..., first]]))
    g, h = found.exact(wide, g0, h0)
    directions = torch.stack([u[..., second], zeta[..., second]])
    products = (x @ directions.float()).permute(0, 3, 1, 2)  # (2, R, L, N)
    below, above, strange = found.bounds(found.until(directions), every, products[1], tau + g, h)
    assert below.dtype == above.dtype == torch.float32
    assert not strange.any()
    for step in range(picks):
        right = (h.clamp_min(0) / (tau + g)).sum(0)
        wrong = (above.clamp_min(0) / below).sum(0)
        known = (below > 0).all(0)
        assert (wrong >= right * (1 - found.division))[known].all()
        assert known.float().mean() > (0.99 if step < picks - 1 else 0.5)
        below.addcmul_(products[0, step], products[0, step], value=-1)
        above.addcmul_(products[0, step], products[1, step], value=-2)
        g -= p[..., picks + step].square()
        h -= 2 * (p * q)[..., picks + step]
    assert (above < 1.01 * h.abs().amax() + 0.01 * h0).all(), "bounds that say nothing would hold, too"


def test_rows_whose_h_float32_cannot_hold_are_told():
    x = torch.ones(4, 3)
    g, h = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    h[0, 1] = 1e31
    found = Sieve.of(rows_of(x), g, h, 1)
    assert found is not None
    directions = torch.ones(2, 1, 3, 1, dtype=torch.float64) / 10
    products = (x @ directions[1, 0].float()).T[:, None]
    *_, strange = found.bounds(found.until(directions), slice(0, 4), products, g, h)
    assert strange.tolist() == [False, True, False, False]
