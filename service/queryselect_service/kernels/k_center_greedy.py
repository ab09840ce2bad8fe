"""k-center greedy, the core-set strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.distances import Points, copy_bytes
from queryselect_service.maths.farthest import CROWD, FarthestFirst
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, strategy


@dataclass(frozen=True)
class KCenterGreedy(Spec):
    """Its parameters."""

    normalize: bool = parameter(False, "Whether every row is scaled to unit Euclidean length first")


def _memory(sizes: Sizes, spec: KCenterGreedy) -> int:
    """A moved copy of the rows where Points makes one, centres, numbers per row, spans of float64 rows, a frontier."""
    wide = max(4, sizes.item)
    copy = copy_bytes(sizes.D, sizes.item, normalize=spec.normalize)
    spans = min(3 * SPAN_BYTES // 2, 4 * 8 * sizes.N * sizes.D)
    return (
        sizes.N * (copy + 24 + 8 * wide) + 2 * (sizes.L + sizes.k) * sizes.D * sizes.item + spans + 16 * CROWD * sizes.D
    )


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
    farthest = FarthestFirst(points, choice)
    farthest.add_rows(context)
    labeled = farthest.centres
    indices, scores = farthest.pick(choice.k)
    first = 0 if labeled else 1  # the first pick repeats nothing
    covered = indices[first:][scores[first:] == 0]

    def pool_scores() -> Tensor:
        if not labeled:
            return points.to_mean().neg_() / points.scale  # nearest is best
        return points.direct(torch.arange(len(embeddings), device=embeddings.device), *labeled) / points.scale

    notices = points.inert_rows() if spec.normalize else ()
    if len(covered):
        message = f"{len(covered)} picks repeat rows that are labelled or chosen already"
        notices = (*notices, Notice(NoticeCode.COVERED, message, covered))
    return Selection(indices, scores, pool_scores, notices)
