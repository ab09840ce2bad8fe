"""The rows that a selection may still choose, under the request's quotas, cost budget and least gain.

Requirements that the design meets:

- A kernel asks for the best row and takes it, or walks down its ranking. What may not be chosen never comes up.
- Without limits this is a mask of free rows and nothing else: no number is asked of the device.
- Slices decide alike: one sum of a few numbers tells all of them what a pick counts for and costs.
- Minima bind late: a quota asks for its own rows once no more picks are left than it still wants. A minimum that has
  too few candidates is lowered at the start; one whose rows have run out since gives way to other rows.
- A walk is quick however many rows it skips: batches of growing length, counted on the host, and between two batches
  everything that is forbidden by then drops out at once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import repeat

import torch
from torch import Tensor

from queryselect_service.quotas import Quota, Tally
from queryselect_service.selection import Notice, NoticeCode, StopReason
from queryselect_service.shards import Shards

#: Rows that a walk looks at between two checks.
WALK_ROWS = 1 << 14
#: The part of all rows that a walk asks for at once at the most, where it is more than the picks wanted.
WALK_PART = 16
#: Bytes per row that looking at costs touches.
COST_BYTES = 32
#: Minima that one warning spells out.
SPELLED_OUT = 5


@dataclass(frozen=True)
class Limits:
    """What a request asks of the picks together. By default nothing.

    values: for each quota the group of every row, (n,) int64, -1 for none. costs: (n,) float64, at least 0. max_cost:
    the most that the picks may cost together. min_gain: the gain below which nothing is chosen.
    """

    quotas: tuple[Quota, ...] = ()
    values: tuple[Tensor, ...] = ()
    costs: Tensor | None = None
    max_cost: float | None = None
    min_gain: float | None = None

    @property
    def bind(self) -> bool:
        """Whether they may end a selection early, or change it."""
        return bool(self.quotas) or self.max_cost is not None or self.min_gain is not None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Limits:
        """The same with `change` applied to whatever has an entry per row."""
        costs = None if self.costs is None else change(self.costs)
        return dataclasses.replace(self, values=tuple(map(change, self.values)), costs=costs)


class Choice:
    """Which rows a selection may choose next, and what it has chosen. Made once per selection.

    k: the picks wanted. steps: the picks that may be made, k or more. limited: whether a limit may end it before.
    free: (n,) bool, the rows of this place that may be chosen next; `take` changes or replaces it, so read it anew, and
    never write it. allowed: (n,) bool, the rows that may be chosen at all.
    """

    def __init__(self, k: int, candidates: Tensor, pool: Shards, limits: Limits | None = None) -> None:
        """candidates: (n,) bool, at least k of them over all slices; left as they are."""
        limits = limits or Limits()
        self.k, self.steps, self.limited = k, k, limits.bind
        self._pool, self._limits, self._candidates = pool, limits, candidates
        self._tallies = [Tally(*each, pool) for each in zip(limits.quotas, limits.values, strict=True)]
        self._costs = limits.costs if limits.max_cost is not None else None
        self._budget = math.inf if limits.max_cost is None else limits.max_cost
        self._least_gain = -math.inf if limits.min_gain is None else limits.min_gain
        self._made, self._spent = 0, 0.0
        self._picked: dict[int, tuple[tuple[int, ...], float]] = {}  # with limits: row -> its groups and its cost
        self._small_gain: float | None = None  # the gain that was too small
        self.allowed = self._allowed() if self.limited else candidates
        # The rows that are free but for minima: a quota that asks for its own rows makes `free` another mask.
        self._open = self.free = self.allowed.clone()
        for tally in self._tallies:
            tally.lower_minima(self.allowed)
        self._narrow()

    def _allowed(self) -> Tensor:
        allowed = self._candidates.clone()
        for tally in self._tallies:
            allowed &= ~tally.full()
        if self._costs is not None:
            allowed &= self._costs <= self._budget
        return allowed

    # What kernels call.

    def oversample(self, factor: int) -> None:
        """From now on up to `factor` times as many picks, at `factor` times the cost, for a caller who drops some.

        Called before the first pick. A row dearer than the cost budget itself stays forbidden.
        """
        candidates = int(self._pool.sum(self._candidates.count_nonzero()))  # asked once, whatever the limits
        self.steps = min(factor * self.k, candidates)
        self._budget *= factor
        self._narrow()

    def best(self, scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """The free row of the highest score (n,), ties to the lowest global row; nothing is taken.

        Returns the global row and its score, both (), and the winner's row of every tensor in `rows`. Where no row is
        free, the score is -inf.
        """
        return self._pool.best(torch.where(self.free, scores, -torch.inf), *rows)

    def ends(self, score: Tensor | float) -> bool:
        """Whether the limits end the selection before the best free row, of that score (), is taken."""
        if not self.limited:
            return False
        gain = float(score)
        return gain == -math.inf or self._is_small(gain)

    def take(self, row: Tensor) -> None:
        """Chooses a global row ()."""
        if not self.limited:
            self._made += 1
            if len(self.free):
                place = (row - self._pool.offset)[None]
                near = place.clamp(0, len(self.free) - 1)  # a row of this place, told without asking the device
                self.free[near] &= near != place
            return
        number = int(row)
        at = number - self._pool.offset
        here = 0 <= at < len(self._open)
        self._note(number, *self._told(at if here else None))
        if here:
            self._open[at] = False
        self._strike()

    def walk(self, scores: Tensor, count: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses the `count` free rows of the highest scores (n,), ties to the lowest row, as if one after the other.

        Returns global rows (count,) and their scores (count,), best first; fewer where the limits end the selection,
        or where there are not so many free rows among the rows of `among` (n,) bool.
        """
        if not self.limited:
            rows, found = self._pool.top(scores, count, self.free if among is None else self.free & among)
            self._made += len(rows)
            self.free[self._here(rows)] = False
            return rows, found
        until, step = self._made + count, count
        taken = [(scores[:0].long(), scores[:0])]
        while self._made < until:
            columns = [tally.values for tally in self._tallies]
            if self._costs is not None:
                columns.append(self._costs)
            batch = self._pool.top(scores, step, self.free if among is None else self.free & among, *columns)
            if not len(batch[0]) or self._is_small(float(batch[1][0])):
                break
            chosen = torch.tensor(self._walked(*batch, until=until), dtype=torch.int64, device=scores.device)
            rows, found = (x[chosen] for x in batch[:2])
            taken.append((rows, found))
            self._open[self._here(rows)] = False
            self._strike()
            step = min(2 * step, max(count, self._pool.size // WALK_PART))
        rows, found = (torch.cat(each) for each in zip(*taken, strict=True))
        return rows, found

    @property
    def reopens(self) -> bool:
        """Whether rows that are not free now may be so later though nothing is dropped: where minima may give way."""
        return any(tally.least for tally in self._tallies)

    # What kernels call that take more than they may keep.

    @property
    def excess(self) -> bool:
        """Whether more than k rows are chosen, or for more than the cost budget."""
        most = self._limits.max_cost
        return self._made > self.k or (most is not None and self._spent > most)

    def droppable(self, rows: Tensor) -> Tensor:
        """Which of these chosen rows (m,) may be dropped, (m,) bool: those that no minimum holds, or else all.

        Where it is only the cost that is too much, none that cost nothing.
        """
        if not self.limited:
            return torch.ones_like(rows, dtype=torch.bool)
        picks = [self._picked[row] for row in rows.tolist()]
        too_dear = self.excess and self._made <= self.k
        helps = [cost > 0 or not too_dear for _, cost in picks]
        spare = [all(map(Tally.spares, self._tallies, values)) for values, _ in picks]
        both = list(map(operator.and_, helps, spare))
        return torch.tensor(both if any(both) else helps, dtype=torch.bool, device=rows.device)

    def drop(self, row: Tensor) -> None:
        """Gives up a chosen row (). It is not free again."""
        if self.limited:
            if self._made <= self.k:  # for its cost, then, and that is why the selection is short
                self._small_gain = None
            values, _ = self._picked.pop(int(row))
            for tally, value in zip(self._tallies, values, strict=True):
                tally.remove(value)
            self._spent = reduce(operator.add, (cost for _, cost in self._picked.values()), 0.0)
        self._made -= 1

    # What there is to tell once the kernel has returned.

    @property
    def stop_reason(self) -> StopReason:
        """Why the selection ended."""
        if self._made >= self.k:
            return StopReason.MAX_ITEMS
        if self._small_gain is not None:
            return StopReason.MIN_GAIN
        return StopReason.MAX_COST if self._rest.cheapest < math.inf else StopReason.QUOTAS

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What the limits changed: too few picks, minima that were not met."""
        messages = []
        if self.limited and self._made < self.k:
            messages.append(f"{self._made} of {self.k} picks: {self._why_short()}")
        short = [text for tally in self._tallies for text in tally.unmet()]
        if short:
            more = f"; and {len(short) - SPELLED_OUT} more" if len(short) > SPELLED_OUT else ""
            messages.append("; ".join(short[:SPELLED_OUT]) + more)
        return tuple(Notice(NoticeCode.CONSTRAINED, message) for message in messages)

    def cost_of(self, rows: Tensor) -> float | None:
        """What these global rows (m,) cost together, added in their order; None without costs."""
        costs = self._limits.costs
        if costs is None:
            return None
        theirs = costs.new_zeros(len(rows))
        theirs[self._is_here(rows)] = costs[self._here(rows)]
        return reduce(operator.add, self._pool.sum(theirs).tolist(), 0.0)

    def _why_short(self) -> str:
        if self._small_gain is not None:
            return f"the best gain left is {self._small_gain:g}, below min_gain {self._least_gain:g}"
        rest = self._rest
        if self.stop_reason is StopReason.MAX_COST:
            budget = f"{self._spent:g} of the cost budget of {self._limits.max_cost:g} spent"
            return f"{budget}; the cheapest row left costs {rest.cheapest:g}"
        full = (
            f"quota {tally.quota.name!r} is full for {count} of the {rest.rows} candidates left"
            for tally, count in zip(self._tallies, rest.full, strict=True)
            if count
        )
        return "; ".join(full)

    @cached_property
    def _rest(self) -> _Rest:
        """What was not chosen, in all slices. All of them ask at the same time."""
        rest = self._candidates.clone()
        chosen = torch.tensor(list(self._picked), dtype=torch.int64, device=rest.device)
        rest[self._here(chosen)] = False
        full, within = [tally.full() & rest for tally in self._tallies], rest.clone()
        for each in full:
            within &= ~each
        rows, *counts = self._pool.sum(torch.stack([each.count_nonzero() for each in (rest, *full)])).tolist()
        return _Rest(rows, counts, math.inf if self._costs is None else self._cheapest(within))

    def _cheapest(self, rows: Tensor) -> float:
        """The least cost among some rows (n,) bool of all slices; infinite where there are none."""
        assert self._costs is not None  # only asked then
        least = self._costs.new_full((), math.inf)
        for span in self._pool.spans(len(rows), COST_BYTES):
            least = torch.minimum(least, torch.where(rows[span], self._costs[span], math.inf).amin())
        return -float(self._pool.best(-least[None])[1])

    # Bookkeeping. What the host knows is the same in all slices.

    def _is_here(self, rows: Tensor) -> Tensor:
        """Which of these global rows stand in this place."""
        offset = self._pool.offset
        return (offset <= rows) & (rows < offset + len(self._candidates))

    def _here(self, rows: Tensor) -> Tensor:
        """The numbers that those of these global rows have here that stand here."""
        return rows[self._is_here(rows)] - self._pool.offset

    def _told(self, at: int | None) -> tuple[tuple[int, ...], float]:
        """The groups and the cost of the row that stands here at `at`, or in another slice, told to all."""
        columns = [tally.values for tally in self._tallies]
        if self._costs is not None:
            columns.append(self._costs.view(torch.int64))  # its bits: the sum with zeros leaves them as they are
        if not columns:
            return (), 0.0
        mine = columns[0].new_zeros(len(columns)) if at is None else torch.stack([x[at] for x in columns])
        told = self._pool.sum(mine).cpu()
        cost = 0.0 if self._costs is None else told[-1:].view(torch.float64).item()
        return tuple(told.tolist()[: len(self._tallies)]), cost

    def _is_small(self, gain: float) -> bool:
        """Whether the best gain left is too small; then it is remembered, as the end of the selection."""
        if gain < self._least_gain:
            self._small_gain = gain
        return self._small_gain is not None

    def _note(self, row: int, values: tuple[int, ...], cost: float) -> None:
        """Counts a pick."""
        self._picked[row] = (values, cost)
        self._made, self._spent = self._made + 1, self._spent + cost
        for tally, value in zip(self._tallies, values, strict=True):
            tally.add(value)

    def _walked(self, rows: Tensor, scores: Tensor, *columns: Tensor, until: int) -> list[int]:
        """Chooses among free rows (b,), best first, until so many picks are made; the positions of those chosen.

        columns: their groups, by quota, and their costs where there is a cost budget. Stops also where the gain gets
        too small, and where a quota begins to ask for its own rows.
        """
        chosen: list[int] = []
        groups, prices = columns[: len(self._tallies)], columns[len(self._tallies) :]
        for start in range(0, len(rows), WALK_ROWS):
            self._pool.check()
            part = slice(start, start + WALK_ROWS)
            values = zip(*(each[part].tolist() for each in groups), strict=True) if groups else repeat(())
            costs = prices[0][part].tolist() if prices else repeat(0.0)
            entries = zip(rows[part].tolist(), scores[part].tolist(), values, costs, strict=False)
            for at, (row, score, mine, cost) in enumerate(entries, start):
                if score < self._least_gain:
                    return chosen
                if self._fits(mine, cost):
                    self._note(row, mine, cost)
                    chosen.append(at)
                    asking = any(tally.wanted >= self._left for tally in self._tallies if not tally.due)
                    if self._made == until or asking:
                        return chosen
        return chosen

    def _fits(self, values: tuple[int, ...], cost: float) -> bool:
        """Whether a row of these groups and that cost may be chosen next."""
        if self._spent + cost > self._budget:
            return False
        return all(tally.fits(value) for tally, value in zip(self._tallies, values, strict=True))

    @property
    def _left(self) -> int:
        return self.steps - self._made

    def _strike(self) -> None:
        """Takes from the open rows what the picks made so far forbid."""
        for tally in self._tallies:
            if tally.filled:
                self._open &= ~tally.among(tally.filled)
                tally.filled = []
        if self._costs is not None:
            for span in self._pool.spans(len(self._open), COST_BYTES):
                self._open[span] &= self._costs[span] + self._spent <= self._budget
        self._narrow()

    def _narrow(self) -> None:
        """Where a quota wants all the picks that are left, only rows that it wants are free, if there are any."""
        self.free = self._open
        for tally in self._tallies:
            tally.due, tally.binds = 0 < self._left <= tally.wanted, False
            if tally.due:
                wanted = self.free & tally.among(tally.short)
                if self._pool.sum(wanted.count_nonzero()) > 0:
                    self.free, tally.binds = wanted, True


@dataclass(frozen=True)
class _Rest:
    """The candidates that were not chosen, of all slices: how many, and how many of them each quota holds back.

    cheapest: the least cost of those that none does; infinite where there is no cost budget.
    """

    rows: int
    full: list[int]
    cheapest: float
