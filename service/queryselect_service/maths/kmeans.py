"""k-means: Lloyd's iterations from a seeded k-means++ start, and the row nearest to each centre.

Requirements that the design meets:

- Nothing but matrix products and passes over numbers per row takes time. The start draws rows as an exponential race,
  one number per seed, row and step, so that no layout changes a draw.
- Sums are float64, in the end of exact rows measured from the centres, so that the mean of equal rows is that row and
  their distance to it 0.
- Clusters that run empty start anew at the row farthest from its centre. Fewer distinct rows than clusters make fewer
  clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.distances import EXACT_BYTES, PRODUCTS, Points, copy_bytes
from queryselect_service.maths.noise import uniform
from queryselect_service.selection import Notice, NoticeCode
from queryselect_service.shards import SPAN_BYTES, Shards, Whole

#: The step of the noise of the first draw, far from those of others with the same seed.
NOISE = 1 << 32
#: Lloyd's iterations at the most, and the part of the sum of squares that another has to take off, or it is the last.
ITERATIONS, SETTLED = 100, 1e-5
#: Rows per cluster among which the start looks for centres, where there are more: it ends up as near, on fewer rows.
START = 32
#: Sums are made anew where more than one row in so many has changed its cluster.
FEW = 4
#: The relative difference up to which two sums of squares are the same, fast as they are.
SAME = 1e-6
#: The relative difference up to which distances to a centre are ties, and that of masses, of the largest.
TIE, SAME_MASS = 1e-10, 2.0**-40
#: Rows per centre that are looked for at once, at the most, where the nearest are taken.
DEPTH = 64
#: Bytes per row that a draw touches: its number, the noise and what that is made of.
DRAW_BYTES = 128


@dataclass(frozen=True)
class Clusters:
    """A partition of the rows. Fewer than were asked for where there are fewer distinct rows.

    labels: (n,) int64, the cluster of every row here. centres: (c, D) float64, the means of what `Points.moved` makes
    of the rows. masses: (c,) float64, the weights of their rows in all slices, added up.
    """

    labels: Tensor
    centres: Tensor
    masses: Tensor

    def distances(self, points: Points) -> Tensor:
        """The distance (n,) of every row to the centre of its own cluster, by differences in float64, times `scale`."""
        found = torch.empty(len(self.labels), dtype=torch.float64, device=self.labels.device)
        for span in points.pool.spans(len(found), EXACT_BYTES * self.centres.shape[1]):
            rows = points.moved(points.embeddings[span])
            found[span] = torch.linalg.vector_norm(rows.sub_(self.centres[self.labels[span]]), dim=1)
        return found


def k_means(points: Points, k: int, seed: int, weights: Tensor | None = None) -> Clusters:
    """At most k clusters whose rows are near their mean: sum_i w_i |x_i - c(i)|^2 is at a local minimum, or near it.

    weights: (n,), at least 0, some of all slices above; 1 each by default. Rows without weight have a cluster and move
    none. Lloyd, Least squares quantization in PCM (1982); Arthur and Vassilvitskii, k-means++ (SODA 2007).
    """
    pool, device, alike = points.pool, points.embeddings.device, True
    if weights is not None:
        weights = weights.double()
        weights = weights / pool.best(weights)[1]  # so that no sum overflows
        alike = not pool.sum(((weights > 0) & (weights < 1)).count_nonzero())
    else:
        weights = torch.ones(len(points.embeddings), dtype=torch.float64, device=device)
    centres = points.moved(_sampled_start(points, k, seed, weights))
    labels, last, sums = torch.full_like(weights, -1, dtype=torch.int64), math.inf, None
    for _ in range(ITERATIONS):
        new, squared = nearest_centres(points, centres)
        inertia = float(pool.sum((weights * squared).sum()))
        changed = int(pool.sum((new != labels).count_nonzero()))
        if not changed or not inertia < last:  # rounding may move rows to and fro between centres as near
            break
        if sums and alike and FEW * changed < pool.size:
            sums.move(labels, new)
        else:
            sums = _Sums(points, weights, new, len(centres))
        settled = inertia > (1 - SETTLED) * last
        labels, last, centres = new, inertia, sums.means(centres)
        empty = (sums.counts == 0).nonzero().squeeze(1)
        if len(empty):
            far = (squared > points.error_bound(squared)) & (weights > 0)
            _, _, rows = pool.top(weights * squared, len(empty), far, points.embeddings)
            centres[empty[: len(rows)]] = points.moved(rows)
        elif settled:
            break
    kept = _Sums(points, weights, labels, len(centres)).counts > 0
    if not kept.all():
        centres = centres[kept]
        labels, _ = nearest_centres(points, centres)
    sums = _Sums(points, weights, labels, len(centres), centres)
    return Clusters(labels, centres + sums.means(torch.zeros_like(centres)), sums.masses)


def memory(rows: int, dims: int, item: int, clusters: int, *, normalize: bool) -> int:
    """The bytes that Points and all here hold: a moved copy of the rows, numbers per row, spans, centres.

    item: bytes of an entry of the rows.
    """
    wide = max(4, item)
    copy = copy_bytes(dims, item, normalize=normalize)
    some = START * clusters if START * clusters < rows else 0  # that the start looks at
    tables = 4 * SPAN_BYTES * clusters // (dims + clusters * (4 + dims // PRODUCTS))  # with their errors; see Points
    spans = min(max(SPAN_BYTES // 2, tables), 8 * rows * (4 * dims + 2 * clusters))
    trials = 2 * wide * (2 + int(math.log(clusters))) * (some or rows)
    return rows * (copy + 72) + some * (dims * item + copy + 72) + trials + 6 * 8 * clusters * dims + spans


def nearest_centres(points: Points, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The number (n,) of the nearest of `centres` (c, D) to every row, and the fast squared distance (n,) float64.

    centres: float64, what `Points.moved` makes of rows, or means of such.
    """
    n, device = len(points.embeddings), centres.device
    labels = torch.empty(n, dtype=torch.int64, device=device)
    squared = torch.empty(n, dtype=torch.float64, device=device)
    for span, table in points.tables(centres):
        squared[span], labels[span] = table.min(1)
    return labels, squared


def start(points: Points, k: int, seed: int, weights: Tensor) -> Tensor:
    """Rows (k, D), as given, drawn by greedy k-means++; fewer where all others repeat them.

    The first by its weight; for each of the others 2 + ln k rows are drawn by their weight times their squared distance
    to the nearest before them, and the one that leaves the least sum of these is kept, of equal ones the first drawn. A
    draw is a race: the least of -ln u / (w D^2) come first.
    """
    pool, embeddings = points.pool, points.embeddings
    _, _, first = pool.best(_races(pool, seed, 0, weights), embeddings)
    centres, trials = first[None], 2 + int(math.log(k))
    nearest = torch.full_like(weights, math.inf, dtype=points.work.dtype)  # squared, fast; zeros are exact
    points.update_nearest(nearest, centres)
    while len(centres) < k:
        rate = weights * nearest
        rows, _, theirs = pool.top(_races(pool, seed, len(centres), rate), trials, rate > 0, embeddings)
        if not len(rows):
            break
        twins = rows[_direct(points.exact(theirs), points.exact(centres)) == 0]
        if len(twins):
            # What repeats a centre is at a distance of rounding alone. Such rows are looked at closely, all at once.
            doubtful = ((nearest > 0) & (nearest <= points.error_bound(nearest))).nonzero().squeeze(1)
            nearest[doubtful] = points.direct(doubtful, centres).square().to(nearest.dtype)
            nearest[torch.isin(torch.arange(len(nearest), device=rows.device) + pool.offset, twins)] = 0
            continue
        left = nearest.new_empty(len(nearest), len(rows))
        sums = weights.new_zeros(len(rows))
        for span, table in points.tables(points.moved(theirs)):
            left[span] = torch.minimum(table, nearest[span, None])
            sums += weights[span] @ left[span].double()
        sums = pool.sum(sums)
        best = int((sums <= (1 + SAME) * sums.amin()).int().argmax())
        centres, nearest = torch.cat([centres, theirs[best][None]]), left[:, best].contiguous()
    return centres


def _sampled_start(points: Points, k: int, seed: int, weights: Tensor) -> Tensor:
    """The same among some rows alone, drawn by their weight; all where those are few, or too few are different."""
    pool, embeddings, count = points.pool, points.embeddings, START * k
    if pool.size > count:
        _, _, rows = pool.top(_races(pool, seed, k, weights), count, weights > 0, embeddings)
        some = Points(rows, Whole(len(rows), pool.check), normalize=points.normalize)
        centres = start(some, k, seed, weights.new_ones(len(rows)))
        if len(centres) == k:
            return centres
    return start(points, k, seed, weights)


def _races(pool: Shards, seed: int, step: int, rate: Tensor) -> Tensor:
    """Minus the time (n,) that every row takes, exponential with that rate (n,): the highest has won. -inf for none."""
    offset = pool.offset
    keys = torch.empty_like(rate)
    for span in pool.spans(len(rate), DRAW_BYTES):
        rows = torch.arange(offset + span.start, offset + span.stop, device=rate.device)
        keys[span] = uniform(seed, rows, NOISE + step).log_().div_(rate[span])
    return keys


def _direct(rows: Tensor, centres: Tensor) -> Tensor:
    """The distance (m,) of exact rows (m, D) to the nearest of `centres` (c, D), by differences."""
    return torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


class _Sums:
    """The weighted sums of the rows of every cluster."""

    def __init__(
        self, points: Points, weights: Tensor, labels: Tensor, clusters: int, origins: Tensor | None = None
    ) -> None:
        """labels: (n,), the cluster of every row here. origins: (c, D), where to measure a cluster's rows from."""
        self._points, self._weights, dims = points, weights, points.embeddings.shape[1]
        total = weights.new_zeros(clusters, dims + 2)
        for span in points.pool.spans(len(labels), EXACT_BYTES * dims):
            rows = points.nearly(span) if origins is None else points.moved(points.embeddings[span])
            if origins is not None:
                rows -= origins[labels[span]]
            self._add(total, span, rows, labels[span])
        self._total = points.pool.sum(total)

    @property
    def counts(self) -> Tensor:
        """How many rows (c,) of all slices have a weight."""
        return self._total[:, -1]

    @property
    def masses(self) -> Tensor:
        """What those rows weigh, (c,)."""
        return self._total[:, -2]

    def move(self, old: Tensor, new: Tensor) -> None:
        """Rows here are in clusters `new` (n,) and no longer `old` (n,). What is taken away leaves its rounding behind.

        Nothing to speak of where all weights are alike, or 0.
        """
        total, dims = torch.zeros_like(self._total), self._points.embeddings.shape[1]
        changed = (new != old).nonzero().squeeze(1)
        for span in self._points.pool.spans(len(changed), EXACT_BYTES * dims):
            some = changed[span]
            rows = self._points.nearly(some)
            self._add(total, some, rows, new[some])
            self._add(total, some, rows, old[some], -1)
        self._total += self._points.pool.sum(total)

    def means(self, otherwise: Tensor) -> Tensor:
        """The means (c, D); for clusters without rows those of `otherwise`."""
        return torch.where(self.counts[:, None] > 0, self._total[:, :-2] / self.masses[:, None], otherwise)

    def _add(self, total: Tensor, some: slice | Tensor, rows: Tensor, labels: Tensor, sign: int = 1) -> None:
        """Adds `rows` (m, D), those numbers `some`, to the totals (c, D + 2) of their clusters (m,)."""
        weights = self._weights[some, None]
        parts = torch.cat([rows * weights, weights, (weights > 0).double()], dim=1).mul_(sign)
        if rows.device.type == "cpu":
            total.index_add_(0, labels, parts)
        else:  # there index_add_ adds in any order, and this one sorts first
            total.index_put_((labels,), parts, accumulate=True)


def representatives(
    points: Points, clusters: Clusters, choice: Choice, among: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Notice, ...]]:
    """Takes the free row nearest to each centre, that of the heaviest cluster first; ties to the lowest row.

    A row that represents one cluster is not free for the next. Where there are fewer clusters than picks, the free rows
    nearest to any centre follow, with a warning. among: (n,) bool, rows to choose from; all.

    Returns global rows (k,), minus their distances (k,) to the centre, not squared. Fewer than `choice.k` where the
    limits end the selection, or `among` has not so many.
    """
    pool, count = points.pool, choice.k
    allowed = choice.allowed if among is None else choice.allowed & among
    masses = (clusters.masses / clusters.masses.amax() / SAME_MASS).round_()
    centres = clusters.centres[masses.argsort(descending=True, stable=True)]  # (c, D)
    leaders, begin, depth, taken = _Leaders(points, centres, allowed, 1), 0, 1, torch.zeros_like(allowed)
    indices, scores = [torch.empty(0, dtype=torch.int64, device=centres.device)], [centres.new_empty(0)]
    numbers = torch.arange(pool.offset, pool.offset + len(allowed), device=centres.device)
    for number, centre in enumerate(centres):
        pool.progress(number, count)
        near, sure = leaders.scores(number - begin)
        _, best = choice.best(near)
        if float(best) < -sure:  # the nearest are taken, as where some rows are nearest to many centres
            begin, depth = number, min(DEPTH, 4 * depth)
            leaders = _Leaders(points, centres[begin:], allowed & ~taken, depth)
            near, sure = leaders.scores(0)
            _, best = choice.best(near)
        if float(best) < -sure:  # or not free now
            near, _ = _Leaders(points, centre[None], allowed & choice.free, 1).scores(0)
            _, best = choice.best(near)
        if float(best) == -math.inf:
            break
        # The two rows of a cluster are equally far from their mean, whatever rounding says.
        row, _, score = choice.best(torch.where(near >= best * (1 + TIE), 0.0, -math.inf), near)
        choice.take(row)
        taken |= numbers == row
        indices.append(row[None])
        scores.append(score[None])
    notices: tuple[Notice, ...] = ()
    if len(indices) <= count:
        rest, near = choice.walk(clusters.distances(points).neg_(), count - len(indices) + 1, among)
        if len(rest):
            message = f"there are not enough distinct rows: {len(rest)} picks are further rows near to centres"
            notices = (Notice(NoticeCode.FALLBACK, message, rest),)
        indices.append(rest)
        scores.append(near)
    return torch.cat(indices), torch.cat(scores) / points.scale, notices


class _Leaders:
    """The allowed rows that may be among the `depth` nearest to each of the centres (c, D), by fast distances."""

    def __init__(self, points: Points, centres: Tensor, allowed: Tensor, depth: int) -> None:
        nearest = torch.full((depth, len(centres)), math.inf, dtype=points.work.dtype, device=centres.device)
        for span, table in points.tables(centres):
            most = (table + points.error_bound(table, span)).masked_fill_(~allowed[span, None], math.inf)
            nearest = _least(torch.cat([nearest, _least(most, depth)]), depth)
        nearest = _least(torch.cat([block for (block,) in points.pool.blocks(nearest)]), depth)
        least = nearest.amax(0)
        rows, numbers = [], []
        for span, table in points.tables(centres):
            near = table - points.error_bound(table, span) <= least
            row, number = near.logical_and_(allowed[span, None]).nonzero(as_tuple=True)
            rows.append(row + span.start)
            numbers.append(number)
        row, number = (
            torch.cat([allowed.new_empty(0).long(), *rows]),
            torch.cat([allowed.new_empty(0).long(), *numbers]),
        )
        order = number.argsort(stable=True)
        self._rows, number = row[order], number[order]
        self._edges = torch.searchsorted(number, torch.arange(len(centres) + 1, device=number.device)).tolist()
        self._distances = torch.empty(len(number), dtype=torch.float64, device=centres.device)
        for span in points.pool.spans(len(number), EXACT_BYTES * centres.shape[1]):
            apart = points.moved(points.embeddings[self._rows[span]]).sub_(centres[number[span]])
            self._distances[span] = torch.linalg.vector_norm(apart, dim=1)
        self._none = torch.full((len(allowed),), -math.inf, dtype=torch.float64, device=centres.device)
        self._sure = least.double().sqrt().tolist()

    def scores(self, number: int) -> tuple[Tensor, float]:
        """Minus the distance (n,) of the leaders to a centre, -inf for other rows; how far at least others are."""
        some = slice(*self._edges[number : number + 2])
        return self._none.index_copy(0, self._rows[some], -self._distances[some]), self._sure[number]


def _least(table: Tensor, count: int) -> Tensor:
    """The least so many of every column (r, c), (count, c) in no order; all where there are no more."""
    if count == 1 or len(table) <= count:
        return table.amin(0, keepdim=True) if count == 1 else table
    return table.topk(count, dim=0, largest=False, sorted=False).values
