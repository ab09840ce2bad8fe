"""A Cholesky factor that grows, against one of the whole."""

from __future__ import annotations

import pytest
import torch

from queryselect_service.maths import fisher
from queryselect_service.maths.growing_root import GrowingRoot
from queryselect_service.shards import Whole


@pytest.mark.parametrize("tile", [3, 512])
@pytest.mark.parametrize("first", [0, 4])
def test_it_solves_as_the_whole_factor_does(monkeypatch, first, tile):
    monkeypatch.setattr(fisher, "TILE", tile)
    generator = torch.Generator().manual_seed(first)
    square = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    whole = torch.linalg.cholesky(square @ square.T + torch.eye(12, dtype=torch.float64))
    root = GrowingRoot(first, 16 - first, whole, Whole(1))
    root.rest += torch.full_like(root.rest, torch.nan).triu(1)  # what stands there is others'
    for size in range(0, 12, 2):
        y = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        known = whole[:size, :size]
        torch.testing.assert_close(root.solve(y.clone()), torch.linalg.solve(known, y))
        torch.testing.assert_close(root.solve_transposed(y.clone()), torch.linalg.solve(known.T, y))
        new = slice(size, size + 2)
        root.append(whole[new, :size].T, whole[new, new])
