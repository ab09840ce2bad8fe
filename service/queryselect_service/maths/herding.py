"""Greedy maximisation of generalised coverage: how well a kernel sees every row from those that are labelled or chosen.

Requirements that the design meets:

- Picks are those of the plain greedy, computed in float64. Gains that differ by no more than rounding are ties, and go
  to the lowest row.
- No matrix of all pairs: kernels are made for a few candidates at a time, a span of rows at a time.
- A gain only falls while the batch grows (the objective is submodular), so that one from before is an upper bound: a
  candidate is looked at again only where its bound reaches the best (Minoux, Accelerated greedy algorithms for
  maximizing submodular set functions, 1978).
- A pick changes gains by the rows that it covers better, and by no others: once more candidates would have to be looked
  at than that is worth, the bounds of all are lowered by what those rows take from them.
- Bounds are computed in single precision, gains in double: those alone decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.distances import CENTRES, Points, at_once, coarseness, copy_bytes
from queryselect_service.selection import Notice, NoticeCode, Selection
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Herding
from queryselect_service.strategy import Sizes

#: Candidates whose gains are computed at once at first in a step, doubled as more are needed.
FEW = 4
#: Pairs of rows covered better and candidates that are looked at together.
PAIRS = 1 << 20
#: All bounds are lowered once so many times the candidates looked at are more than the rows covered better since.
EAGER = 8
#: Multiply-adds of a matrix product that take as long as touching a byte, and bytes that one by differences takes.
FAST_PRODUCTS, SLOW_BYTES = 4, 4
#: How wrong exponents may be in single precision; beyond, bounds are gains, in double precision.
COARSE = 1e-2
#: How wrong exponents of the kernel may be where distances are computed by their expansion; else by differences.
BLUR = 1e-10
#: Gains that differ by less than this part of the best are ties.
TIE = 1e-10
#: Where exponents end, and their roots: beyond, the exponential is no normal number, which takes ten times as long.
FARTHEST, FARTHEST_ROOT = 676.0, 26.0
#: The same in single precision.
FARTHEST_SINGLE = 80.0
#: Columns that one product takes at once in single precision: its error grows with them, its time hardly falls.
COLUMNS = 64


def memory(sizes: Sizes, spec: Herding) -> int:
    """Copies of the rows in two types, numbers per row, labelled rows, spans, what Points makes, or few candidates."""
    wide = max(4, sizes.item)
    points = sizes.N * (copy_bytes(sizes.D, sizes.item, normalize=spec.normalize) + 2 * wide)
    few = 2 * 8 * sizes.D * min(sizes.N, at_once(sizes.N, sizes.D))  # candidates that are looked at, taken from blocks
    spans = min(SPAN_BYTES, 3 * 8 * sizes.N * (sizes.D + CENTRES))
    return sizes.N * (12 * sizes.D + 136) + 16 * sizes.L * sizes.D + spans + max(points, few)


def work(sizes: Sizes) -> float:
    """One look at every pair, and some more as the batch grows."""
    return float(sizes.N) * sizes.N * sizes.D * 2


def herd(
    embeddings: Tensor, weights: Tensor | None, *, spec: Herding, context: Tensor, choice: Choice, pool: Shards
) -> Selection:
    """Picks rows (k,) by max_u (1/N) Σ_x w_x max(k(x, u) - m_x, 0), m_x = max over context and picks of k(x, ·).

    embeddings: (n, D). weights: (n,) w, at least 0; by default 1. context: (l,). Scores are the gains.
    """
    points = Points(embeddings, pool, normalize=spec.normalize)
    coverage = Coverage(points, weights, context, spec)
    notices = points.inert_rows() if spec.normalize else ()
    del points  # it may have a copy of the rows
    start = coverage.covered.clone()
    greedy = _LazyGreedy(coverage, choice)
    indices, scores = greedy.run()
    idle = indices[scores <= 0]
    if len(idle):
        message = f"{len(idle)} picks add nothing: every row that counts is covered as well as it can be"
        notices = (*notices, Notice(NoticeCode.COVERED, message, idle))
    return Selection(indices, scores, lambda: greedy.gains_from(start), notices)


class Coverage:
    """How well rows are covered by those that are labelled or chosen, m (n,), and what candidates would add.

    rows: (n, D) float64. error: what gains are wrong by at the most, a number.
    """

    def __init__(self, points: Points, weights: Tensor | None, context: Tensor, spec: Herding) -> None:
        self.pool, embeddings = points.pool, points.embeddings
        n, dims, device = *embeddings.shape, embeddings.device
        eps, tiny = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
        self.rows = torch.empty(n, dims, dtype=torch.float64, device=device)
        for span in self.pool.spans(n, 5 * 8 * dims):
            self.rows[span] = points.moved(embeddings[span])
        self.norms = torch.empty_like(self.rows[:, 0])
        for span in self.pool.spans(n, 2 * 8 * dims):
            self.norms[span] = self.rows[span].square().sum(1)
        share = torch.ones_like(self.norms) if weights is None else weights.double()
        self.mass = share / self.pool.size

        labeled = torch.cat([self.rows[:0], *(block for (block,) in self.pool.blocks(self.rows[context]))])
        least = least_distance(labeled, self.pool) if spec.adaptive_bandwidth else None
        width = spec.bandwidth * points.scale if least is None else least
        self.width = max(width, tiny)
        _, largest = self.pool.best(self.norms)
        rounding = eps * (8 + 2 * dims)
        blur = rounding * 4 * float(largest) / self.width / self.width
        self._fast = blur <= BLUR
        self.error = (blur if self._fast else 0.0) + rounding
        self.error *= float(self.pool.sum(self.mass.sum()))

        #: Candidates that are looked at together at the most.
        self.many = at_once(self.pool.size, dims)
        farthest = 4 * float(largest) / self.width / self.width
        wrong = _Bounds.rounding(dims, farthest)
        self.bounds = _Bounds(self, wrong, farthest) if wrong <= COARSE else None
        self.covered = torch.zeros_like(self.norms)  # m
        for start in range(0, len(labeled), self.many):
            self.pool.sum(self.mass[:0].sum())  # where slices hear of a caller who has left
            self.cover(labeled[start : start + self.many])

    def cover(self, centres: Tensor) -> None:
        """Raises m by what centres (c, D) see."""
        for span in self._spans(len(centres)):
            seen = self._kernel(span, centres).amax(1)
            torch.maximum(self.covered[span], seen, out=self.covered[span])

    def gains(self, candidates: Tensor) -> Tensor:
        """What candidates (c, D), the same in all slices, would add, each: (c,), at least 0."""
        total = candidates.new_zeros(len(candidates))
        for span in self._spans(len(candidates)):
            rise = self._kernel(span, candidates).sub_(self.covered[span, None]).clamp_min_(0)
            total += self.mass[span] @ rise
        found: Tensor = self.pool.sum(total)
        return torch.where(found > self.error, found, 0.0)

    def losses(self, candidates: Tensor, before: Tensor) -> Tensor:
        """How far gains of candidates (c, D), the same in all slices, have fallen since m was `before` (n,): (c,)."""
        total = candidates.new_zeros(len(candidates))
        better = (self.covered > before).nonzero().squeeze(1)
        for span in self._spans(len(candidates), len(better)):
            rows = better[span]
            low, high = before[rows, None], self.covered[rows, None]
            total += self.mass[rows] @ self._kernel(rows, candidates).clamp_(low, high).sub_(low)
        found: Tensor = self.pool.sum(total)
        return found

    def _kernel(self, some: slice | Tensor, centres: Tensor) -> Tensor:
        """k(x, c) = exp(-|x - c|² / h²), (s, c), of some rows."""
        rows = self.rows[some]
        if self._fast:
            squared: Tensor = self.norms[some, None] + torch.linalg.vector_norm(centres, dim=1).square_()
            squared.addmm_(rows, centres.T, alpha=-2).div_(self.width**2)
            return squared.clamp_(0, FARTHEST).neg_().exp_()
        distances = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist").div_(self.width)
        return distances.clamp_max_(FARTHEST_ROOT).square_().neg_().exp_()

    def _spans(self, centres: int, rows: int | None = None) -> Iterator[slice]:
        """Spans of so many rows, of all by default."""
        dims = self.rows.shape[1]
        products = dims * centres // FAST_PRODUCTS + 8 * (dims + 4 * centres)
        rows = len(self.rows) if rows is None else rows
        return self.pool.spans(rows, products if self._fast else _by_differences(dims, centres))


class _Bounds:
    """What gains are at the most, and what they lose at the least, in single precision.

    rows: (n, D + 2), of which exponents 2 x.u/h² - |x|²/h² - |u|²/h² are products. These are wrong by `wrong` at the
    most, which is added or taken away: k is then bounded from above or below. m is rounded by less than that.
    """

    def __init__(self, coverage: Coverage, wrong: float, farthest: float) -> None:
        self._coverage, self._wrong, self._deep = coverage, wrong, farthest > FARTHEST_SINGLE
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

    def _kernel(self, rows: Tensor, theirs: Tensor) -> Tensor:
        exponents = rows[:, :COLUMNS] @ theirs[:, :COLUMNS].T
        for start in range(COLUMNS, rows.shape[1], COLUMNS):
            some = slice(start, start + COLUMNS)
            exponents.addmm_(rows[:, some], theirs[:, some].T)
        return (exponents.clamp_min_(-FARTHEST_SINGLE) if self._deep else exponents).exp_()

    def _weigh(self, rows: slice | Tensor, seen: Tensor, low: Tensor) -> Tensor:
        """The mass (c,) of what is seen (s, c) of some rows above `low` (s,), added up in double precision."""
        if self._even is not None:
            return (seen.sum(0, dtype=torch.float64) - low.sum(dtype=torch.float64)).mul_(self._even)
        mass = self._coverage.mass[rows]
        return mass @ seen.double() - mass @ low.double()

    def _spans(self, centres: int) -> Iterator[slice]:
        return self._coverage.pool.spans(len(self.rows), self._row_bytes(centres))

    def _row_bytes(self, centres: int) -> int:
        dims = self.rows.shape[1]
        return dims * centres // (2 * FAST_PRODUCTS) + 4 * (dims + 4 * centres)


def _turned(rows: Tensor, more: float) -> Tensor:
    """Rows (c, D + 2) of bounds so that their products with others are exponents, and `more` added to those."""
    return torch.cat([rows[:, :-2], rows[:, -1:], rows[:, -2:-1] + more], dim=1)


def _by_differences(dims: int, centres: int) -> int:
    """Bytes that a row's distances to centres take as long as."""
    return SLOW_BYTES * (8 + dims) * centres


def least_distance(rows: Tensor, pool: Shards) -> float | None:
    """The least distance above 0 between two of the rows (m, D), the same in all slices; None where there is none."""
    least = rows.new_full((), torch.inf)
    for start in range(0, len(rows), CENTRES):
        some = rows[start : start + CENTRES]
        for span in pool.spans(start + len(some), _by_differences(rows.shape[1], len(some))):
            found = torch.cdist(rows[span], some, compute_mode="donot_use_mm_for_euclid_dist")
            least = torch.minimum(least, torch.where(found > 0, found, torch.inf).amin())
    return float(least) if least < torch.inf else None


class _LazyGreedy:
    """Picks one row after the other.

    bounds: (n,), upper bounds of gains, those of rows that are up to date the gains themselves; of no meaning where a
    row may not be chosen.
    """

    def __init__(self, coverage: Coverage, choice: Choice) -> None:
        self._coverage, self._choice, self._pool = coverage, choice, coverage.pool
        n, device = len(coverage.rows), coverage.rows.device
        self.bounds = torch.zeros_like(coverage.covered)
        self._seen = torch.full((n,), -1, dtype=torch.int32, device=device)  # after how many picks a gain was computed
        self._made = 0
        self._numbers = torch.arange(self._pool.offset, self._pool.offset + n, device=device)
        if coverage.bounds is None:
            self._look_at_all()
        else:
            for numbers, rows in self._candidates(coverage.bounds.rows):
                self._set(self.bounds, numbers, coverage.bounds.gains(rows))
        # When bounds were lowered last: m and what they were (n,), and how wrong these are; candidates looked at since.
        self._before, self._gains = coverage.covered.clone(), self.bounds.clone()
        self._error, self._looks = coverage.error, 0

    def gains_from(self, covered: Tensor) -> Tensor:
        """The gains (n,) of the rows that may be chosen, where rows are covered so (n,)."""
        self._coverage.covered, found = covered, torch.zeros_like(self.bounds)
        for numbers, rows in self._candidates(self._coverage.rows):
            self._set(found, numbers, self._coverage.gains(rows))
        return found

    def run(self) -> tuple[Tensor, Tensor]:
        """Global rows (k,) and their gains (k,) when picked; fewer where the limits end the selection."""
        choice, coverage = self._choice, self._coverage
        rows, gains = [self._numbers[:0]], [self.bounds[:0]]
        while self._made < choice.k:
            self._pool.progress(self._made, choice.k)
            row, gain, pick = self._best()
            if choice.ends(gain):
                break
            if not gain > 0 and not choice.reopens:
                last, zeros = choice.walk(torch.zeros_like(self.bounds), choice.k - self._made)
                rows.append(last)
                gains.append(zeros)
                break
            choice.take(row)
            rows.append(row[None])
            gains.append(gain[None])
            self._made += 1
            if gain > 0:
                coverage.cover(pick[None])
        return torch.cat(rows), torch.cat(gains)

    def _candidates(self, x: Tensor, many: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Global rows (c,) that may be chosen, and what they have in x (n, ...) of all slices; `many` at a time."""
        begin, step = 0, many or self._coverage.many  # the global number of the block's first row
        for rows, allowed in self._pool.blocks(x, self._choice.allowed):
            at = allowed.nonzero().squeeze(1)
            for start in range(0, len(at), step):
                some = at[start : start + step]
                yield begin + some, rows[some]
            begin += len(rows)

    def _set(self, values: Tensor, numbers: Tensor, found: Tensor) -> None:
        """Writes what was found (c,) of global rows (c,) to the values (n,) of the rows here."""
        here, at = self._here(numbers)
        values[at] = found[here]

    def _here(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Which of global rows (c,) are rows here, (c,) bool, and which rows here those are."""
        at = numbers - self._pool.offset
        here = (at >= 0) & (at < len(self.bounds))
        return here, at[here]

    def _look(self, numbers: Tensor, rows: Tensor) -> None:
        """Computes the gains of global rows (c,), rows (c, D) of all slices."""
        gains = self._coverage.gains(rows)
        here, at = self._here(numbers)
        gains = gains[here]
        self.bounds[at] = gains
        # Nothing to gain is nothing to gain later.
        self._seen[at] = torch.where(gains > 0, self._made, self._choice.steps).to(torch.int32)

    def _look_at_all(self) -> None:
        for numbers, rows in self._candidates(self._coverage.rows):
            self._look(numbers, rows)

    def _has_lowered(self) -> bool:
        """Lowers bounds where enough candidates were looked at for that, and says so."""
        coverage, pool = self._coverage, self._pool
        better = int(pool.sum((coverage.covered > self._before).count_nonzero()))
        if better and EAGER * self._looks > better:
            self._lower(better)
            return True
        if not better and coverage.bounds is not None and EAGER * self._looks > pool.size:
            # They are as low as they get, and tell too little: what is left to gain is less than they are wrong by.
            coverage.bounds = None
            self._look_at_all()
            self._gains, self._looks = self.bounds.clone(), 0
            return True
        return False

    def _lower(self, better: int) -> None:
        """Takes from all bounds what rows that are covered better by now, so many, have taken from gains."""
        coverage, bounds = self._coverage, self._coverage.bounds
        x, losses = (coverage.rows, coverage.losses) if bounds is None else (bounds.rows, bounds.losses)
        for numbers, rows in self._candidates(x, max(coverage.many, PAIRS // better)):
            here, at = self._here(numbers)
            self._gains[at] -= losses(rows, self._before)[here]
        self._error += 2 * coverage.error
        found = (self._gains + self._error).clamp_min_(0)
        self.bounds = torch.where(self._seen < self._made, torch.minimum(found, self.bounds), self.bounds)
        self._before, self._looks = coverage.covered.clone(), 0

    def _best(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lowest of the free rows whose gains are as good as the best: global row, gain, (D,); gain -inf: none."""
        choice, pool, many = self._choice, self._pool, FEW
        while True:
            late = choice.free & (self._seen < self._made)
            known = torch.where(late, -torch.inf, self.bounds)
            _, best = choice.best(known)
            slack = TIE * best.clamp_min(0) + self._coverage.error
            count = min(many, self._coverage.many)
            found = pool.top(self.bounds, count, late & (self.bounds > best + slack), self._coverage.rows)
            if not len(found[0]):
                ties = torch.where(known >= best - slack, 0.0, -torch.inf)
                row, some, gain, pick = choice.best(ties, self.bounds, self._coverage.rows)
                # Before the lowest tie there may be another.
                before = late & (self.bounds >= best - slack) & (self._numbers < row)
                found = pool.top(-self._numbers.double(), count, before, self._coverage.rows)
                if not len(found[0]):
                    return row, gain + some, pick
            elif self._has_lowered():
                continue
            self._look(found[0], found[2])
            self._looks += len(found[0])
            many *= 2
