"""k-center greedy, the core-set strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.distances import Points
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, strategy


@dataclass(frozen=True)
class KCenterGreedy(Spec):
    """Its parameters."""

    normalize: bool = parameter(False, "Whether every row is scaled to unit Euclidean length first")


def _memory(sizes: Sizes, spec: KCenterGreedy) -> int:
    """A moved copy of the rows where Points makes one, centres, a dozen numbers per row, and spans of float64 rows."""
    wide = max(4, sizes.item)
    copy = sizes.D * wide if spec.normalize or sizes.item < wide else 0
    spans = min(3 * SPAN_BYTES // 2, 4 * 8 * sizes.N * sizes.D)
    return sizes.N * (copy + 24 + 8 * wide) + 2 * (sizes.L + sizes.k) * sizes.D * sizes.item + spans


@strategy(
    KCenterGreedy,
    kind=ScoreKind.DISTANCE,
    cost="O(N D (L + k)) time, O(N D) memory",
    memory=_memory,
    work=lambda sizes: float(sizes.N * sizes.D * (6 + sizes.L + sizes.k)),
    citation="Sener and Savarese, Active learning for convolutional neural networks: a core-set approach (ICLR 2018), "
    "arXiv:1708.00489, algorithm 1",
)
def k_center_greedy(
    embeddings: Annotated[Tensor, "N D"],
    *,
    choice: Choice,
    spec: KCenterGreedy = KCenterGreedy(),
    context: Tensor,
    pool: Shards,
) -> Selection:
    """Prefers the row farthest from everything that is labelled or chosen so far (farthest-first traversal).

        d(x) = min over c in context and picks of |x - c|;  pick argmax d;  repeat

    embeddings: (n, D). context: (l,) rows that count as chosen already; choice: k picks among (n,) rows. Without
    context the first pick is the row nearest to the mean of the pool. Scores are the distances d at each pick, not
    squared; for a first pick without context, its distance to the mean.

    Distances are computed fast, and rows whose order those distances can't tell are compared by direct differences in
    float64, so that the picks are those of exact arithmetic and exact ties go to the lowest row.

    >>> line = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    >>> from queryselect_service.shards import Whole
    >>> four = Whole(4)
    >>> choice = Choice(2, torch.ones(4, dtype=torch.bool), four)
    >>> k_center_greedy(line, choice=choice, context=torch.tensor([0]), pool=four).indices
    tensor([3, 2])
    """
    points = Points(embeddings, pool, normalize=spec.normalize)
    n, dims, device = *embeddings.shape, embeddings.device
    k, available = choice.k, int(choice.free.count_nonzero())
    nearest = torch.full((n,), math.inf, dtype=points.work.dtype, device=device)  # squared, fast

    labeled = [block for (block,) in pool.blocks(embeddings[context])]  # of all slices
    for block in labeled:
        points.update_nearest(nearest, block)

    indices = torch.empty(k, dtype=torch.int64, device=device)
    scores = torch.empty(k, dtype=torch.float64, device=device)
    picks = torch.empty(k, dims, dtype=embeddings.dtype, device=device)  # (k, D)
    made, ended, cold = 0, False, not labeled
    if cold:
        best, score, row = choice.best(points.to_mean().neg_(), embeddings)
        ended = choice.ends(score)
        if not ended:
            indices[0], scores[0], picks[0], made = best, -score, row, 1
            choice.take(best)
            points.update_nearest(nearest, row[None])

    # The exact distances of rows that have been looked at, to what is labelled and picks[:known]; -1 for none.
    distance = torch.full((n,), math.inf, dtype=torch.float64, device=device)
    known = torch.full((n,), -1, dtype=torch.int32, device=device)
    while made < k and not ended:
        pool.progress(made, k)
        # Rows that may be the farthest, as far as fast distances can tell, are compared exactly.
        leaders = _leaders(points, nearest, choice.free)
        behind = known[leaders]
        groups = torch.unique(behind.cpu()).tolist()  # on the host, so that the device is waited for once
        for seen in groups:  # so that no pair is computed twice
            late = leaders if len(groups) == 1 else leaders[behind == seen]
            centres = [*labeled, picks[:made]] if seen < 0 else [picks[seen:made]]
            distance[late] = torch.minimum(distance[late], points.direct(late, *centres))
        known.index_fill_(0, leaders, made)
        best, score, row = pool.best(
            torch.full_like(distance, -math.inf).index_copy_(0, leaders, distance[leaders]), embeddings
        )
        ended = choice.ends(score)
        # When every row left repeats a row that is labelled or chosen, all of them lead, and their order is the rows'
        # own. Where fewer lead, the device need not be asked for the score; limits have asked for it already.
        all_lead = choice.limited or len(leaders) >= available - made
        if all_lead and not score > 0 and not choice.reopens:
            rows, zeros = choice.walk(torch.zeros_like(distance), k - made)
            indices[made : made + len(rows)], scores[made : made + len(rows)] = rows, zeros
            made, ended = made + len(rows), True
        elif not ended:
            indices[made], scores[made], picks[made], made = best, score, row, made + 1
            choice.take(best)
            points.update_nearest(nearest, row[None])
    indices, scores = indices[:made], scores[:made]
    covered = indices[cold:][scores[cold:] == 0]

    def pool_scores() -> Tensor:
        if not labeled:
            return points.to_mean().neg_() / points.scale  # nearest is best
        return points.direct(torch.arange(n, device=device), *labeled) / points.scale

    return Selection(indices, scores / points.scale, pool_scores, _notices(points, spec, covered))


def _leaders(points: Points, nearest: Tensor, free: Tensor) -> Tensor:
    """The free rows (l,) here that may be the farthest from their nearest centres."""
    error = points.error_bound(nearest)
    _, threshold = points.pool.best(torch.where(free, nearest - error, -math.inf))
    return (free & (nearest + error >= threshold)).nonzero().squeeze(1)


def _notices(points: Points, spec: KCenterGreedy, covered: Tensor) -> tuple[Notice, ...]:
    notices = []
    if spec.normalize:
        inert = points.pool.offset + points.inert().nonzero().squeeze(1)
        zero = torch.cat([inert[:0], *(block for (block,) in points.pool.blocks(inert))])  # of all slices
        if len(zero):
            message = f"{len(zero)} rows have length 0 and stay there when normalized"
            notices.append(Notice(NoticeCode.INERT_ROWS, message, zero))
    if len(covered):
        notices.append(
            Notice(
                NoticeCode.COVERED,
                f"{len(covered)} picks repeat rows that are labelled or chosen already",
                covered,
            )
        )
    return tuple(notices)
