"""Greedy maximisation of generalised coverage: how well a kernel sees every row from those that are labelled or chosen.

Requirements that the design meets:

- Picks are those of the plain greedy, computed in float64. Gains that differ by no more than rounding are ties, and go
  to the lowest row.
- No matrix of all pairs: kernels are made for a few candidates at a time, a span of rows at a time.
- A gain only falls while the batch grows (the objective is submodular), so that one from before is an upper bound: a
  candidate is looked at again only where its bound reaches the best (Minoux, Accelerated greedy algorithms for
  maximizing submodular set functions, 1978).
- A pick changes gains by the rows that it covers better, and by no others. What those take is subtracted from all
  bounds: at once where it is kept which candidates see a row better than it is covered, a part of about 1 in m + 1 of
  all pairs with m rows labelled and chosen; else once more candidates would have to be looked at than that is worth.
- Bounds are computed in single precision (`herding_bounds.py`), gains in double: those alone decide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.distances import CENTRES, Points, at_once, copy_bytes
from queryselect_service.maths.herding_bounds import (
    FAST_PRODUCTS,
    PAIR_BYTES,
    Bounds,
    Seers,
    enough_covered,
    most_pairs,
)
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
#: Bytes that a distance by differences takes.
SLOW_BYTES = 4
#: How wrong exponents may be in single precision; beyond, bounds are gains, in double precision.
COARSE = 1e-2
#: How wrong exponents of the kernel may be where distances are computed by their expansion; else by differences.
BLUR = 1e-10
#: The largest bandwidth in units of the largest entry: under any above, all rows see each other whole.
WIDEST = 2.0**500
#: Gains that differ by less than this part of the best are ties.
TIE = 1e-10
#: Where exponents end, and their roots: beyond, the exponential is no normal number, which takes ten times as long.
FARTHEST, FARTHEST_ROOT = 676.0, 26.0


def memory(sizes: Sizes, spec: Herding) -> int:
    """Copies of the rows in two types, numbers per row, labelled rows, spans; what Points makes, or pairs."""
    wide = max(4, sizes.item)
    points = sizes.N * (copy_bytes(sizes.D, sizes.item, normalize=spec.normalize) + 2 * wide)
    few = 2 * 8 * sizes.D * min(sizes.N, at_once(sizes.N, sizes.D))  # candidates that are looked at, taken from blocks
    spans = min(SPAN_BYTES, 3 * 8 * sizes.N * (sizes.D + CENTRES))
    pairs = PAIR_BYTES * min(sizes.N * sizes.N, most_pairs(sizes.N, sizes.D))
    if sizes.L + sizes.k < enough_covered(sizes.N, sizes.D):
        pairs = 0
    return sizes.N * (12 * sizes.D + 136) + 16 * sizes.L * sizes.D + spans + max(points, few + pairs)


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

    rows: (n, D) float64. error: what gains are wrong by at the most, a number; but for what adding up rounds, a part of
    a gain that is far below a tie.
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
        self.labeled = len(labeled)
        least = least_distance(labeled, self.pool) if spec.adaptive_bandwidth else None
        width = spec.bandwidth * points.scale if least is None else least
        self.width = min(max(width, tiny), WIDEST)
        _, largest = self.pool.best(self.norms)
        rounding = eps * (8 + 2 * dims)
        blur = rounding * 4 * float(largest) / self.width / self.width
        self._fast = blur <= BLUR
        self.error = (blur if self._fast else 0.0) + rounding
        self.error *= float(self.pool.sum(self.mass.sum()))

        #: Candidates that are looked at together at the most.
        self.many = at_once(self.pool.size, dims)
        farthest = 4 * float(largest) / self.width / self.width
        wrong = Bounds.rounding(dims, farthest)
        self.bounds = Bounds(self, wrong, farthest) if wrong <= COARSE else None
        self.covered = torch.zeros_like(self.norms)  # m
        for start in range(0, len(labeled), self.many):
            self.pool.sum(self.mass[:0].sum())  # where slices hear of a caller who has left
            self.cover(labeled[start : start + self.many])

    def cover(self, centres: Tensor) -> None:
        """Raises m by what centres (c, D) see."""
        for span in self._spans(len(centres)):
            seen = self._kernel(span, centres).amax(1)
            torch.maximum(self.covered[span], seen, out=self.covered[span])

    def gains(self, candidates: Tensor, seen: Tensor | None = None) -> Tensor:
        """What candidates (c, D), the same in all slices, would add, each: (c,), at least 0.

        seen: (n, c) to write to how well they see the rows here.
        """
        total = candidates.new_zeros(len(candidates))
        for span in self._spans(len(candidates)):
            kernel = self._kernel(span, candidates)
            if seen is not None:
                seen[span] = kernel
            total += self.mass[span] @ kernel.sub_(self.covered[span, None]).clamp_min_(0)
        found: Tensor = self.pool.sum(total)
        return torch.where(found > self.error, found, 0.0)

    def rises(self, rows: Tensor, seen: Tensor) -> Tensor:
        """What some rows (p,) here add to the gains (p,) of candidates that see them so well (p,)."""
        return seen.double().sub_(self.covered[rows]).clamp_min_(0).mul_(self.mass[rows])

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
        self._seers: Seers | None = None
        # As many rows labelled and chosen, as far as can be told beforehand, leave few enough pairs to keep.
        self._enough = enough_covered(self._pool.size, coverage.rows.shape[1])
        # Of the rows looked at since the last pick the one of the highest gain, that gain, and how it sees rows (n,).
        self._leader: tuple[Tensor, Tensor, Tensor] | None = None
        self._numbers = torch.arange(self._pool.offset, self._pool.offset + n, device=device)
        if coverage.bounds is None:
            self._look_at_all()
        elif self._can_list():
            self.bounds, self._seers = coverage.bounds.by_pairs(choice.allowed)
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
            if gain > 0 and self._leader is not None and self._leader[0] == row:
                torch.maximum(coverage.covered, self._leader[2], out=coverage.covered)
            elif gain > 0:
                coverage.cover(pick[None])
            self._leader = None
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
        seen = self._numbers.new_empty(len(self.bounds), len(rows), dtype=torch.float64) if len(rows) <= FEW else None
        gains = self._coverage.gains(rows, seen)
        if seen is not None:
            most, first = gains.max(0)
            if self._leader is None or most > self._leader[1]:
                self._leader = numbers[first], most, seen[:, first]
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
        if better and self._seers is not None:
            self._gains -= self._seers.losses(self._before)
            self._relax()
            return True
        if better and EAGER * self._looks > better:
            if coverage.bounds is not None and self._can_list():
                self._gains, self._seers = coverage.bounds.by_pairs(self._choice.allowed)
                self._error = 0.0
            else:
                self._lower(better)
            self._relax()
            return True
        if not better and coverage.bounds is not None and EAGER * self._looks > pool.size:
            # They are as low as they get, and tell too little: what is left to gain is less than they are wrong by.
            coverage.bounds = self._seers = None
            self._look_at_all()
            self._gains, self._looks = self.bounds.clone(), 0
            return True
        return False

    def _can_list(self) -> bool:
        """Whether it is worth to find out who sees whom better than m; asked again only with twice as many rows."""
        known, left = self._coverage.labeled + self._made, self._choice.k - self._made
        if known < self._enough or 2 * left < self._made:
            return False
        self._enough = 2 * known + 1
        return True

    def _lower(self, better: int) -> None:
        """Takes from all bounds what rows that are covered better by now, so many, have taken from gains."""
        coverage, bounds = self._coverage, self._coverage.bounds
        x, losses = (coverage.rows, coverage.losses) if bounds is None else (bounds.rows, bounds.losses)
        for numbers, rows in self._candidates(x, max(coverage.many, PAIRS // better)):
            here, at = self._here(numbers)
            self._gains[at] -= losses(rows, self._before)[here]

    def _relax(self) -> None:
        """Sets bounds to gains that are as they were for the m of now."""
        coverage = self._coverage
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
