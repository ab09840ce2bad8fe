"""k-center greedy, the core-set strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.distances import Points
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Notice, NoticeCode, ScoreKind, Selection, strategy


@dataclass(frozen=True)
class KCenterGreedy(Spec):
    """Its parameters."""

    normalize: bool = parameter(False, "Whether every row is scaled to unit Euclidean length first")


@strategy(
    KCenterGreedy,
    kind=ScoreKind.DISTANCE,
    cost="O(N D (L + k)) time, O(N D) memory",
    citation="Sener and Savarese, Active learning for convolutional neural networks: a core-set approach (ICLR 2018), "
    "arXiv:1708.00489, algorithm 1",
)
def k_center_greedy(
    embeddings: Annotated[Tensor, "N D"],
    *,
    k: int,
    spec: KCenterGreedy = KCenterGreedy(),
    context: Tensor,
    candidates: Tensor,
    pool: Shards,
) -> Selection:
    """Prefers the row farthest from everything that is labelled or chosen so far (farthest-first traversal).

        d(x) = min over c in context and picks of |x - c|;  pick argmax d;  repeat

    embeddings: (n, D). context: (l,) rows that count as chosen already; candidates: (n,) bool. Without context the
    first pick is the row nearest to the mean of the pool. Scores are the distances d at each pick, not squared; for
    a first pick without context, its distance to the mean.

    Distances are computed fast, and rows whose order those distances can't tell are compared by direct differences in
    float64, so that the picks are those of exact arithmetic and exact ties go to the lowest row.

    >>> line = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    >>> from queryselect_service.shards import Whole
    >>> everything = torch.ones(4, dtype=torch.bool)
    >>> k_center_greedy(line, k=2, context=torch.tensor([0]), candidates=everything, pool=Whole(4)).indices
    tensor([3, 2])
    """
    points = Points(embeddings, pool, normalize=spec.normalize)
    n, dims, device = *embeddings.shape, embeddings.device
    rows = torch.arange(pool.offset, pool.offset + n, device=device)
    free = candidates.clone()
    nearest = torch.full((n,), math.inf, dtype=points.work.dtype, device=device)  # squared, fast
    distance = torch.full((n,), math.inf, dtype=torch.float64, device=device)  # exact, to centres[:known]
    known = torch.zeros(n, dtype=torch.int64, device=device)

    labeled = int(pool.sum(torch.tensor(len(context), device=device)))
    centres = torch.empty(labeled + k, dims, dtype=embeddings.dtype, device=device)
    filled = 0
    for (block,) in pool.blocks(embeddings[context]):
        centres[filled : filled + len(block)] = block
        filled += len(block)
        points.update_nearest(nearest, block)

    indices = torch.empty(k, dtype=torch.int64, device=device)
    scores = torch.empty(k, dtype=torch.float64, device=device)
    first = 0
    if labeled == 0:
        to_mean = _distance_to_mean(points)
        best, score, row = pool.best(torch.where(free, -to_mean, -math.inf), embeddings)
        indices[0], scores[0], centres[0] = best, -score, row
        free &= rows != best
        points.update_nearest(nearest, row[None])
        filled, first = 1, 1

    for step in range(first, k):
        pool.progress(step, k)
        # Rows that may be the farthest, as far as fast distances can tell, are compared exactly.
        error = points.error_bound(nearest)
        _, threshold = pool.best(torch.where(free, nearest - error, -math.inf))
        leaders = (free & (nearest + error >= threshold)).nonzero().squeeze(1)
        for seen in torch.unique(known[leaders]).tolist():  # so that no pair is computed twice
            late = leaders[known[leaders] == seen]
            distance[late] = torch.minimum(distance[late], points.direct(embeddings[late], centres[seen:filled]))
        known[leaders] = filled
        leading = torch.full_like(distance, -math.inf)
        leading[leaders] = distance[leaders]
        best, score, row = pool.best(leading, embeddings)
        if not score > 0:  # every candidate left repeats a row that is labelled or chosen: the order is the rows' own
            indices[step:], scores[step:] = pool.top(torch.zeros_like(distance), k - step, free)
            covered = indices[step:]
            break
        indices[step], scores[step], centres[filled] = best, score, row
        filled += 1
        free &= rows != best
        points.update_nearest(nearest, row[None])
    else:
        covered = indices[:0]

    def pool_scores() -> Tensor:
        if labeled == 0:
            return -to_mean / points.scale  # nearest is best
        return points.direct(embeddings, centres[:labeled]) / points.scale

    return Selection(indices, scores / points.scale, pool_scores, _notices(points, spec, rows, covered))


def _distance_to_mean(points: Points) -> Tensor:
    """The distance (n,) of every row to the mean of all, float64."""
    to_mean = torch.empty(len(points.embeddings), dtype=torch.float64, device=points.mean.device)
    for span in points.pool.spans(len(to_mean), 8 * len(points.mean)):
        to_mean[span] = (points.exact(points.embeddings[span]) - points.mean).norm(dim=1)
    return to_mean


def _notices(points: Points, spec: KCenterGreedy, rows: Tensor, covered: Tensor) -> tuple[Notice, ...]:
    notices = []
    if spec.normalize:
        zero = torch.cat([rows[:0], *(block for (block,) in points.pool.blocks(rows[points.inert]))])  # of all slices
        if len(zero):
            message = f"{len(zero)} rows have length 0 and stay there when normalized"
            notices.append(Notice(NoticeCode.INERT_ROWS, message, zero))
    if len(covered):
        notices.append(
            Notice(
                NoticeCode.COVERED,
                f"the last {len(covered)} picks repeat rows that are labelled or chosen already",
                covered,
            )
        )
    return tuple(notices)
