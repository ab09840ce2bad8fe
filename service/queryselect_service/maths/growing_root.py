"""A Cholesky factor that grows by the rows of every new block, and what is solved with it, a tile at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from queryselect_service.maths.fisher import tiles_of
from queryselect_service.shards import Shards


class GrowingRoot:
    """Λ (t, t), lower triangular, t up to `first` + `rest`; what it has beside its first columns stands apart.

    rest: (rest, rest), Λ without its first rows and columns. What stands above its diagonal is never read.
    """

    def __init__(self, first: int, rest: int, like: Tensor, pool: Shards) -> None:
        """like: a tensor of the same type and place."""
        self._first, self._beside = like.new_empty(first, first), like.new_empty(rest, first)
        self.rest, self._pool, self._size = like.new_empty(rest, rest), pool, 0

    def append(self, before: Tensor, root: Tensor) -> None:
        """Adds the rows (r, t + r) of a block, which lies in the first part or in the rest.

        before: (t, r), what stands left of the block's own root (r, r), transposed.
        """
        first, start = len(self._first), self._size
        if start < first:
            rows, part = slice(start, start + len(root)), self._first
        else:
            rows, part = slice(start - first, start - first + len(root)), self.rest
            self._beside[rows], before = before[:first].T, before[first:]
        part[rows, : rows.start] = before.T
        part[rows, rows] = root
        self._size += len(root)

    def solve(self, y: Tensor) -> Tensor:
        """Λ⁻¹ y for y (t, r), in its place."""
        above, below, beside = self._parts(y)
        self._forward(self._first, above)
        for tile in tiles_of(len(below)):
            self._pool.check()
            below[tile] -= beside[tile] @ above
        self._forward(self.rest, below)
        return y

    def solve_transposed(self, y: Tensor) -> Tensor:
        """Λ⁻ᵀ y for y (t, r), in its place."""
        above, below, beside = self._parts(y)
        self._backward(self.rest, below)
        for tile in tiles_of(len(above)):
            self._pool.check()
            above[tile] -= beside[:, tile].T @ below
        self._backward(self._first, above)
        return y

    def _parts(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        above, below = y[: len(self._first)], y[len(self._first) :]
        return above, below, self._beside[: len(below)]

    def _forward(self, root: Tensor, y: Tensor) -> None:
        for tile in tiles_of(len(y)):
            self._pool.check()
            right = y[tile] - root[tile, : tile.start] @ y[: tile.start]
            y[tile] = torch.linalg.solve_triangular(root[tile, tile], right, upper=False)

    def _backward(self, root: Tensor, y: Tensor) -> None:
        for tile in reversed(tiles_of(len(y))):
            self._pool.check()
            right = y[tile] - root[tile.stop : len(y), tile].T @ y[tile.stop :]
            y[tile] = torch.linalg.solve_triangular(root[tile, tile].mT, right, upper=True)
