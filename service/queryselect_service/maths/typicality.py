"""Rows whose neighbours are nearest on average, among the members of one cluster.

Requirements that the design meets:

- Decisions are those of exact arithmetic: fast distances are measured from the cluster's own mean and have known
  errors; the rows that may be the best within them are compared by direct differences in float64, the neighbours of
  each in order of distance, so that rows that are alike score the same bits and go to the lowest row.
- Tiles of a table of all pairs, never the table.
- Where many rows repeat one another, the lowest with a distance of 0 settles it, and the others are not looked at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from queryselect_service.maths.distances import EXACT_BYTES, PRODUCTS, Points, rounding, squared_distances

#: Members that others are compared with at a time.
TILE = 4096
#: Multiply-adds per pair, in entries touched, that finding the nearest among them is worth.
RANKED = 8
#: Rows that are looked at closely before it is asked whether more have to be; then four times as many, and so on.
CLOSELY = 64


def neighborhoods(
    points: Points, members: Tensor, free: Tensor, neighbors: int, *, squared: bool
) -> tuple[Tensor, Tensor]:
    """The mean distance to the nearest neighbours, of the free rows among which the one of the least such mean is.

    members: (m,) ascending numbers of rows here, M in all slices. free: (m,) bool. neighbors: a row has min(neighbors,
    M // 2) among the members, itself not among them. squared: whether distances are squared.
    Returns rows here (t,) and their means (t,), float64, times `points.scale`, or its square. Of the rows of all slices
    that have the least mean, the lowest is among them. A row that is the only member has a mean of 0.
    """
    pool = points.pool
    size, choices = pool.sum(
        torch.stack([free.new_tensor(len(free), dtype=torch.int64), free.count_nonzero()])
    ).tolist()
    count = min(neighbors, size // 2)
    if not count or not choices:
        rows = members[free]
        return rows, torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    lower, upper = _bounds(points, members, size, count, squared=squared)
    _, bar = pool.best(torch.where(free, -upper, -math.inf))
    leaders = members[free & (lower <= -bar)]
    means = torch.full((len(leaders),), math.inf, dtype=torch.float64, device=leaders.device)
    done, step = 0, CLOSELY
    while True:
        some = slice(done, done + step)
        means[some] = _exactly(points, members, leaders[some], count, squared=squared)
        done, step = done + step, 4 * step
        _, best, row = pool.best(-means, leaders + pool.offset)
        rest = leaders[done:] + pool.offset
        if not pool.sum((rest < row).count_nonzero() if best == 0 else rest.new_tensor(len(rest))):
            return leaders, means


def _bounds(points: Points, members: Tensor, size: int, count: int, *, squared: bool) -> tuple[Tensor, Tensor]:
    """Between what (m,) and (m,) the mean distance of every member to its nearest neighbours is."""
    pool, dims = points.pool, points.embeddings.shape[1]
    total = torch.zeros(dims, dtype=torch.float64, device=members.device)
    for span in pool.spans(len(members), EXACT_BYTES * dims):
        total += points.moved(points.embeddings[members[span]]).sum(0)
    middle = pool.sum(total) / size
    rows = points.work.new_empty(len(members), dims)
    norms = points.work.new_empty(len(members))
    for span in pool.spans(len(members), EXACT_BYTES * dims):
        near = points.moved(points.embeddings[members[span]]).sub_(middle)
        rows[span], norms[span] = near, near.square().sum(1)
    nearest = rows.new_full((len(members), count), math.inf)  # squared
    for theirs, their, whose in pool.blocks(rows, norms, members + pool.offset):
        for start in range(0, len(theirs), TILE):
            tile = slice(start, start + TILE)
            pairs = len(theirs[tile]) * (RANKED + dims // PRODUCTS)
            for span in pool.spans(len(members), rows.element_size() * pairs):
                table = squared_distances(rows[span], norms[span], theirs[tile], their[tile]).clamp_min_(0)
                _part(table, members[span] + pool.offset, whose[tile])
                nearest[span] = _nearest(nearest[span], table, count)
    lower, upper = norms.new_empty(2, len(members), dtype=torch.float64)
    for span in pool.spans(len(members), 64 * count):
        # As in Points.error_bound, measured from the cluster's mean; and what vanishes among squares.
        near = nearest[span].double()
        error = (near + 2 * norms[span, None]) * (2 * rounding(rows.dtype, dims))
        error += 4 * dims * torch.finfo(rows.dtype).tiny
        least, most = (near - error).clamp_min_(0), near + error
        lower[span], upper[span] = (x.mean(1) if squared else x.sqrt_().mean(1) for x in (least, most))
    return lower, upper


def _exactly(points: Points, members: Tensor, rows: Tensor, count: int, *, squared: bool) -> Tensor:
    """The mean distance (r,) of some members (r,) to their nearest neighbours, by differences in float64."""
    pool, dims = points.pool, points.embeddings.shape[1]
    close = points.exact(points.embeddings[rows])
    nearest = close.new_full((len(rows), count), math.inf)
    for theirs, whose in pool.blocks(points.embeddings[members], members + pool.offset):
        for part in pool.spans(len(theirs), EXACT_BYTES * dims + 2 * len(rows) * (dims + RANKED)):
            others = points.exact(theirs[part])
            table = torch.cdist(close, others, compute_mode="donot_use_mm_for_euclid_dist")
            _part(table, rows + pool.offset, whose[part])
            nearest = _nearest(nearest, table, count)
    nearest = nearest.sort(1).values
    # One after the other: the same bits for rows that are alike, wherever they stand.
    return (nearest.square_() if squared else nearest).cumsum(1)[:, -1] / count


def _part(table: Tensor, mine: Tensor, theirs: Tensor) -> None:
    """Makes the distance of every row to itself infinite, in a table (r, c) of rows `mine` (r,) and `theirs` (c,).

    theirs: ascending.
    """
    at = torch.searchsorted(theirs, mine).clamp_max_(len(theirs) - 1)
    same = (theirs[at] == mine).nonzero().squeeze(1)
    table[same, at[same]] = math.inf


def _nearest(nearest: Tensor, table: Tensor, count: int) -> Tensor:
    """The least of the distances so far (r, count) and in the table (r, c), in no order."""
    some = table.topk(min(count, table.shape[1]), largest=False, sorted=False).values
    return torch.cat([nearest, some], dim=1).topk(count, largest=False, sorted=False).values


def memory(rows: int, dims: int, item: int, neighbors: int) -> int:
    """The bytes that a cluster of so many rows takes beside spans: these, measured from their mean or as given.

    item: bytes of an entry of the rows.
    """
    wide = max(4, item)
    return rows * (dims * wide + neighbors * wide + 64)
