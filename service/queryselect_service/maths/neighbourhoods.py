"""Which rows lie within a radius of each other, exactly, and never all pairs at a time.

Distances are fast; pairs that these can't tell from the radius are decided by differences in float64, so that neither
type, block nor slice changes a neighbourhood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from queryselect_service.maths.distances import EXACT_BYTES, Points
from queryselect_service.shards import Shards

#: Centres that rows are compared with at once, at the most.
MANY = 256
#: Multiply-adds over all rows after which slices meet, so that a caller who leaves is heard.
MEETING = 1 << 33


def parts(pool: Shards, *x: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of all slices in global order, as `pool.blocks` gives them, few at a time; slices meet before each.

    x: (m, D) rows first, and what else there is of them.
    """
    many = max(1, min(MANY, MEETING // (pool.size * x[0].shape[1])))
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

    def masses(self, centres: Tensor, mass: Tensor) -> Tensor:
        """The mass (n,) that every row here has within its radius, of rows (c, D) with masses (c,), float64."""
        found = torch.zeros(len(self._error), dtype=torch.float64, device=centres.device)
        for span, edges in self._edges(centres):
            found[span] = edges.double() @ mass
        return found

    def around(self, centres: Tensor) -> Tensor:
        """Which rows here (n,) are within the radius of one of some rows (c, D)."""
        found = torch.zeros(len(self._error), dtype=torch.bool, device=centres.device)
        for span, edges in self._edges(centres):
            found[span] = edges.any(1)
        return found

    def _edges(self, centres: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Span by span which rows are within the radius of which of some rows as given (c, D): (s, c) bool."""
        for span, table in self._points.tables(self._points.moved(centres)):
            edges = table < self._bar
            unsure = table.sub_(self._bar).abs_() <= self._error[span, None]
            rows, at = unsure.nonzero(as_tuple=True)
            edges[rows, at] = apart(self._points, span.start + rows, centres, at) < self._radius
            yield span, edges


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
