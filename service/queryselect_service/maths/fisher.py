"""What the strategies share that minimise tr(M^-1 F): M and F, the leader of a step, the backward phase.

All that decides is float64 whatever the inputs are: gains fall by many orders of magnitude while a batch grows, and the
picks of every float type are to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from queryselect_service.choice import Choice
from queryselect_service.errors import InvalidInput
from queryselect_service.maths.distances import power_of_two
from queryselect_service.maths.predictions import Predictions
from queryselect_service.selection import Notice, NoticeCode, Selection
from queryselect_service.shards import Shards, Whole
from queryselect_service.spec import FisherDesign, FisherScale, RidgeScale

#: Gains that differ by less than this part of theirs are equal: what rounding may do to rows that are the same.
TIE = 1e-10
#: Rounding errors that a sum of products has, in units of what is summed.
ROUNDING = 16 * torch.finfo(torch.float64).eps
#: The error of a gain, as a part of the best, from which on everything is computed anew.
DRIFT = 1e-10
#: The least ridge as a part of the mean squared length per dimension: below, float64 does not tell it from 0.
LEAST_RIDGE = 1e-13
#: A ridge below this has a square.
MOST_RIDGE = 1e150
#: How large embeddings beside the pool may be in units of the pool's: sums of fourth powers are finite.
MOST_BESIDE = 2.0**200
#: Multiply-adds that take as long as touching one byte, on two cores as on a GPU: spans are measured in bytes.
FLOPS_PER_BYTE = 32
#: How far a pivot of the backward phase may fall before all are computed anew.
LOST_DIGITS = 1e-4
#: The most columns of picks whose matrices are kept for that.
KEPT = 4096
#: Columns of dropped picks from which on it may be worth to change all of Q and J, and how many columns of these change
#: in the time that one more drop takes to read what was dropped.
FLUSHED, READS = 64, 8
#: Rows that are read at once: as float64 they stay in the cache until they are used.
AT_ONCE = 2048
#: Columns that a product with a tall matrix takes at once, where they are more than half as many: three of the widest
#: registers of a CPU. One of 20 columns takes twice as long as one of 24.
AT_A_TIME = 24
#: The side of a tile of a large product: one takes about 100 ms at the sides that fit a memory.
TILE = 512


@dataclass(frozen=True)
class Rows:
    """Rows with their predictions, read as float64 where they are needed.

    embeddings: (n, D), times `scale`, a power of two, when read. mass: (n,) float64, what a row counts in a sum.
    """

    embeddings: Tensor
    predictions: Predictions
    mass: Tensor
    scale: float
    pool: Shards

    def __len__(self) -> int:
        return len(self.embeddings)

    def x(self, rows: slice | Tensor) -> Tensor:
        """Embeddings (m, D) in memory of their own."""
        found = self.embeddings[rows].to(torch.float64, copy=True)
        return found if self.scale == 1 else found.mul_(self.scale)

    def spans(self, flops: float, entries: int) -> Iterator[slice]:
        """Stretches of rows. flops, entries: the multiply-adds and float64 numbers that the work on one row takes."""
        return self.pool.spans(len(self), max(8 * entries, int(flops / FLOPS_PER_BYTE)))

    def read(self, flops: float, entries: int) -> Iterator[tuple[slice, Tensor]]:
        """Stretches of rows with their embeddings (m, D), in memory that the next stretch takes over; as spans."""
        room = self.mass.new_empty(min(AT_ONCE, len(self)), self.embeddings.shape[1])
        for span in self.spans(flops, entries):
            for start in range(span.start, span.stop, AT_ONCE):
                some = slice(start, min(start + AT_ONCE, span.stop))
                x = room[: some.stop - some.start].copy_(self.embeddings[some])
                yield some, x if self.scale == 1 else x.mul_(self.scale)

    def read_single(self, flops: float, entries: int) -> Iterator[tuple[slice, Tensor]]:
        """The same in float32 and without `scale`; rows that are float32 are not copied."""
        for span in self.spans(flops, entries):
            for start in range(span.start, span.stop, 4 * AT_ONCE):
                some = slice(start, min(start + 4 * AT_ONCE, span.stop))
                yield some, self.embeddings[some].float()

    def at(self, rows: Tensor, mass: float | None = None) -> Rows:
        """Some of the rows, with their own mass or all with the same."""
        masses = self.mass[rows] if mass is None else torch.full_like(self.mass[rows], mass)
        return Rows(self.embeddings[rows], self.predictions.at(rows), masses, self.scale, self.pool)


#: The sum over some rows (n,) of their mass times something of theirs.
Part = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class Design:
    """What M = λI + Σ context + scale Σ picks and F are made of.

    rows: those of this place, their mass adding up to 1 with that of all others that count in F. context: those of this
    place that count as labelled; their mass is what their information is multiplied by in M. beside, context_beside:
    labelled rows that are in no slice, the same in each. scale: what a pick's information is multiplied by,
    B/(n_L + B).
    """

    rows: Rows
    beside: Rows | None
    context: Rows
    context_beside: Rows | None
    labeled: int  # n_L
    ridge: float
    scale: float

    @property
    def pool(self) -> Shards:
        """The pool that the rows are of."""
        return self.rows.pool

    def total(self, part: Part) -> Tensor:
        """The sum over every row that counts in F."""
        return _total(self.pool, self.rows, self.beside, part)

    def context_total(self, part: Part) -> Tensor:
        """The sum over every row that counts as labelled."""
        return _total(self.pool, self.context, self.context_beside, part)


def everywhere(here: Rows, beside: Rows | None, step: int) -> Iterator[Rows]:
    """The rows of all slices, then those beside them, at most `step` at a time."""
    blocks = here.pool.blocks(here.embeddings, here.predictions.values, here.mass)
    others = [] if beside is None else [(beside.embeddings, beside.predictions.values, beside.mass)]
    for x, values, mass in chain(blocks, others):
        for start in range(0, len(x), step):
            at = slice(start, start + step)
            yield Rows(x[at], here.predictions.of(values[at]), mass[at], here.scale, here.pool)


def _total(pool: Shards, here: Rows, beside: Rows | None, part: Part) -> Tensor:
    found = pool.sum(part(here))
    return found if beside is None else found + part(beside)


def design_of(
    embeddings: Tensor,
    predictions: Predictions,
    weights: Tensor | None,
    labeled: tuple[Tensor | None, Predictions | None, Tensor | None],
    *,
    context: Tensor,
    k: int,
    spec: FisherDesign,
    pool: Shards,
) -> Design:
    """The design of a selection of k rows.

    embeddings: (n, D). weights: (n,), masses in F, 1 by default. labeled: the same three of labelled rows that are not
    in the pool. context: (l,) rows here that count as labelled. Raises InvalidInput for an absolute ridge, or labelled
    rows beside the pool, that float64 can't hold beside such embeddings.
    """
    scale = power_of_two(embeddings, pool, torch.float64)
    beside, (their_embeddings, their_predictions, their_weights) = None, labeled
    theirs = 1.0 if their_weights is None else _mass_scale(their_weights, Whole(len(their_weights)))
    lightest = min(_mass_scale(weights, pool), theirs)
    here = Rows(embeddings, predictions, _masses(weights, embeddings, lightest), scale, pool)
    if their_embeddings is not None and their_predictions is not None:
        _refuse_longer(their_embeddings, scale)
        masses = _masses(their_weights, their_embeddings, lightest)
        beside = Rows(their_embeddings, their_predictions, masses, scale, pool)
    sums = _total(pool, here, beside, _mass_and_squares)
    mass, squares = sums[0], float(sums[1] / sums[0])
    here.mass.div_(mass)
    if beside is not None:
        beside.mass.div_(mass)
    count = int(pool.sum(torch.tensor(len(context), device=embeddings.device)))
    count += 0 if beside is None else len(beside)
    each = (1 if spec.fisher_scale is FisherScale.MEAN else count) / (count + k)
    return Design(
        here,
        beside,
        here.at(context, each),
        None if beside is None else beside.at(torch.arange(len(beside), device=embeddings.device), each),
        count,
        _ridge(spec, scale, squares / embeddings.shape[1]),
        k / (count + k),
    )


def _refuse_longer(beside: Tensor, scale: float) -> None:
    """Raises InvalidInput where embeddings beside the pool's, times the pool's `scale`, have no fourth powers."""
    largest = max(abs(float(each)) for each in beside.aminmax())
    if largest * scale > MOST_BESIDE:
        raise InvalidInput(
            f"embeddings of reference sets are up to {largest:.3g}, so much more than the pool's that float64 can't "
            "hold the information of both; scale them alike",
            field="references",
        )


def _mass_scale(weights: Tensor | None, pool: Shards) -> float:
    """What weights (n,) are multiplied by so that sums of them, and of them times squares, are finite."""
    return 1.0 if weights is None else power_of_two(weights[:, None], pool, torch.float64)


def _masses(weights: Tensor | None, embeddings: Tensor, scale: float) -> Tensor:
    if weights is None:
        return torch.full((len(embeddings),), scale, dtype=torch.float64, device=embeddings.device)
    return weights.to(torch.float64, copy=True).mul_(scale)


def _mass_and_squares(rows: Rows) -> Tensor:
    """The masses' sum, and that of mass times squared length: (2,)."""
    found = torch.zeros(2, dtype=torch.float64, device=rows.mass.device)
    for span in rows.spans(0, 4 * rows.embeddings.shape[1]):
        found[0] += rows.mass[span].sum()
        found[1] += rows.mass[span] @ rows.x(span).square_().sum(1)
    return found


def _ridge(spec: FisherDesign, scale: float, squares: float) -> float:
    """λ beside embeddings times `scale`. squares: their mean square per dimension."""
    relative, least = spec.ridge_scale is RidgeScale.RELATIVE, torch.finfo(torch.float64).tiny
    if relative and not squares:
        return 1.0  # embeddings of zeros hold no information under any ridge
    ridge = spec.ridge * squares if relative else spec.ridge * scale * scale
    if not (least if relative else max(LEAST_RIDGE * squares, least)) <= ridge < MOST_RIDGE:
        near = "a ridge near 1" if relative else "ridge_scale RELATIVE, or an absolute ridge near that"
        raise InvalidInput(
            f"ridge {spec.ridge:g} can't be told from {'0' if ridge < 1 else 'infinity'} beside embeddings whose mean "
            f"square per dimension is {squares / scale / scale:.3g}; take {near}",
            field="ridge",
        )
    return ridge


def leader(choice: Choice, gains: Tensor, *rows: Tensor, errors: Tensor | None = None) -> tuple[Tensor, ...]:
    """The lowest of the free rows whose gains (n,) are as good as the best: its number, gain, and row of `rows`.

    errors: (n,), how wrong gains may be. Where none is free, the gain is -inf; where one has overflowed, NaN.
    """
    _, best = choice.best(gains)
    upper = gains if errors is None else gains + errors
    first = torch.where(upper >= best - TIE * best.abs(), 0.0, -torch.inf)
    row, _, gain, *found = choice.best(first, gains, *rows)
    return (row, torch.where(best == -torch.inf, best, gain + 0 * best), *found)


def refuse_overflow(scores: Tensor) -> None:
    """Raises InvalidInput where gains, of any shape, are more than float64 holds: nothing tells rows apart then."""
    if not bool(scores.isfinite().all()):
        words = "ridge is too small for float64 beside these embeddings and weights; raise it"
        raise InvalidInput(words, field="ridge")


def kinds(entries: Tensor) -> Tensor:
    """A number (m,) for every row of entries (m, w), the same for the same entries, and lower than m."""
    _, kind = entries.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    found: Tensor = kind
    return found


def least_of(losses: Tensor, allowed: Tensor, rows: Tensor, kind: Tensor) -> Tensor:
    """The position () of the least of the losses (m,) that are allowed, of equal ones that of the highest of rows (m,).

    kind: (m,), see `kinds`. What rounding makes of equal rows may be more than a tie where the ridge is small: all of a
    kind have the least loss of theirs. A loss that is not finite, of a block that is singular to float64, counts as the
    largest.
    """
    losses = torch.where(losses.isfinite() & allowed, losses, torch.inf)
    losses = losses.new_full((int(kind.max()) + 1,), torch.inf).scatter_reduce(0, kind, losses, "amin")[kind]
    if not bool(losses.isfinite().any()):
        losses = torch.zeros_like(losses)
    losses = torch.where(allowed, losses, torch.inf)
    least = losses.min()
    return torch.where(losses <= least + TIE * least.abs(), rows, -1).argmax()


@dataclass
class Forward:
    """What the forward phase leaves for the backward one, for picks in their order, c columns each, and L problems.

    rows: (m,) global; scores: (m,) float64. With A as it was before the first pick, V the picks' columns:

    root: (L, m c, m c) lower triangular, Λ Λᵀ = I + VᵀAV. fisher: (L, m c, m c), Φ = UᵀFU where U = A V Λ⁻ᵀ. Both are
    made when asked for, once.

    entries: (m, w), what the picks' information follows from: those with the same are as good as each other.
    """

    rows: Tensor
    scores: Tensor
    entries: Tensor
    columns: int
    matrices: Callable[[], tuple[Tensor, Tensor]]


def backward(forward: Forward, choice: Choice, pool: Shards) -> tuple[Tensor, Tensor]:
    """Drops the pick whose loss is least, one after the other, until no more are left than wanted.

    With Q = (ΛΛᵀ)⁻¹ and J = Λ⁻ᵀΦΛ⁻¹, which are I - VᵀAV and VᵀAFAV with the A of all picks that are left, the objective
    rises by tr[Q_ss⁻¹ J_ss] when s is dropped. Returns the rows and scores of those that are left, in their order.
    """
    left = torch.ones(len(forward.rows), dtype=torch.bool, device=forward.rows.device)
    if choice.excess:
        phase = _Backward(forward, len(forward.rows) - choice.k, pool)
        while choice.excess:
            allowed = left.clone()
            allowed[left] = choice.droppable(forward.rows[left])
            position = phase.least(allowed, forward.rows)
            choice.drop(forward.rows[position])
            left[position] = False
            if choice.excess:
                phase.drop(position, left)
    return forward.rows[left], forward.scores[left]


class _Backward:
    """The losses of picks, and what changes them.

    What dropped picks take from Q and J is kept as the columns it is made of, and taken where Q and J are read: from
    the picks' own blocks, and from the columns of the next to be dropped. Where many more are to be dropped, that takes
    longer and longer: it is then taken from all of Q and J now and then, which shrink to the picks that are left.
    """

    def __init__(self, forward: Forward, room: int, pool: Shards) -> None:
        """room: how many picks may be dropped before Q and J themselves are changed."""
        self._pool, self._columns, self._room, self._count = pool, forward.columns, max(1, room), 0
        self._kind = kinds(forward.entries)  # (m,)
        matrices = [*forward.matrices()]  # by no other name, so that each goes when it is read
        # Kept where there is room for them, to start again from what no step has touched.
        self._kept = (matrices[0], matrices[1]) if matrices[0].shape[-1] <= KEPT else None
        self._start(torch.arange(len(forward.rows), device=forward.rows.device), matrices)

    def _start(self, left: Tensor, matrices: list[Tensor]) -> None:
        """Q and J of the picks that are left (r,). matrices: their Λ and Φ; emptied, so that each goes when read."""
        fisher = matrices.pop()
        inverse = inverse_of_root(matrices.pop(), self._pool)
        right = product(fisher, inverse, self._pool)
        del fisher
        self._left, self._j = left, product(inverse.mT, right, self._pool)  # (L, r c, r c)
        del right
        self._q = product(inverse.mT, inverse, self._pool)  # (L, r c, r c)
        del inverse
        self._own, self._theirs = self._diagonal(self._q).clone(), self._diagonal(self._j).clone()
        self._first = self._own.diagonal(dim1=-2, dim2=-1).clone()  # (L, r, c)
        self._make_room()

    def _make_room(self) -> None:
        """Memory for Q_:s, α and β (see drop) of picks still to be dropped; `_count` columns of it are in use."""
        self._room = self._room - self._count // self._columns or self._room
        shape = (3, len(self._q), self._room * self._columns, self._q.shape[-1])
        self._taken, self._count = self._q.new_empty(shape), 0

    def _restart(self, left: Tensor, root: Tensor, fisher: Tensor) -> None:
        """Computes Q and J of the picks that are left (r,) anew. root, fisher: Λ and Φ of all."""
        at = (left[:, None] * self._columns + torch.arange(self._columns, device=left.device)).flatten()
        mine = root[:, at]  # (L, r c, m c)
        new = root_of(mine @ mine.mT, self._pool)
        middle = torch.linalg.solve_triangular(new, mine, upper=False)
        self._start(left, [new, middle @ fisher @ middle.mT])

    def _diagonal(self, x: Tensor) -> Tensor:
        """The picks' own blocks (L, r, c, c) of x (L, r c, r c)."""
        size, c = len(self._left), self._columns
        return x.view(len(x), size, c, size, c).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def least(self, allowed: Tensor, rows: Tensor) -> Tensor:
        """The position () of the pick of least loss among those allowed (m,); of equal ones that of the highest row."""
        solved, _ = torch.linalg.solve_ex(self._own, self._theirs)
        losses = solved.diagonal(dim1=-2, dim2=-1).sum((0, -1))  # (r,)
        left = self._left
        return left[least_of(losses, allowed[left], rows[left], self._kind[left])]

    def drop(self, position: Tensor, left: Tensor) -> None:
        """Takes the pick at a position () out of Q and J; left: (m,) which ones stay.

        Q' = Q - α Q_s:        J' = J - α βᵀ - β αᵀ,  α = Q_:s Q_ss⁻¹,  β = J_:s - ½ α J_ss
        """
        c = self._columns
        at = int((self._left < position).sum()) * c
        some = slice(at, at + c)
        column, theirs = self._read(some)
        alpha, _ = torch.linalg.solve_ex(column[..., some], column)  # (L, c, r c), as all of these
        beta = theirs - 0.5 * theirs[..., some].mT @ alpha
        for each, kept in zip((column, alpha, beta), self._taken, strict=True):
            kept[:, self._count : self._count + c] = each
        self._count += c
        blocks = [x.unflatten(-1, (-1, c)).permute(0, 2, 3, 1) for x in (column, alpha, beta)]  # (L, r, c, c)
        self._own -= blocks[1] @ blocks[0].mT
        cross = blocks[1] @ blocks[2].mT
        self._theirs -= cross + cross.mT
        now = self._own.diagonal(dim1=-2, dim2=-1)
        stays = left[self._left]
        # Where a pick's own block has lost more digits than float64 can spare, all is computed anew.
        if self._kept is not None and bool((now[:, stays] < LOST_DIGITS * self._first[:, stays]).any()):
            self._restart(left.nonzero().squeeze(1), *self._kept)
            return
        to_come = self._taken.shape[2] - self._count
        if not to_come or (self._count >= FLUSHED and READS * to_come > c * self._q.shape[-1]):
            self._flush(stays)

    def _read(self, some: slice) -> tuple[Tensor, Tensor]:
        """Q_s: and J_s: (L, c, r c) of one pick's columns."""
        column, theirs = self._q[:, some].clone(), self._j[:, some].clone()
        size, count = self._q.shape[-1], some.stop - some.start
        for span in self._pool.spans(self._count, size * max(24, 6 * count // FLOPS_PER_BYTE)):
            columns, alphas, betas = self._taken[:, :, span]
            column.baddbmm_(alphas[..., some].mT, columns, alpha=-1)
            theirs.baddbmm_(alphas[..., some].mT, betas, alpha=-1).baddbmm_(betas[..., some].mT, alphas, alpha=-1)
        return column, theirs

    def _flush(self, stays: Tensor) -> None:
        """Takes what dropped picks take from Q and J themselves, and leaves in these the picks that stay (r,) bool."""
        size, count = self._q.shape[-1], self._count
        columns, alphas, betas = self._taken[:, :, :count]
        for span in self._pool.spans(size, size * max(48, 6 * count // FLOPS_PER_BYTE)):
            self._q[:, span].baddbmm_(alphas[..., span].mT, columns, alpha=-1)
            self._j[:, span].baddbmm_(alphas[..., span].mT, betas, alpha=-1)
            self._j[:, span].baddbmm_(betas[..., span].mT, alphas, alpha=-1)
        del columns, alphas, betas, self._taken  # before there is more
        self._left = self._left[stays]
        self._own, self._theirs, self._first = (x[:, stays] for x in (self._own, self._theirs, self._first))
        at = stays.repeat_interleave(self._columns).nonzero().squeeze(1)
        self._q = self._among(self._q, at)
        self._j = self._among(self._j, at)
        self._make_room()

    def _among(self, x: Tensor, at: Tensor) -> Tensor:
        """Some rows and the same columns (s,) of x (L, r c, r c)."""
        found = x.new_empty(len(x), len(at), len(at))
        for span in self._pool.spans(len(at), 24 * x.shape[-1]):
            found[:, span] = x[:, at[span]][..., at]
        return found


def backward_entries(steps: int, drops: int, columns: int) -> int:
    """Float64 numbers that the backward phase holds at the most for every problem, for so many picks of c columns."""
    size = steps * columns
    kept = 2 * size**2 if size <= KEPT else 0
    return kept + max(4 * size**2, 2 * size**2 + 3 * max(1, drops) * columns * size)


def tiles_of(size: int) -> list[slice]:
    """The tiles along a side."""
    return [slice(start, min(start + TILE, size)) for start in range(0, size, TILE)]


def widened(y: Tensor) -> Tensor:
    """The right factor y (D, r) of a product with a tall matrix, with columns of zeros where it is faster with them."""
    columns = y.shape[1]
    missing = -columns % AT_A_TIME if 2 * columns > AT_A_TIME else 0
    return pad(y, (0, missing)) if missing else y.contiguous()


def product(a: Tensor, b: Tensor, pool: Shards) -> Tensor:
    """The product of a (L, m, n) and b (L, n, p), a tile at a time."""
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    for rows in range(0, a.shape[1], TILE):
        for columns in range(0, b.shape[2], TILE):
            pool.check()
            i, j = slice(rows, rows + TILE), slice(columns, columns + TILE)
            out[:, i, j] = a[:, i] @ b[:, :, j]
    return out


def inverse_of_root(root: Tensor, pool: Shards) -> Tensor:
    """The inverse (L, n, n) of a lower triangular matrix, a tile at a time."""
    size = root.shape[-1]
    inverse = torch.empty_like(root)
    tiles = tiles_of(size)
    for j in tiles:
        pool.check()
        inverse[:, j] = 0
    for at, j in enumerate(tiles):
        eye = torch.eye(j.stop - j.start, dtype=root.dtype, device=root.device).expand(len(root), -1, -1)
        inverse[:, j, j] = torch.linalg.solve_triangular(root[:, j, j], eye, upper=False)
        for i in tiles[at + 1 :]:
            pool.check()
            known = slice(j.start, i.start)
            right = root[:, i, known] @ inverse[:, known, j]
            inverse[:, i, j] = torch.linalg.solve_triangular(root[:, i, i], -right, upper=False)
    return inverse


def small_root(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a symmetric positive definite matrix, or several, that take less time than a span.

    Raises InvalidInput where float64 can't tell one from a singular one.
    """
    found: Tensor
    found, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise InvalidInput("ridge is too small for float64 beside these embeddings; raise it", field="ridge")
    return found


def root_of(matrix: Tensor, pool: Shards) -> Tensor:
    """The Cholesky factor (L, n, n) of symmetric positive definite matrices, a tile at a time.

    Raises InvalidInput where float64 can't tell a matrix from a singular one.
    """
    size = matrix.shape[-1]
    root = torch.zeros_like(matrix)
    tiles = tiles_of(size)
    for at, j in enumerate(tiles):
        done = slice(0, j.start)
        root[:, j, j] = found = small_root(matrix[:, j, j] - root[:, j, done] @ root[:, j, done].mT)
        for i in tiles[at + 1 :]:
            pool.check()
            right = matrix[:, i, j] - root[:, i, done] @ root[:, j, done].mT
            root[:, i, j] = torch.linalg.solve_triangular(found, right.mT, upper=False).mT
    return root


def selection(
    forward: Forward, choice: Choice, pool: Shards, gains: Callable[[], Tensor], notices: tuple[Notice, ...] = ()
) -> Selection:
    """What is left after the backward phase. gains: every row's gain (n,) at the first step."""
    refuse_overflow(forward.scores)
    return picked(*backward(forward, choice, pool), gains, notices)


def picked(rows: Tensor, scores: Tensor, gains: Callable[[], Tensor], notices: tuple[Notice, ...] = ()) -> Selection:
    """The answer of rows (k,) with scores (k,), and a notice of those that brought nothing."""
    inert = rows[scores <= 0]
    if len(inert):
        message = (
            f"{len(inert)} picks have gain 0: their probabilities are saturated, or their embeddings 0. Logits keep "
            "the digits that probabilities lose"
        )
        notices = (*notices, Notice(NoticeCode.SATURATED, message, inert))
    return Selection(rows, scores, gains, notices)
