"""k-means: one row near the middle of every cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from queryselect_service.maths import kmeans
from queryselect_service.maths.distances import Points
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, strategy


@dataclass(frozen=True)
class KMeans(Spec):
    """Its parameters."""

    normalize: bool = parameter(False, "Whether every row is scaled to unit Euclidean length first")


def _memory(sizes: Sizes, spec: KMeans) -> int:
    return kmeans.memory(sizes.N, sizes.D, sizes.item, sizes.k, normalize=spec.normalize)


@strategy(
    KMeans,
    kind=ScoreKind.DISTANCE,
    pool_scores=False,
    seeded=True,
    cost="O(N D k) time per iteration, at most 100 of them, O(N D + k D) memory",
    memory=_memory,
    work=lambda sizes: kmeans.ITERATIONS * float(sizes.N) * sizes.D * sizes.k,
    citation="Lloyd, Least squares quantization in PCM (IEEE Transactions on Information Theory 28, 1982); Arthur and "
    "Vassilvitskii, k-means++: the advantages of careful seeding (SODA 2007)",
)
def k_means(
    embeddings: Annotated[Tensor, "N D"],
    weights: Annotated[Tensor, "N"] | None = None,
    *,
    choice: Choice,
    spec: KMeans = KMeans(),
    seed: int = 0,
    pool: Shards,
) -> Selection:
    """Prefers rows nearest to the centres of as many clusters as there are picks.

        c_1 … c_k = argmin sum_i w_i min_j |x_i - c_j|^2;  pick argmin |x - c_j| for every j, the heaviest first

    embeddings: (n, D), all of which are clustered: rows that are labelled or pending have their share of the mass, and
    so have rows that are no candidates; none of them is chosen. weights: (n,), the mass of each row, by default 1.
    choice: k picks among (n,) rows. Picks come in the order of their clusters' masses, largest first; a row that is
    nearest to two centres represents the first, and the next nearest the second. Where there are fewer distinct rows
    than picks, rows nearest to any centre follow, with a warning. Scores are minus the distances to the centre, not
    squared.

    >>> import torch
    >>> from queryselect_service.shards import Whole
    >>> line = torch.tensor([[0.0], [1.0], [2.0], [8.0], [9.5]])
    >>> five = Whole(5)
    >>> k_means(line, choice=Choice(2, torch.ones(5, dtype=torch.bool), five), pool=five).indices
    tensor([1, 3])
    """
    points = Points(embeddings, pool, normalize=spec.normalize)
    clusters = kmeans.k_means(points, choice.k, seed, weights)
    indices, scores, made = kmeans.representatives(points, clusters, choice, choice.k)
    notices = points.inert_rows() if spec.normalize else ()
    return Selection(indices, scores, None, (*notices, *_repeated(indices[made:])))


def _repeated(rows: Tensor) -> tuple[Notice, ...]:
    """A warning of picks (r,) that represent no cluster of their own."""
    if not len(rows):
        return ()
    message = f"there are not enough distinct rows: {len(rows)} picks are further rows near to centres"
    return (Notice(NoticeCode.FALLBACK, message, rows),)
