"""Greedy minimisation of tr(M^-1 F) over the weights of a softmax layer: blocks of D by class, c columns per row.

V_x = L_x ⊗ x has c columns. With A = M⁻¹, G_x = V_xᵀAV_x and H_x = V_xᵀAFAV_x (c x c), a row's gain is
tr[(I + G_x)⁻¹ H_x]. When s is taken, I + G_s = R Rᵀ, U = A V_s R⁻ᵀ and Z = AFU - ½ U UᵀFU, and for every row

    A ← A - U Uᵀ,    G_x ← G_x - P Pᵀ,    H_x ← H_x - P Yᵀ - Y Pᵀ,    P = V_xᵀU,  Y = V_xᵀZ,

so that a step costs two products of the pool with DC x c matrices, where the papers recompute G_x and H_x.

A and F are written out (`_Dense`); or, where that would be too large or take longer, A = I/λ - W Wᵀ with the directions
taken so far, context rows' among them, and F is multiplied through the pool (`_Free`). Directions are stored as rows,
(r, C D), r of them.

What is the same for all classes changes no prediction: no V has a part along it, while A = 1/λ there for ever. A is
therefore kept without that part, which would be nothing but rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.errors import InvalidInput
from queryselect_service.maths.class_factors import ENTRY, Factors
from queryselect_service.maths.fisher import (
    FLOPS_PER_BYTE,
    KEPT,
    ROUNDING,
    Design,
    Forward,
    Rows,
    inverse_of_root,
    leader,
    product,
    root_of,
)
from queryselect_service.maths.noise import uniform
from queryselect_service.shards import SPAN_BYTES

#: C D up to which A and F are written out in any case, and up to which they may be.
SMALL_SIDE, LARGE_SIDE = 1024, 8192
#: Multiply-adds for all pairs of rows, from which on F averages over some rows only; and how many at least.
PAIRS, LEAST_SAMPLE = 1e14, 10_000
#: Rows that are paired with others at once.
PAIRED = 2048
#: Float64 entries up to which rows and their factors are kept ready, and how many of a row's factors' are per class.
READY, READY_FACTORS = 1 << 23, 4
#: Columns of context rows that are taken at once.
CONTEXT_COLUMNS = 256
#: The error of a gain, as a part of the best, from which on all is computed anew; and where that can't be, given up.
DRIFT, LOST = 1e-10, 1e-8

#: The factors of a block of rows, from their probabilities (m, C).
Make = Callable[[Tensor], Factors]


@dataclass(frozen=True)
class Plan:
    """How a selection of these sizes is computed. It depends on the sizes alone.

    dense: whether A and F are written out. sample: how many rows F averages over.
    """

    dense: bool
    sample: int


def plan(n: int, dims: int, classes: int, columns: int, context: int, steps: int) -> Plan:
    """n: rows. columns: c. context: n_L. steps: picks of the forward phase."""
    side, taken, borrowed = dims * classes, steps * columns, context * columns
    pair = 2.0 * dims + min(classes**2, ENTRY * columns**2 + 4 * classes)  # multiply-adds for a pair of rows
    sample = int(min(n, max(LEAST_SAMPLE, PAIRS / (n * pair))))
    passes = 8.0 * n * side  # of a direction: F u through the pool, and two products with all rows
    free = n * sample * pair + borrowed * (passes + 3.0 * side * borrowed)
    free += taken * (0.5 * passes + 6.0 * side * (borrowed + 0.5 * taken))
    dense = 4.0 * n * side**2 + (5.0 * side**3 if context else 0.0) + 6.0 * side**2 * taken
    written = side <= SMALL_SIDE or (side <= LARGE_SIDE and dense < free)
    return Plan(written, n if written else sample)


class Reader:
    """Rows as x (m, D) and factors, ready made where all of them together are few."""

    def __init__(self, rows: Rows, make: Make, index: Tensor | None = None) -> None:
        """index: (m,) which of the rows, all by default."""
        self.rows, self._make, self._index = rows, make, index
        self._size = len(rows) if index is None else len(index)
        entries = rows.embeddings.shape[1] + READY_FACTORS * rows.predictions.shape[1]
        self._ready = None if self._size * entries > READY else self._made(slice(0, self._size))

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


class _Inverse:
    """A = A_0 - W Wᵀ, and products with it and with F. W are the directions of all that was taken since A_0."""

    def __init__(self, design: Design, make: Make, most: int) -> None:
        """most: how many directions there may be."""
        self.design, self.make, self.pool = design, make, design.pool
        self.dims, self.classes = design.rows.embeddings.shape[1], design.rows.predictions.shape[1]
        self._directions = design.rows.mass.new_empty(most, self.dims * self.classes)
        self.taken, self._since = 0, 0  # how many directions there are, and which is the first since A_0

    def add(self, u: Tensor, _: Tensor) -> None:
        """A ← A - U Uᵀ, M ← M + V Vᵀ; u, v: (r, C D)."""
        self._directions[self.taken : self.taken + len(u)] = u
        self.taken += len(u)

    def solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """A y for y (r, C D), (r, C D); and all directions times y, (t, r)."""
        found, overlaps = self._solve_first(y), y.new_empty(self.taken, len(y))
        for span in self.pool.spans(self.taken, y.shape[1] * max(8, 4 * len(y) // FLOPS_PER_BYTE)):
            some = self._directions[span]
            torch.mm(some, y.T, out=overlaps[span])
            late = max(self._since, span.start)
            if late < span.stop:
                found.addmm_(overlaps[late : span.stop].T, self._directions[late : span.stop], alpha=-1)
        return found, overlaps

    def _solve_first(self, y: Tensor) -> Tensor:
        """A_0 y for y (r, C D), in memory of its own."""
        raise NotImplementedError

    def _cold(self, y: Tensor) -> Tensor:
        """y/λ, without what is the same for all classes."""
        blocks = y.view(-1, self.classes, self.dims)
        return ((blocks - blocks.mean(1, keepdim=True)) / self.design.ridge).view_as(y)

    def fisher(self, u: Tensor) -> Tensor:
        """F u for u (r, C D)."""
        raise NotImplementedError

    def measure(self, rows: Reader, g: Tensor, h: Tensor) -> None:
        """Writes V_xᵀAV_x and V_xᵀAFAV_x of the rows into g and h (m, c, c), V_x without its scale."""
        raise NotImplementedError

    def measure_lengths(self, rows: Reader, g: Tensor) -> None:
        """Writes V_xᵀV_x/λ of the rows into g (m, c, c)."""
        columns = g.shape[1]
        eye = torch.eye(self.classes, dtype=torch.float64, device=g.device)
        for span in self.pool.spans(len(rows), 8 * (4 * columns * self.classes + self.dims)):
            x, factors = rows[span]
            squares = x.square().sum(1)
            between = _between(factors, eye.expand(len(squares), -1, -1))
            g[span] = between * (squares / self.design.ridge)[:, None, None]

    def refresh(self) -> None:
        """Computes A_0 anew from M. Raises InvalidInput where there is nothing more exact than A."""
        raise NotImplementedError


class _Dense(_Inverse):
    """A_0, F and M_0 written out, (C D, C D)."""

    def __init__(self, design: Design, make: Make, most: int) -> None:
        super().__init__(design, make, most)
        self._fisher = design.total(self._information)
        # V of all that was taken; M = λI + context + V Vᵀ is written out where A_0 is computed anew.
        self._columns = torch.empty_like(self._directions)
        self._a = self._fisher.new_empty(0)  # (C D, C D); empty: I/λ
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
        """See _Inverse."""
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

    def _solve_first(self, y: Tensor) -> Tensor:
        """See _Inverse."""
        return self._times(y, self._a) if len(self._a) else self._cold(y)

    def fisher(self, u: Tensor) -> Tensor:
        """See _Inverse."""
        return self._times(u, self._fisher)

    def _times(self, y: Tensor, matrix: Tensor) -> Tensor:
        found = torch.empty_like(y)
        for span in self.pool.spans(len(matrix), len(matrix) * max(8, 2 * len(y) // FLOPS_PER_BYTE)):
            found[:, span] = y @ matrix[span].T  # both matrices are symmetric, and rows lie together
        return found

    def add(self, u: Tensor, v: Tensor) -> None:
        """See _Inverse."""
        self._columns[self.taken : self.taken + len(v)] = v
        super().add(u, v)

    def measure(self, rows: Reader, g: Tensor, h: Tensor) -> None:
        """See _Inverse; where A is A_0."""
        if not len(self._a):
            return self._measure_cold(rows, g, h)
        both = product(product(self._a[None], self._fisher[None], self.pool), self._a[None], self.pool)[0]
        side = self.dims * self.classes
        for span in self.pool.spans(len(rows), max(32 * side, 2 * self.dims * side // FLOPS_PER_BYTE)):
            x, factors = rows[span]
            for matrix, out in ((self._a, g), (both, h)):
                out[span] = _between(factors, self._quadratic(x, matrix))
        return None

    def _measure_cold(self, rows: Reader, g: Tensor, h: Tensor) -> None:
        """As measure, where A is I/λ."""
        ridge, side = self.design.ridge, self.dims * self.classes
        self.measure_lengths(rows, g)
        for span in self.pool.spans(len(rows), max(32 * side, 2 * self.dims * side // FLOPS_PER_BYTE)):
            x, factors = rows[span]
            h[span] = _between(factors, self._quadratic(x, self._fisher)).div_(ridge**2)

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


class _Free(_Inverse):
    """A = I/λ - W Wᵀ, and F through the rows that it averages over."""

    def __init__(self, design: Design, make: Make, most: int, sample: Reader) -> None:
        """sample: those of these rows that are here."""
        super().__init__(design, make, most)
        self._sample = sample

    def _solve_first(self, y: Tensor) -> Tensor:
        """See _Inverse."""
        return self._cold(y)

    def fisher(self, u: Tensor) -> Tensor:
        """See _Inverse."""
        directions, flat = u.view(-1, self.dims), (len(u), self.classes)  # (r C, D)

        def part(some: Reader) -> Tensor:
            found = torch.zeros_like(directions)
            for span in some.rows.spans(4 * u.numel(), 4 * len(directions)):
                x, factors = some[span]
                inner = factors.transposed((x @ directions.T).view(-1, *flat))  # (m, r, c)
                outer = factors.times(inner).mul_(some.rows.mass[span, None, None])  # (m, r, C)
                found.addmm_(outer.flatten(1).T, x)
            return found

        beside = self.design.beside
        found = self.pool.sum(part(self._sample))
        return (found if beside is None else found + part(Reader(beside, self.make))).view_as(u)

    def measure(self, rows: Reader, g: Tensor, h: Tensor) -> None:
        """See _Inverse; before anything is taken."""
        columns, sums = h.shape[1], None
        for some in self._everyone():
            partners, y = self.make(some.predictions[:]).partners(some.mass), some.x(slice(None))
            flops = len(y) * (2 * self.dims + min(self.classes**2, ENTRY * columns**2 + 4 * self.classes))
            entries = 2 * len(y) + min(2 * self.classes**2, 3 * columns * len(y))
            for span in self.pool.spans(len(rows), max(8 * entries, flops // FLOPS_PER_BYTE)):
                x, factors = rows[span]
                found = factors.pair((x @ y.T).square_(), partners)  # (m, w)
                if sums is None:
                    sums = found.new_zeros(len(rows), found.shape[1])
                sums[span] += found
        for span in self.pool.spans(len(rows), 8 * 4 * self.classes**2):
            if sums is not None:
                h[span] = rows[span][1].paired(sums[span]) / self.design.ridge**2
        self.measure_lengths(rows, g)

    def _everyone(self) -> Iterator[Rows]:
        """The rows that F averages over, of all slices, some at a time."""
        sample, beside = self._sample.rows, self.design.beside
        found = self.pool.blocks(sample.embeddings, sample.predictions.values, sample.mass)
        if beside is not None:
            found = chain(found, [(beside.embeddings, beside.predictions.values, beside.mass)])
        for x, values, mass in found:
            for start in range(0, len(x), PAIRED):
                at = slice(start, start + PAIRED)
                yield Rows(x[at], sample.predictions.of(values[at]), mass[at], sample.scale, self.pool)

    def refresh(self) -> None:
        """See _Inverse."""
        raise InvalidInput(
            f"ridge is too small for float64 beside {self.dims} dimensions times {self.classes} classes of such "
            "embeddings; raise it, or set top_classes",
            field="ridge",
        )


def _between(factors: Factors, middle: Tensor) -> Tensor:
    """Lᵀ K L for symmetric K (m, C, C): (m, c, c)."""
    return factors.transposed(factors.transposed(middle).mT)


class ClassBlocks:
    """The forward phase."""

    def __init__(self, design: Design, make: Make, columns: int, choice: Choice, how: Plan) -> None:
        """columns: c. choice: oversampled already."""
        self._design, self._make, self._pool, self._columns = design, make, design.pool, columns
        self._index = choice.allowed.nonzero().squeeze(1)  # (m,), rows here that may be chosen
        borrowed = 0 if how.dense else design.labeled * columns  # directions of context rows
        most = borrowed + choice.steps * columns
        sample = _sample(design, how.sample)
        everything = sample is design.rows and len(self._index) == len(sample)
        self._rows = Reader(design.rows, make, None if everything else self._index)  # those that may be chosen
        self._inverse: _Inverse = (
            _Dense(design, make, most)
            if how.dense
            else _Free(design, make, most, self._rows if everything else Reader(sample, make))
        )
        self._g = design.rows.mass.new_empty(len(self._index), columns, columns)
        self._h = torch.empty_like(self._g)
        self._measure()
        if not how.dense and design.labeled:
            for v in self._context():
                self._take(v)
        self._borrowed = self._inverse.taken
        self._keep_diagonals()
        self.first = self._gains()[0]  # (n,)

    def _measure(self) -> None:
        """Computes G and H of every row that may be chosen."""
        self._inverse.measure(self._rows, self._g, self._h)
        self._g *= self._design.scale
        self._h *= self._design.scale

    def _keep_diagonals(self) -> None:
        """Keeps what rounding errors are measured by: the diagonals (m, c) of G and H when computed anew."""
        self._first_g, self._first_h = (x.diagonal(dim1=1, dim2=2).clone() for x in (self._g, self._h))

    def _context(self) -> Iterator[Tensor]:
        """V (r, C D) of the context rows, of all slices, some at a time."""
        here, beside = self._design.context, self._design.context_beside
        found = self._pool.blocks(here.embeddings, here.predictions.values, here.mass)
        if beside is not None:
            found = chain(found, [(beside.embeddings, beside.predictions.values, beside.mass)])
        step = max(1, CONTEXT_COLUMNS // self._columns)
        for x, values, mass in found:
            for start in range(0, len(x), step):
                at = slice(start, start + step)
                p = here.predictions.of(values[at])[:]
                yield self._columns_of(x[at].double() * here.scale, p) * mass[at].sqrt().repeat_interleave(
                    self._columns
                ).unsqueeze(1)

    def _columns_of(self, x: Tensor, p: Tensor) -> Tensor:
        """V_x of rows x (m, D) with probabilities p (m, C): (m c, C D)."""
        eye = torch.eye(self._columns, dtype=torch.float64, device=x.device)
        factor = self._make(p).times(eye.expand(len(x), -1, -1))  # (m, c, C), a column of L_x per row
        return (factor[..., None] * x[:, None, None]).flatten(0, 1).flatten(1)

    def _gains(self) -> tuple[Tensor, Tensor]:
        """The gains (n,) of rows that may be chosen, -inf for others, and how wrong rounding may have made them."""
        gains = torch.full_like(self._design.rows.mass, -torch.inf)
        errors = torch.zeros_like(gains)
        found, wrong = self._g.new_empty(2, len(self._index))
        for span in self._pool.spans(len(self._index), 64 * self._columns**2):
            found[span], kept = _traces(self._g[span], self._h[span])
            scale = self._first_h[span] + found[span, None] * self._first_g[span]
            wrong[span] = ROUNDING * (kept * scale).sum(1)
        gains[self._index], errors[self._index] = found, wrong
        return gains, errors

    def _drift(self, gains: Tensor, errors: Tensor, free: Tensor) -> float:
        """The largest error, as a part of the best gain, of a row that may be the best."""
        _, best = self._pool.best(torch.where(free, gains, -torch.inf))
        near = free & (2 * (gains + errors) >= best) & (errors > DRIFT * best)
        _, worst = self._pool.best(torch.where(near, errors, 0.0))
        return float(worst / best) if best > 0 else 0.0

    def _take(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adds V (r, C D) to M, and changes G and H of every row.

        Returns the directions times V (t, r), R (r, r), the directions times FU (t, r), and UᵀFU (r, r).
        """
        inverse = self._inverse
        solved, before = inverse.solve(v)
        root = torch.linalg.cholesky(torch.eye(len(v), dtype=v.dtype, device=v.device) + v @ solved.T)
        u = torch.linalg.solve_triangular(root, solved, upper=False).contiguous()
        fisher = inverse.fisher(u)
        own = u @ fisher.T
        z, overlaps = inverse.solve(fisher)
        z.addmm_(own, u, alpha=-0.5)
        self._change(u, z)
        inverse.add(u, v)
        return before, root, overlaps, own

    def _change(self, u: Tensor, z: Tensor) -> None:
        scale = self._design.scale**0.5
        directions = torch.cat([u, z]).view(-1, self._inverse.dims)  # (2 r C, D)
        count, classes = 2 * len(u), self._inverse.classes
        for span in self._pool.spans(len(self._index), _touched(directions.numel(), count, classes, self._columns)):
            x, factors = self._rows[span]
            both = factors.transposed((x @ directions.T).view(len(x), count, classes)).mul_(scale)  # (m, 2 r, c)
            p, y = both.chunk(2, dim=1)
            self._g[span].baddbmm_(p.mT, p, alpha=-1)
            cross = p.mT @ y
            self._h[span] -= cross + cross.mT

    def forward(self, choice: Choice) -> Forward:
        """Chooses."""
        pool, rows, columns = self._pool, self._design.rows, self._columns
        size = choice.steps * columns
        # Below and on the diagonal Λ; above it Φ, whose blocks on the diagonal stand apart: there may be little room.
        packed, own = self._g.new_zeros(1, size, size), self._g.new_empty(choice.steps, columns, columns)
        indices = torch.empty(choice.steps, dtype=torch.int64, device=self._g.device)
        scores = self._g.new_empty(choice.steps)
        taken = 0
        for step in range(choice.steps):
            pool.progress(step, choice.steps)
            gains, errors = self._gains()
            drift = self._drift(gains, errors, choice.free)
            if drift > DRIFT and (isinstance(self._inverse, _Dense) or drift > LOST):
                self._inverse.refresh()
                self._measure()
                self._keep_diagonals()
                gains, errors = self._gains()
            row, score, x, values = leader(choice, gains, rows.embeddings, rows.predictions.values, errors=errors)
            if choice.ends(score):
                break
            v = self._columns_of(x[None].double() * rows.scale, rows.predictions.of(values[None])[:])
            before, root, overlaps, fisher = self._take(v * self._design.scale**0.5)
            start, stop = step * columns, (step + 1) * columns
            packed[0, start:stop, :start] = before[self._borrowed :].T
            packed[0, start:stop, start:stop] = root
            packed[0, :start, start:stop] = overlaps[self._borrowed :]
            own[step], indices[step], scores[step], taken = fisher, row, fisher.trace(), step + 1
            choice.take(row)
        del self._g, self._h, self._inverse, self._rows, self._first_g, self._first_h
        parts = [packed[:, : taken * columns, : taken * columns], own[:taken]]
        del packed, own

        def matrices() -> tuple[Tensor, Tensor]:
            diagonal, both = parts.pop(), parts.pop()
            return _unpacked(both, diagonal)

        return Forward(indices[:taken], scores[:taken], columns, matrices)


def _touched(entries: int, count: int, classes: int, columns: int) -> int:
    """Bytes of a row that work on it touches where it is multiplied with `count` directions of so many entries."""
    return max(8 * (3 * count * max(classes, columns) + 4 * columns**2), 2 * entries // FLOPS_PER_BYTE)


def _unpacked(packed: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Λ and Φ (1, m c, m c). diagonal: (m, c, c), Φ's own blocks."""
    root = packed.tril()
    packed = packed.triu_()
    count, columns = diagonal.shape[:2]
    blocks = packed.view(count, columns, count, columns) if packed.is_contiguous() else None
    if blocks is None:
        packed = packed.contiguous()
        blocks = packed.view(count, columns, count, columns)
    at = torch.arange(count, device=packed.device)
    blocks[at, :, at] = 0
    fisher = packed + packed.mT
    fisher.view(count, columns, count, columns)[at, :, at] = diagonal
    return root, fisher


def _sample(design: Design, size: int) -> Rows:
    """The rows here that F averages over: all, or those of the lowest of one random number per row."""
    rows, pool = design.rows, design.pool
    if size >= pool.size:
        return rows
    numbers = torch.arange(pool.offset, pool.offset + len(rows), device=rows.mass.device)
    chosen, _ = pool.top(-uniform(0, numbers), size, rows.mass > 0)
    mine = chosen[(chosen >= pool.offset) & (chosen < pool.offset + len(rows))].sort().values - pool.offset
    beside = 0.0 if design.beside is None else float(design.beside.mass.sum())
    kept = float(pool.sum(rows.mass[mine].sum()))
    found = rows.at(mine)
    found.mass.mul_((1 - beside) / kept)  # as much together as all rows had
    return found


def _traces(g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """tr[(I + G)⁻¹H] (m,), and the diagonals of (I + G)⁻¹ (m, c), for G and H (m, c, c)."""
    if g.shape[1] == 1:
        kept = 1 / (1 + g[:, :, 0])
        return (kept * h[:, :, 0]).sum(1).clamp_min_(0), kept
    if g.shape[1] == 2:  # by hand: for matrices so small, calls take longer than what they do
        first, part = 1 + g[:, 0, 0], g[:, 0, 1] / (1 + g[:, 0, 0])
        second = 1 + g[:, 1, 1] - part * g[:, 0, 1]
        rest = h[:, 1, 1] - 2 * part * h[:, 0, 1] + part.square() * h[:, 0, 0]
        gains = (h[:, 0, 0] / first + rest / second).clamp_min_(0)
        return gains, torch.stack([1 / first + part.square() / second, 1 / second], dim=1)
    eye = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
    root, _ = torch.linalg.cholesky_ex(g + eye)
    half = torch.linalg.solve_triangular(root, eye.expand_as(g), upper=False)
    return ((half @ h) * half).sum((1, 2)).clamp_min_(0), half.square().sum(1)


def memory(n: int, dims: int, classes: int, columns: int, context: int, steps: int) -> int:
    """Bytes that the forward and the backward phase take at the most; the arguments as those of `plan`."""
    how, side, size = plan(n, dims, classes, columns, context, steps), dims * classes, steps * columns
    ready = min(READY, n * (dims + READY_FACTORS * classes)) * (1 if how.sample == n else 2)
    directions = (2 * size if how.dense else size + context * columns) * side
    block = min(max(columns, min(CONTEXT_COLUMNS, context * columns)), max(1, size + context * columns))
    rows = n * (2 * columns**2 + 4 * columns + 8) + ready
    written = 6 * side**2 if how.dense else 0
    forward = rows + directions + size**2 + written + 7 * block * side
    backward = (6 if size <= KEPT else 4) * size**2
    spans = 2 * min(SPAN_BYTES, 8 * n * max(side, 3 * columns * max(classes, columns)))
    return 8 * max(forward, backward) + spans


def work(n: int, dims: int, classes: int, columns: int, context: int, steps: int) -> float:
    """Multiply-adds; the arguments as those of `plan`."""
    side, size = dims * classes, steps * columns
    return float(n * side * (side + 4 * size) + 3 * side**2 * size + context * columns * 4 * n * side)
