"""Herding's bounds in single precision: what gains are at the most, and what they lose at the least."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from queryselect_service.maths.distances import coarseness
from queryselect_service.maths.lists import Lists
from queryselect_service.maths.neighbourhoods import parts

if TYPE_CHECKING:
    from queryselect_service.maths.herding import Coverage

#: Multiply-adds of a matrix product in double precision that take as long as touching a byte.
FAST_PRODUCTS = 4
#: Where exponents end: beyond, the exponential is no normal number, which takes ten times as long.
FARTHEST = 80.0
#: Columns that one product takes at once: its error grows with them, its time hardly falls.
COLUMNS = 64
#: Pairs that are kept per entry of the rows, and at any rate; bytes that one takes while they are put in order.
PAIRS_PER_ENTRY, FEWEST_PAIRS, PAIR_BYTES = 1.5, 1 << 20, 20
#: Bytes that a pair takes as long as when it is looked at for what is lost.
LOSS_BYTES = 64


def most_pairs(rows: int, dims: int) -> int:
    """How many pairs of rows and candidates are kept at the most."""
    return max(FEWEST_PAIRS, int(PAIRS_PER_ENTRY * rows * dims))


def enough_covered(rows: int, dims: int) -> int:
    """How many rows, labelled or chosen, leave no more pairs, where they are rows like all others.

    The m rows that are labelled are in no other order than the candidates by how well they see a row: a part of
    1 / (m + 1) of these see it better than all of those.
    """
    return -(-rows * rows // most_pairs(rows, dims)) - 1


class Bounds:
    """What gains are at the most, and what they lose at the least.

    rows: (n, D + 2), of which exponents 2 x.u/h² - |x|²/h² - |u|²/h² are products. These are wrong by `wrong` at the
    most, which is added or taken away: k is then bounded from above or below. m is rounded by less than that.
    """

    def __init__(self, coverage: Coverage, wrong: float, farthest: float) -> None:
        self._coverage, self._wrong, self._deep = coverage, wrong, farthest > FARTHEST
        n, dims = coverage.rows.shape
        self.rows = torch.empty(n, dims + 2, dtype=torch.float32, device=coverage.rows.device)
        for span in coverage.pool.spans(n, 3 * 8 * dims):
            self.rows[span, :dims] = coverage.rows[span] * (math.sqrt(2) / coverage.width)
            self.rows[span, dims] = coverage.norms[span] / -(coverage.width**2)
            self.rows[span, dims + 1] = 1
        _, most = coverage.pool.best(coverage.mass)
        _, least = coverage.pool.best(-coverage.mass)
        self._even = float(most) if most == -least else None  # the mass of every row

    @staticmethod
    def rounding(dims: int, farthest: float) -> float:
        """How wrong exponents up to `farthest` are, what their exponentials are wrong by, and what m is rounded by."""
        eps = torch.finfo(torch.float32).eps
        return (coarseness() + eps * (8 + COLUMNS / 2 + dims / COLUMNS)) * farthest + 8 * eps

    def gains(self, candidates: Tensor) -> Tensor:
        """At least the gains (c,) of some of `rows` (c, D + 2), the same in all slices."""
        coverage, theirs = self._coverage, _turned(candidates, self._wrong)
        total = coverage.mass.new_zeros(len(candidates))
        for span in self._spans(len(candidates)):
            low = coverage.covered[span].float()
            seen = self._kernel(self.rows[span], theirs)
            total += self._weigh(span, torch.maximum(seen, low[:, None], out=seen), low)
        found: Tensor = coverage.pool.sum(total).clamp_min_(0) + coverage.error
        return found

    def losses(self, candidates: Tensor, before: Tensor) -> Tensor:
        """At most what gains of some of `rows` (c, D + 2) have lost since m was `before` (n,): (c,)."""
        coverage, better = self._coverage, (self._coverage.covered > before).nonzero().squeeze(1)
        total = coverage.mass.new_zeros(len(candidates))
        for span in coverage.pool.spans(len(better), self._row_bytes(len(candidates))):
            rows = better[span]
            low, high = before[rows].float(), coverage.covered[rows].float()
            seen = self._kernel(_turned(self.rows[rows], -self._wrong), candidates)
            rounded = 4 * torch.finfo(torch.float32).eps * (coverage.mass[rows] @ coverage.covered[rows])
            total += self._weigh(rows, seen.clamp_(low[:, None], high[:, None]), low) - rounded
        found: Tensor = coverage.pool.sum(total).clamp_min_(0)
        return found

    def by_pairs(self, allowed: Tensor) -> tuple[Tensor, Seers | None]:
        """At least the gains (n,) of the rows that are allowed (n,), and who sees whom better than m, if not too many.

        Exponents are compared with log m, so that few exponentials are computed; where most rows are allowed, two rows
        of the same slice are looked at once, for both.
        """
        coverage, pool = self._coverage, self._coverage.pool
        n, bar = len(allowed), torch.where(coverage.mass > 0, coverage.covered.log(), torch.inf).float()
        both = 2 * int(pool.sum(allowed.count_nonzero())) > pool.size
        found, pairs = torch.zeros_like(coverage.covered), _Pairs(coverage)
        begin = 0  # the global number of the block's first row
        for rows, may in parts(pool, self.rows, allowed):
            mine = pool.offset <= begin < pool.offset + n
            start = begin - pool.offset if mine else 0
            stop = start + len(rows) if mine and both else n  # rows from there on are still to be candidates
            at = torch.arange(len(rows), device=rows.device) if both else may.nonzero().squeeze(1)
            theirs, total = _turned(rows[at], self._wrong), coverage.mass.new_zeros(len(at))
            seen, seeing = [_over(theirs[:0], bar[:0, None], 0)], []
            for span in self._spans(len(at), start if both else 0):
                exponents = self._exponents(self.rows[span], theirs)
                seen.append(_over(exponents, bar[span, None], span.start))
                if span.stop > stop:
                    later = max(span.start, stop)
                    seeing.append(_over(exponents[later - span.start :], bar[start:stop], later))
            x, u, k = _joined(seen)
            kept = may[at][u]
            x, u, k = x[kept], u[kept], k[kept]
            total.index_add_(0, u, coverage.rises(x, k))
            pairs.add(x, begin + at[u], k)
            total = pool.sum(total)
            if mine:
                found[start + at] += total
            if seeing:
                u, x, k = _joined(seeing)
                order = x.argsort(stable=True)
                order = order[allowed[u[order]]]
                u, x, k = u[order], start + x[order], k[order]
                found.index_add_(0, u, coverage.rises(x, k))
                pairs.add(x, pool.offset + u, k)
            begin += len(rows)
        return found.add_(coverage.error), pairs.seers(math.exp(-2 * self._wrong))

    def _kernel(self, rows: Tensor, theirs: Tensor) -> Tensor:
        exponents = self._exponents(rows, theirs)
        return (exponents.clamp_min_(-FARTHEST) if self._deep else exponents).exp_()

    @staticmethod
    def _exponents(rows: Tensor, theirs: Tensor) -> Tensor:
        exponents = rows[:, :COLUMNS] @ theirs[:, :COLUMNS].T
        for start in range(COLUMNS, rows.shape[1], COLUMNS):
            some = slice(start, start + COLUMNS)
            exponents.addmm_(rows[:, some], theirs[:, some].T)
        return exponents

    def _weigh(self, rows: slice | Tensor, seen: Tensor, low: Tensor) -> Tensor:
        """The mass (c,) of what is seen (s, c) of some rows above `low` (s,), added up in double precision."""
        if self._even is not None:
            return (seen.sum(0, dtype=torch.float64) - low.sum(dtype=torch.float64)).mul_(self._even)
        mass = self._coverage.mass[rows]
        return mass @ seen.double() - mass @ low.double()

    def _spans(self, centres: int, first: int = 0) -> Iterator[slice]:
        """Spans of the rows from the `first` on."""
        for span in self._coverage.pool.spans(len(self.rows) - first, self._row_bytes(centres)):
            yield slice(first + span.start, first + span.stop)

    def _row_bytes(self, centres: int) -> int:
        dims = self.rows.shape[1]
        return dims * centres // (2 * FAST_PRODUCTS) + 4 * (dims + 4 * centres)


class Seers:
    """Of every row, the candidates that saw it better than it was covered when this was made, and how well.

    seen: (p,) float32, at least k(x, u). shrink: what makes it at most that.
    """

    def __init__(self, coverage: Coverage, lists: Lists, candidates: Tensor, seen: Tensor, shrink: float) -> None:
        self._coverage, self._lists = coverage, lists
        self._candidates, self._seen, self._shrink = candidates, seen, shrink

    def losses(self, before: Tensor) -> Tensor:
        """At most what the gains of the rows here (n,) have lost since m was `before` (n,)."""
        coverage, pool = self._coverage, self._coverage.pool
        total = before.new_zeros(pool.size)
        better = (coverage.covered > before).nonzero().squeeze(1)
        pairs = max(1, len(self._seen) // max(1, len(before)))  # of a row, on average
        for span in pool.spans(len(better), LOSS_BYTES * pairs):
            places, at = self._lists.places(better[span])
            rows = better[span][at]
            low = before[rows]
            lost = (self._seen[places].double() * self._shrink).clamp_(low, coverage.covered[rows]).sub_(low)
            total.index_add_(0, self._candidates[places].long(), lost.mul_(coverage.mass[rows]))
        return pool.sum(total)[pool.offset : pool.offset + len(before)]


class _Pairs:
    """Rows here and candidates that see them better than they are covered, as they come, until there are too many."""

    def __init__(self, coverage: Coverage) -> None:
        self._coverage, self._most = coverage, most_pairs(coverage.pool.size, coverage.rows.shape[1])
        self._counts = torch.zeros(len(coverage.rows), dtype=torch.int64, device=coverage.rows.device)
        self._pieces: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, rows: Tensor, candidates: Tensor, seen: Tensor) -> None:
        """Rows here (p,) in order, global rows (p,), and how well the ones are seen by the others (p,)."""
        self._counts += torch.bincount(rows, minlength=len(self._counts))
        if int(self._counts.sum()) > self._most:
            self._pieces.clear()
        else:
            self._pieces.append((rows.int(), candidates.int(), seen))

    def seers(self, shrink: float) -> Seers | None:
        """All of them by row, unless all slices have more than the most."""
        count = self._counts.sum()
        if int(self._coverage.pool.sum(count)) > self._most:
            return None
        lists = Lists(self._counts)
        candidates = torch.empty(int(count), dtype=torch.int32, device=count.device)
        seen, free = torch.empty_like(candidates, dtype=torch.float32), lists.starts
        while self._pieces:
            self._coverage.pool.check()
            rows, theirs, how = self._pieces.pop()
            counts = torch.bincount(rows, minlength=len(free))
            places = (free - (counts.cumsum(0) - counts))[rows.long()] + torch.arange(len(rows), device=rows.device)
            candidates[places], seen[places] = theirs, how
            free += counts
        return Seers(self._coverage, lists, candidates, seen, shrink)


def _over(exponents: Tensor, bar: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where exponents (s, c) are over a bar: rows (p,) counted from `first`, columns (p,), and kernels (p,)."""
    rows, columns = (exponents > bar).nonzero(as_tuple=True)
    return rows + first, columns, exponents[rows, columns].clamp_min_(-FARTHEST).exp_()


def _joined(pairs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns, seen = zip(*pairs, strict=True)
    return torch.cat(rows), torch.cat(columns), torch.cat(seen)


def _turned(rows: Tensor, more: float) -> Tensor:
    """Rows (c, D + 2) of bounds so that their products with others are exponents, and `more` added to those."""
    return torch.cat([rows[:, :-2], rows[:, -1:], rows[:, -2:-1] + more], dim=1)
