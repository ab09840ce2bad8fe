"""Farthest-first traversal: again and again the row farthest from all centres, in exact order.

Requirements that the design meets:

- Picks are those of exact arithmetic. Fast distances have known errors; rows whose order these can't tell are compared
  by direct differences in float64, and exact ties go to the lowest row.
- All rows are read once for many picks. The distance to the nearest centre only falls, so that one which knows nothing
  of the last picks is an upper bound: while the farthest row of the frontier, the rows that were farthest when all were
  read, is farther than that bound of every other row, it is the farthest of all. Then all rows meet the new centres in
  one matrix product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.distances import Points

#: Rows of every slice that stand in the frontier; and how many may be the farthest, as far as fast distances can tell,
#: for it to last: a crowd is looked at closely as a whole, every time.
FRONTIER, CROWD = 256, 1024


class FarthestFirst:
    """A traversal of the rows of `points`. `choice` says which rows may be picked, and is told of the picks."""

    def __init__(self, points: Points, choice: Choice) -> None:
        self._points, self._choice = points, choice
        n, device = len(points.embeddings), points.embeddings.device
        self._nearest = torch.full((n,), math.inf, dtype=points.work.dtype, device=device)  # squared, fast
        self._centres: list[Tensor] = []  # (m, D) each, rows as given
        # The exact distance of rows that were looked at closely, to the first `known` of these blocks.
        self._distance = torch.full((n,), math.inf, dtype=torch.float64, device=device)
        self._known = torch.zeros(n, dtype=torch.int32, device=device)

    def add(self, centres: Tensor) -> None:
        """Rows (m, D), as given, that count as centres: labelled, or picked otherwise. The same in all slices."""
        if len(centres):
            self._centres.append(centres)
            self._points.update_nearest(self._nearest, centres)

    def add_rows(self, rows: Tensor) -> None:
        """The same for the rows (r,) of this slice, and those that the other slices give."""
        for (block,) in self._points.pool.blocks(self._points.embeddings[rows]):
            self.add(block)

    def add_picks(self, rows: Tensor) -> None:
        """The same for global rows (m,)."""
        here = rows - self._points.pool.offset
        self.add_rows(here[(here >= 0) & (here < len(self._nearest))])

    def pick(self, count: int) -> tuple[Tensor, Tensor]:
        """Takes `count` rows; where there is no centre, the one nearest to the mean of all rows first.

        Returns global rows (count,) and their distances (count,) to the nearest centre when picked, or to the mean,
        float64; fewer where the limits end the selection. Once every row that is left repeats a centre, they come in
        their own order.
        """
        choice, embeddings = self._choice, self._points.embeddings
        rows = torch.empty(count, dtype=torch.int64, device=embeddings.device)
        scores = torch.empty(count, dtype=torch.float64, device=embeddings.device)
        picks = embeddings.new_empty(count, embeddings.shape[1])
        made, told = 0, 0  # told: picks that all rows have met
        if not self._centres:
            row, score, pick = choice.best(self._points.to_mean().neg_(), embeddings)
            if choice.ends(score):
                return rows[:0], scores[:0]
            rows[0], scores[0], picks[0], made = row, -score, pick, 1
            choice.take(row)
        frontier: _Frontier | None = None
        while made < count:
            self._points.pool.progress(made, count)
            if frontier is None:
                self.add(picks[told:made])
                frontier, told = self._frontier(), made
            row, score, pick = frontier.best(choice.free)
            if frontier.is_stale(score):
                frontier = None
                continue
            if choice.ends(score):
                break
            if not score > 0 and not choice.reopens:
                last, zeros = choice.walk(torch.zeros_like(self._distance), count - made)
                rows[made : made + len(last)], scores[made : made + len(last)] = last, zeros
                made += len(last)
                break
            rows[made], scores[made], picks[made], made = row, score, pick, made + 1
            choice.take(row)
            frontier = frontier.after(pick) if frontier.lasts and not choice.reopens else None
        return rows[:made], scores[:made] / self._points.scale

    def _frontier(self) -> _Frontier:
        """Made of the free rows that are farthest from all centres so far."""
        points, free, minus = self._points, self._choice.free, -torch.inf
        error = points.error_bound(self._nearest)
        lower = torch.where(free, self._nearest - error, minus)
        upper = torch.where(free, self._nearest + error, minus)
        _, least = points.pool.best(lower)
        rows = (free & (upper >= least)).nonzero().squeeze(1)  # no other row can be the farthest now
        lasts = int(points.pool.sum(free.new_tensor(len(rows), dtype=torch.int64))) <= CROWD
        bar = lower.new_tensor(minus)
        if lasts:
            most = upper.topk(min(FRONTIER, len(upper))).indices
            rows = torch.unique(torch.cat([rows, most]))  # ascending; never none, though not all may be free
            _, bar = points.pool.best(upper.index_fill(0, rows, minus))
        bounds = (x.double().clamp_min(0).sqrt() for x in (lower[rows], upper[rows], bar))
        return _Frontier(self, rows, *bounds, lasts=lasts)

    def exact(self, rows: Tensor) -> Tensor:
        """The distances (r,) of rows (r,) of this slice to all centres so far, by direct differences."""
        behind = self._known[rows]
        groups = torch.unique(behind.cpu()).tolist()  # on the host, so that the device is waited for once
        for seen in groups:  # so that no pair is computed twice
            late = rows if len(groups) == 1 else rows[behind == seen]
            found = self._points.direct(late, *self._centres[seen:])
            self._distance[late] = torch.minimum(self._distance[late], found)
        self._known.index_fill_(0, rows, len(self._centres))
        return self._distance[rows]

    @property
    def points(self) -> Points:
        """The rows that it goes through."""
        return self._points

    @property
    def centres(self) -> tuple[Tensor, ...]:
        """All centres that were added, (m, D) each."""
        return tuple(self._centres)


class _Frontier:
    """Rows (t,) of this slice that may be the farthest, for as long as the farthest of them is farther than `bar`.

    lower, upper: (t,), between what their distances are. bar: (), how far the other rows of all slices are at the most.
    lasts: whether it may be asked again after a pick.
    """

    def __init__(
        self, traversal: FarthestFirst, rows: Tensor, lower: Tensor, upper: Tensor, bar: Tensor, *, lasts: bool
    ) -> None:
        self._traversal, self._rows, self._lower, self._upper = traversal, rows, lower, upper
        self._bar, self.lasts, self._used = bar, lasts, False
        self._later = torch.full_like(lower, torch.inf)  # (t,), exact distances to the centres since then
        points = traversal.points
        self._pool = points.pool
        self._given = points.embeddings[rows] if lasts else points.embeddings  # (t, D)
        self._near = points.exact(self._given) if lasts else None

    def best(self, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The farthest of the free rows (n,) of all slices, ties to the lowest: global row, exact distance, (D,)."""
        here = free[self._rows]
        lower = torch.where(here, torch.minimum(self._lower, self._later), -torch.inf)
        _, least = self._pool.best(lower)
        leaders = (here & (torch.minimum(self._upper, self._later) >= least)).nonzero().squeeze(1)
        unknown = leaders[self._lower[leaders] < self._upper[leaders]]
        exact = self._traversal.exact(self._rows[unknown])
        self._lower[unknown], self._upper[unknown] = exact, exact
        found = torch.minimum(self._lower[leaders], self._later[leaders])
        if self.lasts:
            scores = torch.full_like(lower, -torch.inf).index_copy_(0, leaders, found)
            _, score, row, pick = self._pool.best(scores, self._rows + self._pool.offset, self._given)
            return row, score, pick
        scores = torch.full((len(free),), -torch.inf, dtype=lower.dtype, device=free.device)
        row, score, pick = self._pool.best(scores.index_copy_(0, self._rows[leaders], found), self._given)
        return row, score, pick

    def is_stale(self, score: Tensor) -> bool:
        """Whether another row may be as far as the best here, of that distance ()."""
        return self._used and not bool(score > self._bar)

    def after(self, pick: Tensor) -> _Frontier:
        """Itself once the row (D,) is a centre."""
        assert self._near is not None  # what does not last is not asked
        centre = self._traversal.points.exact(pick[None])
        # As Points.direct does, bit by bit, so that exact ties stay ties.
        distance = torch.cdist(self._near, centre, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        self._later, self._used = torch.minimum(self._later, distance), True
        return self
