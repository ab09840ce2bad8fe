"""Greedy minimisation of tr(M^-1 F) over the weights of a softmax layer: blocks of D by class, c columns per row.

V_x = L_x ⊗ x has c columns. With A = M⁻¹, G_x = V_xᵀAV_x and H_x = V_xᵀAFAV_x (c x c), a row's gain is
tr[(I + G_x)⁻¹ H_x]. When s is taken, I + G_s = R Rᵀ, U = A V_s R⁻ᵀ and Z = AFU - ½ U UᵀFU, and for every row

    A ← A - U Uᵀ,    G_x ← G_x - P Pᵀ,    H_x ← H_x - P Yᵀ - Y Pᵀ,    P = V_xᵀU,  Y = V_xᵀZ,

so that a step costs two products of the pool with DC x c matrices, where the papers recompute G_x and H_x.

A and F are written out (`Dense`); or, where that would be too large or take longer, A = (I - V (λI + VᵀV)⁻¹ Vᵀ)/λ with
the rows taken so far, context rows among them, and F is multiplied through the pool (`Free`). Directions are stored as
rows, (r, C D), r of them.

What is the same for all classes changes no prediction: no V has a part along it, while A = 1/λ there for ever. A is
therefore kept without that part, which would be nothing but rounding errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.class_factors import ENTRY, written
from queryselect_service.maths.class_gains import Gains
from queryselect_service.maths.class_inverse import READY, Dense, Free, Inverse, Make, Reader, Taken, ready_entries
from queryselect_service.maths.fisher import (
    DRIFT,
    FLOPS_PER_BYTE,
    TILE,
    Design,
    Forward,
    Rows,
    backward_entries,
    everywhere,
    leader,
    refuse_overflow,
    small_root,
    tiles_of,
)
from queryselect_service.maths.noise import uniform
from queryselect_service.shards import SPAN_BYTES, Shards

#: C D up to which A and F are written out in any case, and up to which they may be.
SMALL_SIDE, LARGE_SIDE = 1024, 8192
#: Multiply-adds for all pairs of rows, from which on F averages over some rows only; and how many at least.
PAIRS, LEAST_SAMPLE = 1e14, 10_000
#: Columns of context rows that are taken at once, and the entries of their products with all rows.
CONTEXT_COLUMNS, PRODUCTS = 256, 1 << 25


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
    passes = 2.0 * n * side  # of a direction, each: two products with all rows, and one that ends F u
    free = n * sample * pair + passes * (3 * borrowed + taken) + 4 / 3 * (borrowed + taken) ** 3
    dense = 4.0 * n * side**2 + (5.0 * side**3 if context else 0.0) + 6.0 * side**2 * taken
    written = side <= SMALL_SIDE or (side <= LARGE_SIDE and dense < free)
    return Plan(written, n if written else sample)


class ClassBlocks:
    """The forward phase."""

    def __init__(self, design: Design, make: Make, columns: int, choice: Choice, how: Plan) -> None:
        """columns: c. choice: oversampled already."""
        self._design, self._make, self._pool, self._columns = design, make, design.pool, columns
        allowed = choice.allowed.nonzero().squeeze(1)  # (m,), rows here that may be chosen
        borrowed = 0 if how.dense else design.labeled  # context rows that are taken as if they were picks
        sample = _sample(design, how.sample)
        # The rows that are kept track of: those that may be chosen; or all, where F is multiplied through them anyway.
        everything = sample is design.rows and 2 * len(allowed) >= len(sample)
        self._index = slice(None) if everything else allowed
        self._rows = Reader(design.rows, make, None if everything else allowed)
        self._inverse: Inverse = (
            Dense(design, make, columns, choice.steps)
            if how.dense
            else Free(design, make, columns, borrowed, choice.steps, self._rows if everything else Reader(sample, make))
        )
        self._g = design.rows.mass.new_empty(len(self._rows), columns, columns)
        self._h = torch.empty_like(self._g)
        self._gains = Gains(self._g, self._h, self._pool)
        self._measure()
        if not how.dense and design.labeled:
            for taken in self._context():
                self._take(taken)
        self._borrowed = self._inverse.taken
        first, _ = self._of_all(*self._gains.restart())
        self.first = torch.where(choice.allowed, first, -torch.inf)  # (n,)

    def _measure(self) -> None:
        """Computes G and H of every row that may be chosen."""
        self._inverse.measure(self._rows, self._g, self._h)
        self._g *= self._design.scale
        self._h *= self._design.scale

    def _context(self) -> Iterator[Taken]:
        """The context rows of all slices, some at a time."""
        step = _context_rows(self._pool.size, self._columns)
        for some in everywhere(self._design.context, self._design.context_beside, step):
            yield self._taken(some.x(slice(None)), some.predictions[:], some.mass)

    def _taken(self, x: Tensor, p: Tensor, mass: Tensor) -> Taken:
        """Rows x (m, D) with probabilities p (m, C), of which each counts `mass` (m,) in M."""
        return Taken(x, written(self._make(p), len(x), x) * mass.sqrt()[:, None, None])

    def _of_all(self, gains: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Gains and errors of all rows (n,), of those that are kept track of; -inf and 0 for others."""
        every = torch.full_like(self._design.rows.mass, -torch.inf), torch.zeros_like(self._design.rows.mass)
        every[0][self._index], every[1][self._index] = gains, errors
        return every

    def _drift(self, gains: Tensor, errors: Tensor, free: Tensor) -> float:
        """The largest error, as a part of the best gain, of a row that may be the best."""
        _, best = self._pool.best(torch.where(free, gains, -torch.inf))
        near = free & (2 * (gains + errors) >= best) & (errors > DRIFT * best)
        _, worst = self._pool.best(torch.where(near, errors, 0.0))
        return float(worst / best) if best > 0 else 0.0

    def _take(self, rows: Taken) -> tuple[Tensor, Tensor]:
        """Adds rows to M, and changes G and H of every row; returns the directions before theirs times FU, and UᵀFU."""
        inverse, v = self._inverse, rows.columns()
        solved, before = inverse.solve(v)
        root = small_root(torch.eye(len(v), dtype=v.dtype, device=v.device) + self._overlaps(v, solved))
        u = self._solved(root, solved)
        p, fisher = inverse.project(self._rows, u)
        own = self._overlaps(u, fisher)
        z, overlaps = inverse.solve(fisher)
        for span in self._columns_of(u):
            z[:, span].addmm_(own, u[:, span], alpha=-0.5)
        scale = self._design.scale
        for span, _, _, y in inverse.products(self._rows, z):
            self._g[span].baddbmm_(p[span].mT, p[span], alpha=-scale)
            self._h[span].baddbmm_(p[span].mT, y, alpha=-scale).baddbmm_(y.mT, p[span], alpha=-scale)
        inverse.add(rows, u, before, root)
        return overlaps, own

    def _overlaps(self, x: Tensor, y: Tensor) -> Tensor:
        """X Yᵀ (r, r) of x and y (r, C D)."""
        found = x.new_empty(len(x), len(y))
        for span in self._pool.spans(len(x), max(8 * x.shape[1], 2 * y.numel() // FLOPS_PER_BYTE)):
            found[span] = x[span] @ y.T
        return found

    def _solved(self, root: Tensor, y: Tensor) -> Tensor:
        """R⁻¹ y (r, C D) for R (r, r), lower triangular."""
        found = torch.empty_like(y)
        for span in self._columns_of(y):
            found[:, span] = torch.linalg.solve_triangular(root, y[:, span], upper=False)
        return found

    def _columns_of(self, y: Tensor) -> Iterator[slice]:
        """Spans of the columns of y (r, C D), for products with matrices (r, r)."""
        return self._pool.spans(y.shape[1], len(y) * max(3 * 8, 2 * len(y) // FLOPS_PER_BYTE))

    def forward(self, choice: Choice) -> Forward:
        """Chooses."""
        pool, rows, columns = self._pool, self._design.rows, self._columns
        # Below and on the diagonal Λ; above it Φ, whose blocks on the diagonal stand apart: there may be little room.
        packed, own = self._inverse.root.rest, self._g.new_empty(choice.steps, columns, columns)
        indices = torch.empty(choice.steps, dtype=torch.int64, device=self._g.device)
        entries = self._g.new_empty(choice.steps, rows.embeddings.shape[1] + rows.predictions.values.shape[1])
        scores = self._g.new_empty(choice.steps)
        taken = 0
        for step in range(choice.steps):
            pool.progress(step, choice.steps)
            gains, errors = self._of_all(*self._gains.now(choice.free[self._index]))
            drift = self._drift(gains, errors, choice.free)
            if drift > self._inverse.bearable:
                self._inverse.refresh()
                self._measure()
                gains, errors = self._of_all(*self._gains.restart())
            row, score, x, values = leader(choice, gains, rows.embeddings, rows.predictions.values, errors=errors)
            if choice.ends(score):
                break
            refuse_overflow(score)
            p, mass = rows.predictions.of(values[None])[:], rows.mass.new_full((1,), self._design.scale)
            overlaps, fisher = self._take(self._taken(x[None].double() * rows.scale, p, mass))
            entries[step] = torch.cat([x, values])
            at = step * columns
            packed[:at, at : at + columns] = overlaps[self._borrowed :]
            own[step], indices[step], scores[step], taken = fisher, row, fisher.trace(), step + 1
            choice.take(row)
        del self._g, self._h, self._gains, self._inverse, self._rows
        parts = [packed[: taken * columns, : taken * columns], own[:taken]]
        del packed, own

        def matrices() -> tuple[Tensor, Tensor]:
            diagonal, both = parts.pop(), parts.pop()
            return _unpacked(both, diagonal, pool)

        return Forward(indices[:taken], scores[:taken], entries[:taken], columns, matrices)


def _context_rows(n: int, columns: int) -> int:
    """How many context rows of c columns each are taken at once, for n rows."""
    return max(1, min(CONTEXT_COLUMNS, PRODUCTS // max(1, n * columns)) // columns)


def _unpacked(packed: Tensor, diagonal: Tensor, pool: Shards) -> tuple[Tensor, Tensor]:
    """Λ and Φ (1, m c, m c) of packed (m c, m c). diagonal: (m, c, c), Φ's own blocks."""
    root, fisher = (packed.new_empty(1, *packed.shape) for _ in range(2))  # apart, as one goes before the other
    for rows in tiles_of(len(packed)):
        pool.check()
        root[0, rows] = packed[rows].tril(rows.start)
        fisher[0, rows] = packed[rows].triu(rows.start + 1) + packed[:, rows].triu(1 - rows.start).T
    count, columns = diagonal.shape[:2]
    at = torch.arange(count, device=packed.device)
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


def memory(n: int, dims: int, classes: int, columns: int, context: int, steps: int, drops: int) -> int:
    """Bytes that the forward and the backward phase take at the most; the arguments as those of `plan`.

    drops: picks of the backward phase.
    """
    how, side, size = plan(n, dims, classes, columns, context, steps), dims * classes, steps * columns
    ready = min(READY, n * ready_entries(dims, classes, columns)) * (1 if how.sample == n else 2)
    borrowed = 0 if how.dense else context
    kept = 2 * size * side if how.dense else (borrowed + steps) * (dims + columns * classes)
    root = size * (size + TILE) + columns * borrowed * (columns * (borrowed + steps) + TILE)
    block = columns * max(1, min(_context_rows(n, columns), borrowed))  # columns taken at once
    rows = n * (3 * columns**2 + 3 * columns + block * columns + 12) + ready
    written = 6 * side**2 if how.dense else 0
    forward = rows + kept + root + written + 7 * block * side + 4 * block * (borrowed + steps) * max(columns, classes)
    backward = backward_entries(steps, drops, columns)
    spans = min(SPAN_BYTES, 8 * n * max(side, 3 * columns * max(classes, columns)))
    spans *= 1 if how.dense else 2  # pairs of rows are made anew while those before are there
    return 8 * max(forward, backward) + spans


def work(n: int, dims: int, classes: int, columns: int, context: int, steps: int) -> float:
    """Multiply-adds; the arguments as those of `plan`."""
    side, size = dims * classes, steps * columns
    return float(n * side * (side + 4 * size) + 3 * side**2 * size + context * columns * 4 * n * side)
