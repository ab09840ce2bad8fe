"""Which rows lie within a radius of each other, exactly, and never all pairs at a time.

Distances are fast; pairs that these can't tell from the radius are decided by differences in float64, so that neither
type, block nor slice changes a neighbourhood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from queryselect_service.maths.distances import EXACT_BYTES, Points, at_once
from queryselect_service.maths.lists import Lists, together
from queryselect_service.shards import Shards

#: Bytes that a graph takes per edge while it is made.
EDGE_BYTES = 40


def parts(pool: Shards, *x: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of all slices in global order, as `pool.blocks` gives them, few at a time; slices meet before each.

    x: (m, D) rows first, and what else there is of them.
    """
    many = at_once(pool.size, x[0].shape[1])
    for block in pool.blocks(*x):
        for start in range(0, len(block[0]), many):
            pool.sum(torch.zeros(1, device=x[0].device))
            yield tuple(each[start : start + many] for each in block)


class Neighbourhoods:
    """The rows within a radius of others: |x - c| < radius, in units of the rows of `points`."""

    def __init__(self, points: Points, radius: float) -> None:
        self._points, self._radius = points, radius * points.scale
        none = torch.zeros_like(points.norms)
        _, longest = points.pool.best(points.norms)
        _, error = points.pool.best(points.error_bound(none))
        # No two rows are farther apart than twice the longest: beyond, a radius is only harder to compute with.
        self._bar = min(self._radius * self._radius, 8 * (float(longest) + float(error)))
        # Twice, since the bound counts from the fast distance, and this from the bar.
        self._error = 2 * points.error_bound(none + self._bar)  # (n,)

    def around(self, centres: Tensor) -> Tensor:
        """Which rows here (n,) are within the radius of one of some rows (c, D)."""
        found = torch.zeros(len(self._error), dtype=torch.bool, device=centres.device)
        for rows, _ in self._edges(centres):
            found[rows] = True
        return found

    def add(self, total: Tensor, centres: Tensor, mass: Tensor) -> None:
        """Adds to `total` (n,) what every row here has within its radius, of rows (c, D) with masses (c,), float64."""
        for rows, at in self._edges(centres):
            total.index_add_(0, rows, mass[at])

    def graph(self, mass: Tensor, most: int) -> tuple[Tensor, Graph | None]:
        """The mass (n,) that every row here has within its radius, of all rows, and which rows those are.

        mass: (n,) float64 of the rows here, whole numbers, so that no order changes a sum. most: the edges that are
        kept, of all slices; without a graph where there are more.

        A pair of rows of the same slice is looked at once.
        """
        pool, embeddings, n = self._points.pool, self._points.embeddings, len(mass)
        degree, edges = torch.zeros_like(mass), _Edges(most, mass.device)
        begin = 0  # the global number of the first centre
        for centres, theirs in parts(pool, embeddings, mass):
            mine = pool.offset <= begin < pool.offset + n
            first = begin - pool.offset if mine else 0
            last = first + len(centres) if mine else n  # rows from there on are no centres yet
            for rows, at in self._edges(centres, first):
                degree.index_add_(0, rows, theirs[at])
                edges.add(begin + at, rows)
                later = (rows >= last).nonzero().squeeze(1)
                rows, at = rows[later], first + at[later]  # noqa: PLW2901  # the same pairs, the other way round
                degree.index_add_(0, at, mass[rows])
                edges.add(pool.offset + rows, at)
            begin += len(centres)
        return degree, edges.graph(pool)

    def _edges(self, centres: Tensor, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Span by span pairs (p,), (p,) of rows here, from the `first` on, and rows as given (c, D) within the radius.

        The latter by their place among the centres.
        """
        for span, table in self._points.tables(self._points.moved(centres), first):
            error = self._error[span]
            rows, at = (table < self._bar + error[:, None]).nonzero(as_tuple=True)
            unsure = (table[rows, at] >= self._bar - error[rows]).nonzero().squeeze(1)
            rows += span.start
            if len(unsure):
                inside = torch.ones_like(rows, dtype=torch.bool)
                inside[unsure] = apart(self._points, rows[unsure], centres, at[unsure]) < self._radius
                rows, at = rows[inside], at[inside]
            yield rows, at


class Graph:
    """Of every row of all slices, N, the rows here that are within its radius."""

    def __init__(self, tails: Tensor, heads: Tensor, pool: Shards) -> None:
        """tails: (e,) global rows, and heads: (e,) rows here within their radius; int32."""
        self._lists = Lists(torch.bincount(tails, minlength=pool.size))
        self._heads = together(heads, tails, self._lists.starts, pool)

    def around(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (p,), (p,): rows here, and at which of the global rows (m,) they are neighbours."""
        places, at = self._lists.places(numbers)
        return self._heads[places].long(), at


class _Edges:
    """Edges as they come, until there are too many."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._most, self._count, self._device = most, 0, device
        none = torch.empty(0, dtype=torch.int32, device=device)
        self._tails, self._heads = [none], [none]

    def add(self, tails: Tensor, heads: Tensor) -> None:
        """Global rows (p,), and rows here (p,) within their radius."""
        self._count += len(tails)
        if self._count > self._most:
            del self._tails[:], self._heads[:]
        else:
            self._tails.append(tails.int())
            self._heads.append(heads.int())

    def graph(self, pool: Shards) -> Graph | None:
        """What they make, unless all slices have more than the most."""
        told = torch.tensor(self._count, device=self._device)
        if int(pool.sum(told)) > self._most:
            return None
        tails, heads = torch.cat(self._tails), torch.cat(self._heads)
        self._tails, self._heads = [], []
        return Graph(tails, heads, pool)


def apart(points: Points, rows: Tensor, centres: Tensor, at: Tensor) -> Tensor:
    """The distances (p,) of pairs by differences in float64, times `scale`: rows (p,) here, and those `at` (p,).

    centres: (c, D), rows as given.
    """
    found = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for span in points.pool.spans(len(rows), 3 * EXACT_BYTES * centres.shape[1]):
        difference = points.exact(points.embeddings[rows[span]]).sub_(points.exact(centres[at[span]]))
        found[span] = torch.linalg.vector_norm(difference, dim=1)
    return found


def pure_radius(points: Points, labels: Tensor, purity: float) -> float:
    """The largest radius at which so large a part of the balls around rows has rows of one label alone.

    A ball |x - y| < r is pure up to the distance of the nearest row of another label, so that this is a quantile of
    those. labels: (n,) int64. Infinite where all rows have the same label.
    """
    nearest = torch.full((len(labels),), math.inf, dtype=torch.float64, device=labels.device)
    upper = torch.full_like(nearest, math.inf, dtype=points.norms.dtype)
    for centres, theirs in parts(points.pool, points.embeddings, labels):
        for span, table in points.tables(points.moved(centres)):
            error = points.error_bound(table, span)
            table.masked_fill_(labels[span, None] == theirs, math.inf)
            upper[span] = torch.minimum(upper[span], (table + error).amin(1))
            bar = upper[span, None]
            unsure = (table.sub_(error) <= bar) & (bar < math.inf)  # may be the nearest, as far as distances can tell
            rows, at = unsure.nonzero(as_tuple=True)
            rows += span.start
            nearest.scatter_reduce_(0, rows, apart(points, rows, centres, at), "amin")
    count = max(1, math.ceil(purity * points.pool.size - 1e-9))
    _, farthest = points.pool.top(nearest, count, torch.ones_like(nearest, dtype=torch.bool))
    return float(farthest[-1]) / points.scale
