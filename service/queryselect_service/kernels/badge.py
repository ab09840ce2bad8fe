"""BADGE: batch active learning by diverse gradient embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.distances import Points, copy_bytes, power_of_two, unit_
from queryselect_service.maths.farthest import farthest_rows
from queryselect_service.maths.noise import uniform
from queryselect_service.maths.predictions import Predictions
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, Task, strategy

#: Picks that all rows meet at once at the latest, and rows that are proposed for a pick before they have to.
TOGETHER, PROPOSALS = 128, 16
#: Bytes per entry of a row that work on float64 rows touches, four times over: shorter spans stay in the cache.
BYTES = 128


@dataclass(frozen=True)
class Badge(Spec):
    """Its parameters."""

    normalize: bool = parameter(False, "Whether every embedding is scaled to unit Euclidean length first")


def _memory(sizes: Sizes, spec: Badge) -> int:
    """Numbers per row, picks, spans of float64 rows; and a copy of half types, or of unit rows, where gradients end."""
    wide = sizes.D + sizes.C
    spans = min(SPAN_BYTES // 4, 24 * sizes.N * (wide + TOGETHER)) + 16 * TOGETHER * wide
    copy = copy_bytes(sizes.D, sizes.item, normalize=spec.normalize)
    return sizes.N * (64 + copy) + spans + sizes.k * (sizes.D * sizes.item + 32)


@strategy(
    Badge,
    kind=ScoreKind.DISTANCE,
    cost="O(N (D + C) k) time, O(N) memory",
    memory=_memory,
    work=lambda sizes: float(sizes.N * (sizes.D + sizes.C) * (4 + sizes.k)),
    citation="Ash, Zhang, Krishnamurthy, Langford and Agarwal, Deep batch active learning by diverse, uncertain "
    "gradient lower bounds (ICLR 2020), arXiv:1906.03671, algorithm 1",
    tasks=(Task.MULTICLASS,),
    seeded=True,
    pool_scores=False,
)
def badge(
    embeddings: Annotated[Tensor, "N D"],
    probabilities: Annotated[Predictions, "N C"],
    *,
    choice: Choice,
    spec: Badge = Badge(),
    context: Tensor,
    seed: int,
    pool: Shards,
) -> Selection:
    """Draws rows whose gradients, for the likeliest label, are long and apart: the start of k-means++ on gradients.

        g(x) = (p - e_y) ⊗ h,  y = argmax p;   first argmax |g|, then x with probability D²(x) / sum D²,
        D²(x) = min over picks c of |g(x) - g(c)|² = |a|²|h|² + |a_c|²|h_c|² - 2 (a·a_c)(h·h_c),   a = p - e_y

    embeddings: (n, D), h. probabilities: (n, C). choice: k picks among (n,) rows. Scores are D² at the draw; that of
    the first pick is |g|². What is labelled plays no part, as in the paper. Gradients are never written out: a product
    of a's and one of h's are enough.

    D² only falls, so what it was is an upper bound, and so is (|g(x)| + |g(c)|)² for any pick: rows are proposed in
    proportion to such a bound and accepted with probability D² over it, which draws from D² itself (von Neumann's
    rejection), and all rows meet many picks at once, if ever. Where no gradient tells the remaining rows apart, as when
    predictions are saturated, the others are chosen farthest-first by embedding, with a warning.

    >>> h = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    >>> p = Predictions(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]))
    >>> from queryselect_service.shards import Whole
    >>> choice = Choice(1, torch.ones(3, dtype=torch.bool), Whole(3))
    >>> badge(h, p, choice=choice, context=torch.tensor([], dtype=torch.int64), seed=0, pool=Whole(3)).indices
    tensor([1])
    """
    gradients = _Gradients(embeddings, probabilities, pool, normalize=spec.normalize)
    rows, scores, left = [context[:0]], [gradients.lengths[:0]], choice.k
    row, score = choice.best(gradients.lengths)
    if score > 0 and not choice.ends(score):
        draws = _Draws(gradients, choice, seed)
        while score > 0:
            pool.progress(choice.k - left, choice.k)
            choice.take(row)
            rows.append(row[None])
            scores.append(score[None] / gradients.scale / gradients.scale)
            left -= 1
            if not left:
                break
            row, score = draws.after(row)
    notices: tuple[Notice, ...] = ()
    if left:
        points = Points(embeddings, pool, normalize=spec.normalize)
        others, distances = farthest_rows(points, choice, context, torch.cat(rows))
        if len(others):
            message = f"{len(others)} picks are farthest-first by embedding, since no gradient tells the rows apart"
            notices = (Notice(NoticeCode.SATURATED, message, others),)
        rows, scores = [*rows, others], [*scores, distances]
    return Selection(torch.cat(rows), torch.cat(scores), notices=notices)


class _Gradients:
    """The gradients a ⊗ h of all rows here, by their factors. lengths: (n,), |g|², times scale², a power of two."""

    def __init__(self, embeddings: Tensor, probabilities: Predictions, pool: Shards, *, normalize: bool) -> None:
        self._embeddings, self._probabilities, self._normalize, self.pool = embeddings, probabilities, normalize, pool
        self.scale = 1.0 if normalize else power_of_two(embeddings, pool, torch.float64)
        n, dims, classes = *embeddings.shape, probabilities.shape[1]
        self.row_bytes = BYTES * (dims + classes)
        self.rounding = torch.finfo(torch.float64).eps * (8 + dims + classes)
        self.lengths = torch.empty(n, dtype=torch.float64, device=embeddings.device)
        for span in pool.spans(n, self.row_bytes):
            a, h = self.factors(span)
            self.lengths[span] = a.square().sum(1) * h.square().sum(1)

    def factors(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """A (r, C) and h (r, D) of rows of this slice, float64."""
        p = self._probabilities[rows]
        likeliest = p.argmax(1, keepdim=True)
        rest = p.scatter(1, likeliest, 0.0)
        a = rest.scatter(1, likeliest, -rest.sum(1, keepdim=True))  # p_y - 1 with all its digits
        h = self._embeddings[rows].to(torch.float64, copy=True)
        return a, unit_(h) if self._normalize else h.mul_(self.scale)

    def squared(self, a: Tensor, h: Tensor, lengths: Tensor, picks: _Picks) -> Tensor:
        """The D² (r,) of rows by their factors to the nearest pick; 0 where it is no more than its rounding."""
        both = lengths[:, None] + picks.lengths  # (r, m)
        products = (a @ picks.a.T).mul_(h @ picks.h.T)
        # What rounding may have added is taken off, so that a row like a pick has nothing left.
        return both.mul_(1 - self.rounding).sub_(products, alpha=2).amin(1).clamp_min_(0)


@dataclass(frozen=True)
class _Picks:
    """Factors and squared lengths of picks, of whatever slice: (m, C), (m, D), (m,)."""

    a: Tensor
    h: Tensor
    lengths: Tensor

    def and_these(self, other: _Picks) -> _Picks:
        """Both."""
        return _Picks(
            *(torch.cat(pair) for pair in ((self.a, other.a), (self.h, other.h), (self.lengths, other.lengths)))
        )


class _Draws:
    """Draws of rows by D², by rejection."""

    def __init__(self, gradients: _Gradients, choice: Choice, seed: int) -> None:
        self._gradients, self._choice, self._pool, self._seed = gradients, choice, gradients.pool, seed
        self._nearest = torch.full_like(gradients.lengths, torch.inf)  # (n,), D² at the most to picks all have met
        self._new: _Picks | None = None  # those that only proposals have met
        # What rows are proposed by: D² as it was, its sums up to every row, what other slices have before, and in all.
        self._weights = self._sums = gradients.lengths
        self._before = self._total = self._sums.new_zeros(())
        self._shortest = self._sums.new_full((1,), torch.inf)  # |g|² of the pick of the shortest gradient
        self._step, self._ready = 0, False

    def after(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """A global row () drawn once `row` () is picked, and its D² (); that is 0 where no free row has any."""
        pick = self._pick(row)
        if pick.lengths < self._shortest:
            # By their lengths alone gradients are no farther from it than this, which is told without meeting it.
            far = (self._gradients.lengths.sqrt() + pick.lengths.sqrt()).square_()
            self._nearest, self._shortest, self._ready = torch.minimum(self._nearest, far), pick.lengths, False
        self._new = pick if self._new is None else self._new.and_these(pick)
        self._step += 1
        if not self._ready:
            self._weigh(self._choice.allowed)
        # First by all rows that may be chosen at all: limits that do not bind must change no draw.
        for attempt, mask in enumerate((None, self._choice.allowed, self._choice.free)):
            if mask is None and len(self._new.lengths) > TOGETHER:
                continue
            if mask is not None:
                self._meet()
                self._weigh(mask)
            drawn = self._propose(PROPOSALS * attempt)
            if drawn is not None:
                self._ready = attempt < 2  # rows that are not free now may be so later
                return drawn
        return row, torch.zeros_like(self._total)

    def _pick(self, row: Tensor) -> _Picks:
        """A global row () as a pick."""
        g, at = self._gradients, row[None] - self._pool.offset
        here = at[(at >= 0) & (at < len(g.lengths))]
        a, h = g.factors(here)
        return _Picks(*(self._pool.sum(x.sum(0, keepdim=True)) for x in (a, h, g.lengths[here])))

    def _meet(self) -> None:
        """All rows meet the new picks."""
        g, new = self._gradients, self._new
        if new is not None:
            for span in self._pool.spans(len(g.lengths), g.row_bytes + BYTES * len(new.lengths)):
                found = g.squared(*g.factors(span), g.lengths[span], new)
                self._nearest[span] = torch.minimum(self._nearest[span], found)
        self._new = None

    def _weigh(self, allowed: Tensor) -> None:
        """Rows are proposed by D² as it was when all rows met picks last, where they are allowed (n,)."""
        self._ready = True
        self._weights = torch.where(allowed, self._nearest, 0.0)
        self._sums = self._weights.cumsum(0)
        mine = torch.stack([self._sums.new_tensor(self._pool.offset), self._sums[-1:].sum()])
        offsets, totals = torch.cat([block for (block,) in self._pool.blocks(mine[None])]).unbind(1)
        self._before, self._total = totals[offsets < self._pool.offset].sum(), totals.sum()

    def _propose(self, first: int) -> tuple[Tensor, Tensor] | None:
        """Of the rows that are proposed, from a number on, the first that is accepted, and its D²; None for none."""
        g, n, pool = self._gradients, len(self._weights), self._pool
        numbers = torch.arange(2 * first, 2 * (first + PROPOSALS), device=self._weights.device)
        where, whether = uniform(self._seed, numbers, self._step).chunk(2)
        told = where.new_zeros(4, PROPOSALS)
        if n:
            target = where * self._total - self._before
            at = torch.searchsorted(self._sums, target, right=True).clamp_(max=n - 1)
            weight = self._weights[at]
            true = weight
            if self._new is not None:
                true = torch.minimum(weight, g.squared(*g.factors(at), g.lengths[at], self._new))
            mine = (target >= 0) & (target < self._sums[-1])
            told = torch.stack([at + pool.offset, weight, true, self._choice.free[at]]).mul_(mine)
        row, weight, true, free = pool.sum(told)
        accepted = ((free > 0) & (whether * weight < true)).nonzero().squeeze(1)
        return (row[accepted[0]].long(), true[accepted[0]]) if len(accepted) else None
