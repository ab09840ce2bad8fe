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
        self._first, self._rest = _Part(first, like, pool), _Part(rest, like, pool)
        self.rest, self._beside = self._rest.root, like.new_empty(rest, first)
        self._pool, self._size = pool, 0

    def append(self, before: Tensor, root: Tensor) -> None:
        """Adds the rows (r, t + r) of a block, which lies in the first part or in the rest.

        before: (t, r), what stands left of the block's own root (r, r), transposed.
        """
        first, start = self._beside.shape[1], self._size
        if start < first:
            self._first.append(before, root)
        else:
            self._beside[start - first : start - first + len(root)] = before[:first].T
            self._rest.append(before[first:], root)
        self._size += len(root)

    def solve(self, y: Tensor) -> Tensor:
        """Λ⁻¹ y for y (t, r), in its place."""
        above, below, beside = self._parts(y)
        self._first.solve(above)
        for tile in tiles_of(len(below)):
            self._pool.check()
            below[tile] -= beside[tile] @ above
        self._rest.solve(below)
        return y

    def solve_transposed(self, y: Tensor) -> Tensor:
        """Λ⁻ᵀ y for y (t, r), in its place."""
        above, below, beside = self._parts(y)
        self._rest.solve_transposed(below)
        for tile in tiles_of(len(above)):
            self._pool.check()
            above[tile] -= (below.T @ beside[:, tile]).T
        self._first.solve_transposed(above)
        return y

    def _parts(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        above, below = y.tensor_split([self._beside.shape[1]])
        return above, below, self._beside[: len(below)]


class _Part:
    """A factor (t, t), lower triangular, t up to `size`, and the inverses of the tiles on its diagonal.

    A product with an inverse takes a fourth of solving with the tile.
    """

    def __init__(self, size: int, like: Tensor, pool: Shards) -> None:
        self.root, self._pool = like.new_empty(size, size), pool
        sides = [tile.stop - tile.start for tile in tiles_of(size)]
        self._inverses = [like.new_zeros(side, side) for side in sides]

    def append(self, before: Tensor, root: Tensor) -> None:
        """Adds the rows (r, t + r) of a block; the arguments as GrowingRoot's, t those of this part."""
        rows = slice(len(before), len(before) + len(root))
        self.root[rows, : rows.start], self.root[rows, rows] = before.T, root
        for tile, inverse in self._tiles(rows.stop):
            own = slice(max(rows.start, tile.start), tile.stop)
            size, done = own.stop - own.start, own.start - tile.start
            if size > 0:
                new = torch.linalg.solve_triangular(
                    self.root[own, own], torch.eye(size, dtype=root.dtype, device=root.device), upper=False
                )
                inverse[done:, done:] = new
                inverse[done:, :done] = -new @ (self.root[own, tile.start : own.start] @ inverse[:done, :done])

    def solve(self, y: Tensor) -> None:
        """See GrowingRoot."""
        for tile, inverse in self._tiles(len(y)):
            self._pool.check()
            y[tile] = inverse @ (y[tile] - self.root[tile, : tile.start] @ y[: tile.start])

    def solve_transposed(self, y: Tensor) -> None:
        """See GrowingRoot."""
        for tile, inverse in reversed(self._tiles(len(y))):
            self._pool.check()
            # Rows from the left, as memory has them: for few of them the other way takes twice as long.
            right = y[tile].T - y[tile.stop :].T @ self.root[tile.stop : len(y), tile]
            y[tile] = (right @ inverse).T

    def _tiles(self, count: int) -> list[tuple[slice, Tensor]]:
        """The tiles of the first rows, each with its inverse."""
        sides = [(tile, tile.stop - tile.start) for tile in tiles_of(count)]
        return [(tile, inverse[:side, :side]) for (tile, side), inverse in zip(sides, self._inverses, strict=False)]
