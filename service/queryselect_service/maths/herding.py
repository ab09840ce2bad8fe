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
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.distances import CENTRES, Points, at_once, copy_bytes
from queryselect_service.selection import Notice, NoticeCode, Selection
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Herding
from queryselect_service.strategy import Sizes

#: Candidates whose gains are computed at once at first in a step, doubled as more are needed.
FEW = 16
#: All bounds are lowered once so many times the candidates looked at are more than the rows covered better since.
EAGER = 8
#: Multiply-adds of a matrix product that take as long as touching a byte, and bytes that one by differences takes.
FAST_PRODUCTS, SLOW_BYTES = 4, 4
#: How wrong exponents of the kernel may be where distances are computed by their expansion; else by differences.
BLUR = 1e-10
#: Gains that differ by less than this part of the best are ties.
TIE = 1e-10
#: Where exponents end, and their roots: beyond, the exponential is no normal number, which takes ten times as long.
FARTHEST, FARTHEST_ROOT = 676.0, 26.0


def memory(sizes: Sizes, spec: Herding) -> int:
    """A float64 copy of the rows, numbers per row, labelled rows, spans, and what Points makes, or few candidates."""
    wide = max(4, sizes.item)
    points = sizes.N * (copy_bytes(sizes.D, sizes.item, normalize=spec.normalize) + 2 * wide)
    few = 2 * 8 * sizes.D * min(sizes.N, at_once(sizes.N, sizes.D))  # candidates that are looked at, taken from blocks
    spans = min(SPAN_BYTES, 3 * 8 * sizes.N * (sizes.D + CENTRES))
    return sizes.N * (8 * sizes.D + 112) + 16 * sizes.L * sizes.D + spans + max(points, few)


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
    greedy = _LazyGreedy(coverage, choice)
    first = greedy.bounds.clone()
    indices, scores = greedy.run()
    idle = indices[scores <= 0]
    if len(idle):
        message = f"{len(idle)} picks add nothing: every row that counts is covered as well as it can be"
        notices = (*notices, Notice(NoticeCode.COVERED, message, idle))
    return Selection(indices, scores, lambda: first, notices)


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
        self._norms = torch.empty_like(self.rows[:, 0])
        for span in self.pool.spans(n, 2 * 8 * dims):
            self._norms[span] = self.rows[span].square().sum(1)
        share = torch.ones_like(self._norms) if weights is None else weights.double()
        self._mass = share / self.pool.size

        labeled = torch.cat([self.rows[:0], *(block for (block,) in self.pool.blocks(self.rows[context]))])
        least = least_distance(labeled, self.pool) if spec.adaptive_bandwidth else None
        width = spec.bandwidth * points.scale if least is None else least
        self._width = max(width, tiny)
        _, largest = self.pool.best(self._norms)
        rounding = eps * (8 + 2 * dims)
        blur = rounding * 4 * float(largest) / self._width / self._width
        self._fast = blur <= BLUR
        self.error = (blur if self._fast else 0.0) + rounding
        self.error *= float(self.pool.sum(self._mass.sum()))

        #: Candidates that are looked at together at the most.
        self.many = at_once(self.pool.size, dims)
        self.covered = torch.zeros_like(self._norms)  # m
        for start in range(0, len(labeled), self.many):
            self.pool.sum(self._mass[:0].sum())  # where slices hear of a caller who has left
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
            total += self._mass[span] @ rise
        found: Tensor = self.pool.sum(total)
        return torch.where(found > self.error, found, 0.0)

    def losses(self, candidates: Tensor, before: Tensor) -> Tensor:
        """How far gains of candidates (c, D), the same in all slices, have fallen since m was `before` (n,): (c,)."""
        total = candidates.new_zeros(len(candidates))
        better = (self.covered > before).nonzero().squeeze(1)
        for span in self._spans(len(candidates), len(better)):
            rows = better[span]
            low, high = before[rows, None], self.covered[rows, None]
            total += self._mass[rows] @ self._kernel(rows, candidates).clamp_(low, high).sub_(low)
        found: Tensor = self.pool.sum(total)
        return found

    def _kernel(self, some: slice | Tensor, centres: Tensor) -> Tensor:
        """k(x, c) = exp(-|x - c|² / h²), (s, c), of some rows."""
        rows = self.rows[some]
        if self._fast:
            squared: Tensor = self._norms[some, None] + torch.linalg.vector_norm(centres, dim=1).square_()
            squared.addmm_(rows, centres.T, alpha=-2).div_(self._width**2)
            return squared.clamp_(0, FARTHEST).neg_().exp_()
        distances = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist").div_(self._width)
        return distances.clamp_max_(FARTHEST_ROOT).square_().neg_().exp_()

    def _spans(self, centres: int, rows: int | None = None) -> Iterator[slice]:
        """Spans of so many rows, of all by default."""
        dims = self.rows.shape[1]
        products = dims * centres // FAST_PRODUCTS + 8 * (dims + 4 * centres)
        rows = len(self.rows) if rows is None else rows
        return self.pool.spans(rows, products if self._fast else _by_differences(dims, centres))


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
        self._seen = torch.zeros(n, dtype=torch.int32, device=device)  # after how many picks a gain was computed
        self._made = 0
        self._numbers = torch.arange(self._pool.offset, self._pool.offset + n, device=device)
        for numbers, rows in self._candidates():
            self._look(numbers, rows)
        # When bounds were lowered last: m and the gains (n,), and how wrong these are; candidates looked at since.
        self._before, self._gains = coverage.covered.clone(), self.bounds.clone()
        self._error, self._looks = coverage.error, 0

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

    def _candidates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Global rows (c,) that may be chosen, rows (c, D) of all slices, a few at a time."""
        begin = 0  # the global number of the block's first row
        for rows, allowed in self._pool.blocks(self._coverage.rows, self._choice.allowed):
            at = allowed.nonzero().squeeze(1)
            for start in range(0, len(at), self._coverage.many):
                some = at[start : start + self._coverage.many]
                yield begin + some, rows[some]
            begin += len(rows)

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

    def _lower(self) -> None:
        """Takes from all bounds what rows that are covered better by now have taken from gains."""
        for numbers, rows in self._candidates():
            lost = self._coverage.losses(rows, self._before)
            here, at = self._here(numbers)
            self._gains[at] -= lost[here]
        self._error += 2 * self._coverage.error
        self.bounds = torch.where(self._seen < self._made, (self._gains + self._error).clamp_min_(0), self.bounds)
        self._before, self._looks = self._coverage.covered.clone(), 0

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
            elif EAGER * self._looks > int(pool.sum((self._coverage.covered > self._before).count_nonzero())) > 0:
                self._lower()
                continue
            self._look(found[0], found[2])
            self._looks += len(found[0])
            many *= 2
