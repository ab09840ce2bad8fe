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
        # The inverses of the tiles on the diagonals, lower triangular: a product takes a fourth of solving with a tile.
        self._first_inverses, self._rest_inverses = (
            [like.new_zeros(tile.stop - tile.start, tile.stop - tile.start) for tile in tiles_of(size)]
            for size in (first, rest)
        )

    def append(self, before: Tensor, root: Tensor) -> None:
        """Adds the rows (r, t + r) of a block, which lies in the first part or in the rest.

        before: (t, r), what stands left of the block's own root (r, r), transposed.
        """
        first, start = len(self._first), self._size
        if start < first:
            rows, part, inverses = slice(start, start + len(root)), self._first, self._first_inverses
        else:
            rows, part, inverses = slice(start - first, start - first + len(root)), self.rest, self._rest_inverses
            self._beside[rows], before = before[:first].T, before[first:]
        part[rows, : rows.start] = before.T
        part[rows, rows] = root
        _append_inverse(inverses, part, rows)
        self._size += len(root)

    def solve(self, y: Tensor) -> Tensor:
        """Λ⁻¹ y for y (t, r), in its place."""
        above, below, beside = self._parts(y)
        self._forward(self._first, self._first_inverses, above)
        for tile in tiles_of(len(below)):
            self._pool.check()
            below[tile] -= beside[tile] @ above
        self._forward(self.rest, self._rest_inverses, below)
        return y

    def solve_transposed(self, y: Tensor) -> Tensor:
        """Λ⁻ᵀ y for y (t, r), in its place."""
        above, below, beside = self._parts(y)
        self._backward(self.rest, self._rest_inverses, below)
        for tile in tiles_of(len(above)):
            self._pool.check()
            above[tile] -= (below.T @ beside[:, tile]).T
        self._backward(self._first, self._first_inverses, above)
        return y

    def _parts(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        above, below = y[: len(self._first)], y[len(self._first) :]
        return above, below, self._beside[: len(below)]

    def _forward(self, root: Tensor, inverses: list[Tensor], y: Tensor) -> None:
        for tile, inverse in zip(tiles_of(len(y)), inverses, strict=False):
            self._pool.check()
            size = tile.stop - tile.start
            y[tile] = inverse[:size, :size] @ (y[tile] - root[tile, : tile.start] @ y[: tile.start])

    def _backward(self, root: Tensor, inverses: list[Tensor], y: Tensor) -> None:
        for tile, inverse in reversed([*zip(tiles_of(len(y)), inverses, strict=False)]):
            self._pool.check()
            size = tile.stop - tile.start
            # Rows from the left, as memory has them: for few of them the other way takes twice as long.
            right = y[tile].T - y[tile.stop :].T @ root[tile.stop : len(y), tile]
            y[tile] = (right @ inverse[:size, :size]).T


def _append_inverse(inverses: list[Tensor], root: Tensor, rows: slice) -> None:
    """Adds rows of a factor to the inverses of its tiles."""
    for tile, inverse in zip(tiles_of(rows.stop), inverses, strict=False):
        own = slice(max(rows.start, tile.start), tile.stop)
        size, done, count = own.stop - own.start, own.start - tile.start, tile.stop - tile.start
        if size > 0:
            new = torch.linalg.solve_triangular(
                root[own, own], torch.eye(size, dtype=root.dtype, device=root.device), upper=False
            )
            inverse[done:count, done:count] = new
            inverse[done:count, :done] = -new @ (root[own, tile.start : own.start] @ inverse[:done, :done])
