"""M's inverse A and F over the weights of a softmax layer, written out or as products only (see class_blocks.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.errors import InvalidInput
from queryselect_service.maths.class_factors import ENTRY, Factors, Written, between, written
from queryselect_service.maths.fisher import (
    AT_ONCE,
    DRIFT,
    FLOPS_PER_BYTE,
    Design,
    Rows,
    everywhere,
    inverse_of_root,
    product,
    root_of,
    widened,
)
from queryselect_service.maths.growing_root import GrowingRoot
from queryselect_service.shards import SPAN_BYTES

#: Rows that are paired with others at once.
PAIRED = 2048
#: Float64 entries up to which rows and their factors are kept ready, and how many of a row's factors' are per class.
READY, READY_FACTORS = 1 << 23, 4
#: Columns up to which products are faster with factors that are written out.
WRITTEN = 16
#: The error of a gain, as a part of the best, from which on there is no answer, where nothing can be computed anew.
LOST = 1e-8

#: The factors of a block of rows, from their probabilities (m, C).
Make = Callable[[Tensor], Factors]


class Reader:
    """Rows as x (m, D) and factors, ready made where all of them together are few."""

    def __init__(self, rows: Rows, make: Make, index: Tensor | None = None) -> None:
        """index: (m,) which of the rows, all by default."""
        self.rows, self._make, self._index = rows, make, index
        self._size = len(rows) if index is None else len(index)
        dims, classes = rows.embeddings.shape[1], rows.predictions.shape[1]
        self._ready: tuple[Tensor, Factors] | None = None
        if self._size * ready_entries(dims, classes, 0) <= READY:
            x, factors = self._made(slice(0, self._size))
            if factors.columns <= WRITTEN and self._size * ready_entries(dims, classes, factors.columns) <= READY:
                factors = Written(factors, written(factors, self._size, x))
            self._ready = x, factors

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, span: slice) -> tuple[Tensor, Factors]:
        if self._ready is None:
            return self._made(span)
        x, factors = self._ready
        return x[span], factors[span]

    def _made(self, span: slice) -> tuple[Tensor, Factors]:
        at = span if self._index is None else self._index[span]
        return self.rows.x(at), self._make(self.rows.predictions[at])


def ready_entries(dims: int, classes: int, columns: int) -> int:
    """How many entries a row has that is kept ready, with that many columns written out if they are few."""
    return dims + (READY_FACTORS + (columns if columns <= WRITTEN else 0)) * classes


@dataclass(frozen=True)
class Taken:
    """Rows that were taken: V = L ⊗ x, the factors times what the rows count in M.

    x: (m, D). heads: (m, c, C), Lᵀ.
    """

    x: Tensor
    heads: Tensor

    def columns(self) -> Tensor:
        """V (m c, C D)."""
        return (self.heads[..., None] * self.x[:, None, None]).flatten(0, 1).flatten(1)


class Inverse(ABC):
    """A, and products with it and with F. Λ Λᵀ = I + VᵀA_0V for the columns V of all that was taken, in their order.

    bearable: the error of a gain, as a part of the best, from which on `refresh` has to be called. root: Λ.
    """

    bearable = DRIFT

    def __init__(self, design: Design, make: Make, columns: int, borrowed: int, picks: int) -> None:
        """columns: c. borrowed, picks: how many context rows and how many others may be taken, in this order."""
        self.design, self.make, self.columns, self.pool = design, make, columns, design.pool
        self.dims, self.classes = design.rows.embeddings.shape[1], design.rows.predictions.shape[1]
        self.root = GrowingRoot(borrowed * columns, picks * columns, design.rows.mass, design.pool)
        self.taken = 0  # how many columns

    def add(self, rows: Taken, u: Tensor, before: Tensor, root: Tensor) -> None:  # noqa: ARG002  # u is Dense's
        """A ← A - U Uᵀ. u: (r, C D). before: what `solve` gave beside AV, (t, r). root: R, (r, r)."""
        self.root.append(before, root)
        self.taken += len(root)

    @abstractmethod
    def solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """A y for y (r, C D), (r, C D); and all directions U so far times y, (t, r)."""

    def _cold(self, y: Tensor) -> Tensor:
        """y/λ, without what is the same for all classes."""
        blocks = y.view(-1, self.classes, self.dims)
        return ((blocks - blocks.mean(1, keepdim=True)) / self.design.ridge).view_as(y)

    def project(self, rows: Reader, u: Tensor) -> tuple[Tensor, Tensor]:
        """V_xᵀ u of the rows, (n, r, c), and F u, (r, C D), for u (r, C D)."""
        p = u.new_empty(len(rows), len(u), self.columns)
        for span, _, _, inner in self.products(rows, u):
            p[span] = inner
        return p, self.fisher(u)

    def products(self, rows: Reader, y: Tensor) -> Iterator[tuple[slice, Tensor, Factors, Tensor]]:
        """V_xᵀ y (m, r, c) for y (r, C D), a stretch of rows after the other; each with its embeddings and factors."""
        directions, count = widened(y.view(-1, self.dims).T), len(y)  # (D, r C or more)
        touched = 8 * (6 * count * max(self.classes, self.columns) + 4 * self.columns**2)  # F, too
        touched = max(touched, 8 * y.numel() // FLOPS_PER_BYTE, SPAN_BYTES // AT_ONCE)  # in the cache until used again
        for span in self.pool.spans(len(rows), touched):
            x, factors = rows[span]
            found = (x @ directions)[:, : count * self.classes].view(len(x), count, self.classes)
            yield span, x, factors, factors.transposed(found)

    @abstractmethod
    def fisher(self, u: Tensor) -> Tensor:
        """F u for u (r, C D)."""

    @abstractmethod
    def measure(self, rows: Reader, g: Tensor, h: Tensor) -> None:
        """Writes V_xᵀAV_x and V_xᵀAFAV_x of the rows into g and h (m, c, c), V_x without its scale."""

    def measure_lengths(self, rows: Reader, g: Tensor) -> None:
        """Writes V_xᵀV_x/λ of the rows into g (m, c, c)."""
        columns = g.shape[1]
        eye = torch.eye(self.classes, dtype=torch.float64, device=g.device)
        for span in self.pool.spans(len(rows), 8 * (4 * columns * self.classes + self.dims)):
            x, factors = rows[span]
            squares = x.square().sum(1)
            g[span] = between(factors, eye.expand(len(x), -1, -1)) * (squares / self.design.ridge)[:, None, None]

    @abstractmethod
    def refresh(self) -> None:
        """Computes A_0 anew from M. Raises InvalidInput where there is nothing more exact than A."""


class Dense(Inverse):
    """A_0, F and M_0 written out, (C D, C D); A = A_0 - U Uᵀ with the directions of all that was taken since."""

    def __init__(self, design: Design, make: Make, columns: int, picks: int) -> None:
        super().__init__(design, make, columns, 0, picks)
        self._fisher = design.total(self._information)
        self._directions = self._fisher.new_empty(picks * columns, self.dims * self.classes)
        # V of all that was taken; M = λI + context + V Vᵀ is written out where A_0 is computed anew.
        self._columns = torch.empty_like(self._directions)
        self._a, self._since = self._fisher.new_empty(0), 0  # (C D, C D), empty: I/λ; the first direction since
        if design.labeled:
            self.refresh()

    def _information(self, rows: Rows) -> Tensor:
        """Σ mass (L Lᵀ) ⊗ x xᵀ: (C D, C D), by pairs of classes."""
        dims, classes = self.dims, self.classes
        found = rows.mass.new_zeros(classes, dims, classes, dims)
        for span in rows.spans(2 * dims * dims * classes, 2 * classes * (dims + classes)):
            x, outer = rows.x(span), self.make(rows.predictions[span]).outer()
            outer *= rows.mass[span, None, None]
            for k in range(classes):
                self.pool.check()
                some = (outer[:, k, k:, None] * x[:, None]).flatten(1)  # (m, (C - k) D)
                found[k, :, k:] += (x.T @ some).view(dims, classes - k, dims)
        for k in range(classes):
            found[k + 1 :, :, k] = found[k, :, k + 1 :].permute(1, 0, 2)  # blocks are symmetric, and so is all
        return found.view(classes * dims, -1)

    def refresh(self) -> None:
        """See Inverse."""
        matrix = self.design.ridge * torch.eye(len(self._fisher), dtype=torch.float64, device=self._fisher.device)
        if self.design.labeled:
            matrix += self.design.context_total(self._information)
        some = self._columns[: self.taken]
        matrix += product(some.T[None], some[None], self.pool)[0]
        # Along what is the same for all classes anything may stand here, as it is left out below.
        same = torch.eye(self.dims, dtype=torch.float64, device=matrix.device) * matrix.diagonal().mean() / self.classes
        blocks = matrix.view(self.classes, self.dims, self.classes, self.dims)
        blocks += same[None, :, None]
        half = inverse_of_root(root_of(matrix[None], self.pool), self.pool)
        del matrix, blocks
        half = half.view(-1, self.classes, self.dims)
        half = (half - half.mean(1, keepdim=True)).view(1, len(self._fisher), -1)
        self._a, self._since = product(half.mT, half, self.pool)[0], self.taken

    def solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See Inverse."""
        found = self._times(y, self._a) if len(self._a) else self._cold(y)
        overlaps, columns = y.new_empty(self.taken, len(y)), y.T.contiguous()
        for span in self.pool.spans(self.taken, y.shape[1] * max(8, 4 * len(y) // FLOPS_PER_BYTE)):
            torch.mm(self._directions[span], columns, out=overlaps[span])
            late = slice(max(self._since, span.start), span.stop)
            if late.start < late.stop:
                found.addmm_(overlaps[late].T, self._directions[late], alpha=-1)
        return found, overlaps

    def fisher(self, u: Tensor) -> Tensor:
        """See Inverse."""
        return self._times(u, self._fisher)

    def _times(self, y: Tensor, matrix: Tensor) -> Tensor:
        found = torch.empty_like(y)
        for span in self.pool.spans(len(matrix), len(matrix) * max(8, 2 * len(y) // FLOPS_PER_BYTE)):
            found[:, span] = y @ matrix[span].T  # both matrices are symmetric, and rows lie together
        return found

    def add(self, rows: Taken, u: Tensor, before: Tensor, root: Tensor) -> None:
        """See Inverse."""
        at = slice(self.taken, self.taken + len(u))
        self._columns[at], self._directions[at] = rows.columns(), u
        super().add(rows, u, before, root)

    def measure(self, rows: Reader, g: Tensor, h: Tensor) -> None:
        """See Inverse; where A is A_0."""
        matrices, side = [], self.dims * self.classes
        if len(self._a):
            both = product(product(self._a[None], self._fisher[None], self.pool), self._a[None], self.pool)[0]
            matrices.append((self._a, g))
        else:
            both = self._fisher / self.design.ridge**2
            self.measure_lengths(rows, g)
        matrices.append((both, h))
        for span in self.pool.spans(len(rows), max(32 * side, 2 * self.dims * side // FLOPS_PER_BYTE)):
            x, factors = rows[span]
            for matrix, out in matrices:
                out[span] = between(factors, self._quadratic(x, matrix))

    def _quadratic(self, x: Tensor, matrix: Tensor) -> Tensor:
        """xᵀ K_jk x for every pair of classes and rows x (m, D): (m, C, C)."""
        dims, classes = self.dims, self.classes
        found = x.new_empty(len(x), classes, classes)
        blocks = matrix.view(classes, dims, classes, dims)
        for k in range(classes):
            self.pool.check()
            right = x @ blocks[k, :, k:].flatten(1)  # (m, (C - k) D)
            found[:, k, k:] = (right.view(len(x), classes - k, dims) @ x[..., None])[..., 0]
            found[:, k:, k] = found[:, k, k:].clone()
        return found


class Free(Inverse):
    """A = (I - V Λ⁻ᵀΛ⁻¹Vᵀ/λ)/λ with the rows that were taken and Λ alone, and F through the rows it averages over."""

    bearable = LOST

    def __init__(self, design: Design, make: Make, columns: int, borrowed: int, picks: int, sample: Reader) -> None:
        """sample: those of the rows that F averages over that are here."""
        super().__init__(design, make, columns, borrowed, picks)
        self._sample, count = sample, borrowed + picks
        self._x = design.rows.mass.new_empty(count, self.dims)
        self._heads = design.rows.mass.new_empty(count, columns, self.classes)

    def add(self, rows: Taken, u: Tensor, before: Tensor, root: Tensor) -> None:
        """See Inverse."""
        start = self.taken // self.columns
        at = slice(start, start + len(rows.x))
        self._x[at], self._heads[at] = rows.x, rows.heads
        super().add(rows, u, before, root)

    def solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See Inverse."""
        count, flat = self.taken // self.columns, y.view(-1, self.dims)
        x, heads, ridge = self._x[:count], self._heads[:count], self.design.ridge
        inner = heads @ (x @ flat.T).view(count, len(y), self.classes).mT  # Vᵀy, (s, c, r)
        overlaps = self.root.solve(inner.view(self.taken, len(y)) / ridge)
        weights = self.root.solve_transposed(overlaps / ridge).view(count, self.columns, len(y))
        outer = (heads.mT @ weights).permute(2, 1, 0).reshape(len(flat), count)  # (r C, s)
        return self._cold(y).view_as(flat).addmm_(outer, x, alpha=-1).view_as(y), overlaps

    def project(self, rows: Reader, u: Tensor) -> tuple[Tensor, Tensor]:
        """See Inverse; in one pass where F averages over these very rows."""
        if rows is not self._sample:
            return super().project(rows, u)
        p = u.new_empty(len(rows), len(u), self.columns)
        return p, self._through(u, p)

    def fisher(self, u: Tensor) -> Tensor:
        """See Inverse."""
        return self._through(u)

    def _through(self, u: Tensor, p: Tensor | None = None) -> Tensor:
        """F u, and V_xᵀ u of the rows it averages over into p."""
        found = self.pool.sum(self._part(self._sample, u, p))
        beside = self.design.beside
        return found if beside is None else found + self._part(Reader(beside, self.make), u)

    def _part(self, some: Reader, u: Tensor, p: Tensor | None = None) -> Tensor:
        found = torch.zeros_like(u)
        for span, x, factors, inner in self.products(some, u):
            if p is not None:
                p[span] = inner
            outer = factors.times(inner.mul_(some.rows.mass[span, None, None]))  # (m, r, C)
            found.view(-1, self.dims).addmm_(outer.flatten(1).T, x)
        return found

    def measure(self, rows: Reader, g: Tensor, h: Tensor) -> None:
        """See Inverse; before anything is taken."""
        alone = rows is self._sample and len(rows) == self.pool.size and self.design.beside is None
        sums = None
        for span, found in (self._pairs_among if alone else self._pairs_with_all)(rows, h.shape[1]):
            if sums is None:
                sums = found.new_zeros(len(rows), found.shape[1])
            sums[span] += found
        for span in self.pool.spans(len(rows), 8 * 4 * self.classes**2):
            if sums is not None:
                h[span] = rows[span][1].paired(sums[span]) / self.design.ridge**2
        self.measure_lengths(rows, g)

    def _pairs_with_all(self, rows: Reader, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """What `paired` ends, the terms (m, w) of stretches of rows, for the rows of all slices and those beside."""
        for some in everywhere(self._sample.rows, self.design.beside, PAIRED):
            self.pool.check()
            partners, y = self.make(some.predictions[:]).partners(some.mass), some.x(slice(None))
            for span in self.pool.spans(len(rows), self._touched(len(y), columns)):
                x, factors = rows[span]
                yield span, factors.pair((x @ y.T).square_(), partners)

    def _pairs_among(self, rows: Reader, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """The same where these are all the rows there are: (x.y)² is that of x with y and of y with x."""
        for start in range(0, len(rows), PAIRED):
            block = slice(start, min(start + PAIRED, len(rows)))
            self.pool.check()
            y, theirs = rows[block]
            self.pool.check()
            partners, touched = theirs.partners(rows.rows.mass[block]), self._touched(len(y), columns)
            for some in self.pool.spans(start, 2 * touched):
                x, factors = rows[some]
                squares = (x @ y.T).square_()
                yield some, factors.pair(squares, partners)
                yield block, theirs.pair(squares.T, factors.partners(rows.rows.mass[some]))
            for some in self.pool.spans(len(y), touched):
                span = slice(start + some.start, start + some.stop)
                x, factors = rows[span]
                yield span, factors.pair((x @ y.T).square_(), partners)

    def _touched(self, partners: int, columns: int) -> int:
        """What pairing a row with so many others touches, in bytes."""
        flops = partners * (2 * self.dims + min(self.classes**2, ENTRY * columns**2 + 4 * self.classes))
        entries = 2 * partners + min(2 * self.classes**2, 3 * columns * partners)
        return max(8 * entries, flops // FLOPS_PER_BYTE)

    def refresh(self) -> None:
        """See Inverse."""
        raise InvalidInput(
            f"ridge is too small for float64 beside {self.dims} dimensions times {self.classes} classes of such "
            "embeddings; raise it, or set top_classes",
            field="ridge",
        )
