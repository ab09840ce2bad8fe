"""Euclidean distances that are fast in single precision and exact where a decision hangs on them.

Distances by the expansion |x|^2 + |c|^2 - 2 x.c are one matrix product, but they lose digits when the norms are much
larger than the distances. `Points` therefore measures norms from the rows' mean, and knows how wrong a fast distance
can be; what is too close to call is decided by direct differences in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from queryselect_service.selection import Notice, NoticeCode
from queryselect_service.shards import Shards

#: Centres that one matrix product takes at once, and how many entries they may have.
CENTRES, CENTRE_ENTRIES = 256, 1 << 20
#: Multiply-adds over all rows after which slices meet, so that a caller who leaves is heard.
MEETING = 1 << 32
#: Columns that one matrix product takes at once: the error of a sum grows with its terms.
TERMS = 2048
#: Bytes per entry that work on float64 rows touches: they are made, scaled, shifted and read, in memory of their own.
EXACT_BYTES = 48
#: Multiply-adds that take as long as touching an entry.
PRODUCTS = 32
#: How much longer a span whose rows are moved first may take than another of its length.
MOVE_COST = 4
#: The mean is far where its length is more than 4 times a row's distance from it, here squared. Up to there some 5 rows
#: per pick are compared exactly instead of 2; at 32 times it would be thousands.
FAR = 4.0**2
#: Entries up to 2 to this power, or its inverse, have squares and sums of them that no type loses.
PLAIN_EXPONENT = 30


class Points:
    """The rows of one slice, ready for distances to centres.

    Distances are those of the rows as given (or of their unit-length versions with `normalize`), times `scale`, a power
    of two that keeps squares from overflowing or vanishing; it changes no digit, and is 1 where neither can happen.

    Fast distances are measured from m, the rows' mean: with c' = c - m,

        |x - c|^2 = |x - m|^2 + |c'|^2 + 2 o.c' - 2 w.c'    where w = x, o = m    or    w = x - m, o = 0.

    As a rule w are the rows as given. They are moved where products of the rows as given would not do: with a scale, or
    a mean so far away that it would blur them, span by span and again for every centre; with half types and
    `normalize`, where that would take long, once and into a copy. m is rounded to bfloat16, so that differences from it
    are exact for integer or fixed-point data.
    """

    def __init__(self, embeddings: Tensor, pool: Shards, *, normalize: bool = False) -> None:
        """embeddings: (n, D), any float type; read, never written."""
        self.embeddings, self.pool, self.normalize = embeddings, pool, normalize
        n, dims, device = *embeddings.shape, embeddings.device
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        self.scale = 1.0 if normalize else power_of_two(embeddings, pool, dtype)
        total = torch.zeros(dims, dtype=torch.float64, device=device)
        for span in pool.spans(n, EXACT_BYTES * dims):
            total += self.exact(embeddings[span]).sum(0)
        self.shift = (pool.sum(total) / pool.size).to(torch.bfloat16).double()  # (D,)
        copied = normalize or embeddings.dtype != dtype
        self.work = torch.empty(n, dims, dtype=dtype, device=device) if copied else embeddings
        self.norms = torch.empty(n, dtype=dtype, device=device)  # |x - m|^2
        beyond = torch.zeros_like(total)
        for span in pool.spans(n, EXACT_BYTES * dims):
            rows = self.moved(embeddings[span])
            beyond += rows.sum(0)
            self.norms[span] = torch.linalg.vector_norm(rows, dim=1).square_()
            if copied:
                self.work[span] = rows
        # Summed again from near by: in the first sum a far offset takes digits, other ones in other slices.
        self.mean = self.shift + pool.sum(beyond) / pool.size

        far = pool.sum((FAR * self.norms < self.shift.square().sum()).sum())
        moved = copied or self.scale != 1 or bool(2 * far > pool.size)
        self.move, self._copied = moved and not copied, copied
        self.origin = torch.zeros_like(self.shift) if moved else self.shift
        self._error = rounding(dtype, dims)
        vanishing = 4 * dims * torch.finfo(dtype).tiny
        self._floor = float(2 * self._error * self.origin.square().sum()) + vanishing

    def exact(self, rows: Tensor) -> Tensor:
        """Rows (m, D) as given -> the float64 rows (m, D) whose distances count, in memory of their own."""
        rows = rows.to(torch.float64, copy=True)
        return unit_(rows) if self.normalize else rows.mul_(self.scale)

    def moved(self, rows: Tensor) -> Tensor:
        """Rows (m, D) as given -> the same, less m, in float64."""
        return self.exact(rows).sub_(self.shift)

    def nearly(self, rows: slice | Tensor) -> Tensor:
        """The same of rows here in memory of their own, (m, D) float64, but for rounding where that is quicker."""
        return self.work[rows].to(torch.float64, copy=True) if self._copied else self.moved(self.embeddings[rows])

    def to_mean(self) -> Tensor:
        """The distance (n,) of every row to the mean of all, float64."""
        n, dims = self.embeddings.shape
        distances = torch.empty(n, dtype=torch.float64, device=self.mean.device)
        for span in self.pool.spans(n, EXACT_BYTES * dims):
            distances[span] = torch.linalg.vector_norm(self.exact(self.embeddings[span]).sub_(self.mean), dim=1)
        return distances

    def inert(self) -> Tensor:
        """Which rows (n,) have no length."""
        inert = torch.empty(len(self.embeddings), dtype=torch.bool, device=self.embeddings.device)
        for span in self.pool.spans(len(inert), self.embeddings.element_size() * self.embeddings.shape[1]):
            inert[span] = ~self.embeddings[span].any(dim=1)
        return inert

    def inert_rows(self) -> tuple[Notice, ...]:
        """A warning of the rows of all slices that have no length, where there are any."""
        mine = self.pool.offset + self.inert().nonzero().squeeze(1)
        rows = torch.cat([mine[:0], *(block for (block,) in self.pool.blocks(mine))])
        if not len(rows):
            return ()
        message = f"{len(rows)} rows have length 0 and stay there when normalized"
        return (Notice(NoticeCode.INERT_ROWS, message, rows),)

    def error_bound(self, nearest: Tensor, rows: slice = slice(None)) -> Tensor:
        """How wrong the fast squared distances (s,) to the nearest centre, or (s, c) to several, d^2, can be, each.

        rows: whose they are; all.

        Every term of a distance is wrong by a part of its size, and their sizes add up to a small multiple of

            |w|^2 + |c'|^2  <=  2 |x - m|^2 + 2 |o|^2  +  2 |x - m|^2 + 2 d^2,

        since |c'| is at most |x - m| + d. What vanishes among squares comes on top.
        """
        norms = self.norms[rows] if nearest.dim() == 1 else self.norms[rows, None]
        return torch.add(nearest, norms, alpha=2).mul_(2 * self._error).add_(self._floor)

    def update_nearest(self, nearest: Tensor, centres: Tensor) -> None:
        """Lowers `nearest` (n,), in place, to the fast squared distances to `centres` (m, D), rows as given."""
        for batch in _batches(centres):
            for span, table in self.tables(self.moved(batch)):
                torch.minimum(nearest[span], table.amin(1), out=nearest[span])

    def tables(self, centres: Tensor, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Span by span the fast squared distances (s, c) of rows, from the `first` on, to all `centres` (c, D).

        They are at least 0. centres: float64, what `moved` makes of rows, or means of such.
        """
        some, (count, dims) = centres.to(self.work.dtype), centres.shape
        their = (centres.square().sum(1) + 2 * (some.double() @ self.origin)).to(self.work.dtype)  # (c,)
        touched = dims * (MOVE_COST if self.move else 1) + count * (4 + dims // PRODUCTS)
        room = self.work[:0]
        for part in self.pool.spans(len(self.work) - first, self.work.element_size() * touched):
            span = slice(first + part.start, first + part.stop)
            if self.move and span.stop - span.start > len(room):
                room = torch.empty_like(self.work[span])
            yield span, self._table(span, some, their, room).clamp_min_(0)

    def _table(self, span: slice, some: Tensor, their: Tensor, room: Tensor) -> Tensor:
        """The fast squared distances (s, c) of a span of rows to `some` (c, D), |c'|^2 + 2 o.c' being `their`."""
        rows = self.work[span]
        if self.move:  # a power of two times a row is exact, so that this rounds once
            shift = self.shift.to(rows.dtype)
            scaled = rows if self.scale == 1 else torch.mul(rows, self.scale, out=room[: len(rows)])
            rows = torch.sub(scaled, shift, out=room[: len(rows)])
        return squared_distances(rows, self.norms[span], some, their)

    def direct(self, rows: Tensor, *centres: Tensor) -> Tensor:
        """The distance (m,) of each of `rows` (m,), numbers of rows here, to the nearest of all `centres` (c, D).

        By differences in float64.
        """
        nearest = torch.full((len(rows),), math.inf, dtype=torch.float64, device=rows.device)
        for batch in _batches(*centres):
            some, (count, dims) = self.exact(batch), batch.shape
            for part in self.pool.spans(len(rows), EXACT_BYTES * dims + 2 * count * (dims + 8)):
                distances = torch.cdist(
                    self.exact(self.embeddings[rows[part]]), some, compute_mode="donot_use_mm_for_euclid_dist"
                ).amin(1)  # (s,)
                nearest[part] = torch.minimum(nearest[part], distances)
        return nearest


def squared_distances(rows: Tensor, norms: Tensor, some: Tensor, their: Tensor) -> Tensor:
    """|w|^2 + |c|^2 - 2 w.c (s, c) of rows (s, D) and `some` (c, D): norms (s,) and `their` (c,) are the first two."""
    squared = norms[:, None] + their
    for start in range(0, some.shape[1], TERMS):
        terms = slice(start, start + TERMS)
        if len(some) == 1:
            squared[:, 0].addmv_(rows[:, terms], some[0, terms], alpha=-2)
        else:
            squared.addmm_(rows[:, terms], some[:, terms].T, alpha=-2)
    return squared


def unit_(rows: Tensor) -> Tensor:
    """The rows (m, D), float64, scaled in place to unit Euclidean length; those without length stay as they are."""
    for order in (math.inf, 2):  # the largest entry becomes 1 first, so that squares neither overflow nor vanish
        lengths = torch.linalg.vector_norm(rows, order, dim=-1, keepdim=True)
        rows /= lengths.clamp_min_(torch.finfo(torch.float64).tiny)
    return rows


def copy_bytes(dims: int, item: int, *, normalize: bool) -> int:
    """The bytes per row of the copy that Points makes: none where it reads rows as given. item: bytes of an entry."""
    wide = max(4, item)
    return dims * wide if normalize or item < wide else 0


def at_once(rows: int, dims: int) -> int:
    """How many centres all N rows are compared with between two meetings of slices, at the most."""
    return max(1, min(CENTRES, MEETING // max(1, rows * dims)))


def _batches(*centres: Tensor) -> Iterator[Tensor]:
    """All the centres, (c, D) at a time."""
    for block in centres:
        step = max(1, min(CENTRES, CENTRE_ENTRIES // block.shape[1]))
        for start in range(0, len(block), step):
            yield block[start : start + step]


def power_of_two(rows: Tensor, pool: Shards, dtype: torch.dtype) -> float:
    """1 where no squares of the rows' entries get lost, else the power of two that makes the largest entry about 1."""
    largest = torch.zeros((), dtype=rows.dtype, device=rows.device)
    for span in pool.spans(len(rows), rows.shape[1] * rows.element_size()):
        low, high = rows[span].aminmax()
        largest = torch.maximum(largest, torch.maximum(-low, high))
    _, peak = pool.best(largest.double()[None])
    exponent = math.frexp(float(peak))[1]
    if abs(exponent) <= PLAIN_EXPONENT:
        return 1.0
    widest = 120 if dtype == torch.float32 else 1000  # so that the scale itself is a normal number
    return 2.0 ** min(max(-exponent, -widest), widest)


def rounding(dtype: torch.dtype, dims: int) -> float:
    """How wrong a fast squared distance of rows of `dims` entries can be, as a part of |w|^2 + |c'|^2.

    A sum of t products, in any order, is wrong by at most t eps / 2; constant rows come near. All else that is rounded
    adds less than 8 eps. In float64 the norms are such sums too.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        return eps * (8 + 2 * dims)
    return coarseness() + eps * (8 + min(dims, TERMS) / 2 + dims / TERMS)


def coarseness() -> float:
    """What products in float32 lose where a process has allowed torch to round their factors: nothing by default."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # allowed by a newer interface, of which this one knows nothing
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-8}.get(precision, 2.0**-6)
