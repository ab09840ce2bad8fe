"""Points: fast distances within their bound, on the rows as given or moved, and direct ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from queryselect_service import shards
from queryselect_service.maths import distances
from queryselect_service.maths.distances import Points
from queryselect_service.shards import Whole

DTYPES = (np.float32, np.float64)


def points_of(x, *, normalize=False):
    return Points(torch.from_numpy(x), Whole(len(x)), normalize=normalize)


def squared(rows, centres, dtype=np.longdouble):
    """The squared distance (n,) of every row to its nearest centre, in more digits than float64 has where there are."""
    rows, centres = rows.astype(dtype), centres.astype(dtype)
    return np.min([np.square(rows - centre).sum(1) for centre in centres], axis=0)


def fast(points, x, count):
    """Fast squared distances (n,) to the first `count` rows, and how wrong they may be; of the rows as given."""
    nearest = torch.full((len(x),), np.inf, dtype=points.work.dtype)
    points.update_nearest(nearest, torch.from_numpy(x[:count]))
    bound = points.error_bound(nearest)
    return tuple(each.numpy().astype(np.longdouble) / np.longdouble(points.scale) ** 2 for each in (nearest, bound))


KINDS = {
    "gaussian": lambda rng, shape: rng.normal(size=shape),
    "not negative": lambda rng, shape: np.maximum(rng.normal(size=shape), 0),
    "constant rows": lambda rng, shape: np.repeat(rng.normal(size=(shape[0], 1)), shape[1], axis=1),
    "grid": lambda rng, shape: rng.integers(-3, 4, size=shape) / 8,
    "clusters": lambda rng, shape: (
        rng.normal(size=(3, shape[1]))[rng.integers(3, size=shape[0])] + 1e-3 * rng.normal(size=shape)
    ),
    "heavy tails": lambda rng, shape: np.clip(rng.standard_cauchy(size=shape), -1e6, 1e6),
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    dims=st.sampled_from([1, 2, 7, 64, 300]),
    far=st.floats(-1, 3),
    exponent=st.sampled_from([0, 0, 0, -20, 20, -40, 40]),
    columns=st.sampled_from([5, 2048]),
)
def test_fast_distances_keep_within_their_bound_moved_or_not(kind, dtype, seed, dims, far, exponent, columns):
    """Means 0.1 to 1000 times as long as the spread, scales on both sides of what needs no change."""
    rng = np.random.default_rng(seed)
    x = KINDS[kind](rng, (80, dims))
    direction = rng.normal(size=dims)
    spread = np.sqrt(np.square(x - x.mean(0)).sum(1).mean())
    x = ((x + 10**far * spread * direction / np.linalg.norm(direction)) * 2.0**exponent).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "TERMS", columns)
        patch.setattr(distances, "CENTRES", 16)
        points = points_of(x)
        for count in (1, 40):
            got, bound = fast(points, x, count)
            wrong = np.abs(got - squared(x, x[:count]))
            assert (wrong <= bound).all(), f"{(wrong / bound).max():.2f} times the bound"


@pytest.mark.parametrize("dims", [384, 1000, 5000, 20_000])
@pytest.mark.parametrize("offset", [0.0, 2.0, 50.0])
def test_roundings_that_all_go_one_way_keep_within_the_bound(dims, offset):
    """Every term of a product of constant rows is the same, so that their roundings add up instead of cancelling."""
    rng = np.random.default_rng(dims)
    x = np.repeat(rng.normal(size=(100, 1)) + offset, dims, axis=1).astype(np.float32)
    points = points_of(x)
    assert points.move == (offset >= 4)
    for count in (1, 30):
        got, bound = fast(points, x, count)
        assert (np.abs(got - squared(x, x[:count], np.float64)) <= bound).all()


@pytest.mark.parametrize("far", [0.0, 3.5])
@pytest.mark.parametrize(("dtype", "part"), [(np.float32, 2e-3), (np.float64, 1e-11)])
def test_the_bound_tells_most_distances_apart(dtype, part, far):
    x = (np.random.default_rng(0).normal(size=(1000, 384)) + far).astype(dtype)
    nearest, bound = fast(points_of(x), x, 1)
    assert (bound[1:] < part * nearest[1:]).all()


GAUSSIAN = np.random.default_rng(0).normal(size=(500, 16))
OUTLIERS = np.zeros((500, 1))
OUTLIERS[:4, 0] = 1e5, -1e5, 1e5, -1e5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x", "moved"),
    [
        (GAUSSIAN, False),
        (np.abs(GAUSSIAN), False),
        (GAUSSIAN + 3.5, False),
        (GAUSSIAN + 4.5, True),
        (GAUSSIAN + 1e5, True),
        (GAUSSIAN * 1e6, False),
        (GAUSSIAN * 1e-6, False),
        (GAUSSIAN * 1e20, True),
        (GAUSSIAN * 1e-20, True),
        (GAUSSIAN + 100 + OUTLIERS, True),  # most rows count, however far a few are
        (np.zeros((5, 3)), False),
    ],
)
def test_rows_are_moved_only_where_they_must_be_and_never_copied(x, moved, dtype):
    x = x.astype(dtype)
    x.setflags(write=False)
    points = points_of(x)
    assert points.work.data_ptr() == x.ctypes.data
    assert points.move == moved
    assert points.origin.any() == (not moved and x.any())


def test_other_types_and_unit_lengths_need_a_copy():
    x = torch.from_numpy(GAUSSIAN)
    for rows, normalize in ((x.half(), False), (x.bfloat16(), False), (x.float(), True), (x, True)):
        points = Points(rows, Whole(len(x)), normalize=normalize)
        assert points.work.data_ptr() != rows.data_ptr()
        assert points.work.dtype == (torch.float64 if rows.dtype == torch.float64 else torch.float32)


@dataclass
class Largest(TorchDispatchMode):
    """The most bytes that any new tensor took."""

    bytes: int = 0

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_work_on_all_rows_takes_memory_for_a_span_of_them(monkeypatch, dtype):
    monkeypatch.setattr(shards, "SPAN_BYTES", 1 << 16)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, 64)).astype(dtype))
    with Largest() as largest:
        points = Points(x, Whole(len(x)))
        nearest = torch.full((len(x),), np.inf, dtype=points.work.dtype)
        points.update_nearest(nearest, x[:20])
        points.update_nearest(nearest, x[20:21])
        points.direct(torch.arange(len(x)), x[:20])
        points.to_mean()
    assert largest.bytes <= max(8 * len(x), 1 << 15)


def test_direct_distances_are_those_to_the_nearest_of_all_blocks(monkeypatch):
    x = np.random.default_rng(0).normal(size=(60, 5))
    points, rows = points_of(x), torch.tensor([3, 50, 7, 0])
    want = np.sqrt(squared(x, x[:40]))[rows].astype(np.float64)
    blocks = [torch.from_numpy(x[span]) for span in (slice(0), slice(25), slice(25, 26), slice(26, 40))]
    np.testing.assert_allclose(points.direct(rows, *blocks), want, rtol=1e-14)
    assert (points.direct(rows) == torch.inf).all()
    monkeypatch.setattr(distances, "CENTRE_ENTRIES", 12)
    np.testing.assert_allclose(points.direct(rows, *blocks), want, rtol=1e-14)


def test_distances_to_the_mean_and_rows_without_length():
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    x[[3, 5]] = 0
    points = points_of(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(points.to_mean(), np.linalg.norm(exact - exact.mean(0), axis=1), rtol=1e-14)
    assert points.inert().nonzero().squeeze(1).tolist() == [3, 5]


def test_products_that_a_newer_interface_has_made_coarse_are_taken_for_the_coarsest(monkeypatch):
    def refuse():
        raise RuntimeError("mix of the legacy and new APIs to set the matmul precision")

    plain = points_of(GAUSSIAN.astype(np.float32)).error_bound(torch.zeros(500))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    coarse = points_of(GAUSSIAN.astype(np.float32)).error_bound(torch.zeros(500))
    assert (coarse > 1000 * plain).all()
