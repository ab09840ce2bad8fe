"""TypiClust: the typical rows of clusters that are not labelled yet."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths import kmeans, typicality
from queryselect_service.maths.distances import Points
from queryselect_service.maths.farthest import farthest_rows
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, strategy

#: Added to mean distances, as in the authors' code.
EPSILON = 1e-5


class Distance(enum.StrEnum):
    """What the distances to neighbours are that are averaged."""

    SQUARED_L2 = "SQUARED_L2"
    L2 = "L2"


@dataclass(frozen=True)
class Typiclust(Spec):
    """Its parameters."""

    max_clusters: int = parameter(500, "The most clusters that k-means makes", low=1, unit="clusters")
    min_cluster_size: int = parameter(5, "Clusters of at most so many rows, labelled ones too, are left out", low=0)
    neighbors: int = parameter(20, "The neighbours whose distance counts, at most half of a cluster", low=1)
    distance: Distance = parameter(
        Distance.SQUARED_L2,
        "Whether neighbours' distances are squared, as in the authors' code, or not, as in the paper",
    )
    normalize: bool = parameter(True, "Whether every row is scaled to unit Euclidean length first")


def memory(sizes: Sizes, spec: Typiclust) -> int:
    """Of k-means, of a cluster, and of the rows that a traversal starts from."""
    clusters = min(sizes.L + sizes.k, spec.max_clusters)
    clustering = kmeans.memory(sizes.N, sizes.D, sizes.item, clusters, normalize=spec.normalize)
    one = typicality.memory(sizes.N, sizes.D, sizes.item, spec.neighbors)  # all rows may be one cluster
    return clustering + one + 2 * (sizes.L + sizes.k) * sizes.D * sizes.item


def work(sizes: Sizes) -> float:
    """Of k-means, and of comparing the rows of each cluster."""
    clusters = min(sizes.L + sizes.k, Typiclust().max_clusters)
    return float(sizes.N) * sizes.D * (kmeans.ITERATIONS * clusters + sizes.N / max(1, clusters))


@strategy(
    Typiclust,
    kind=ScoreKind.DENSITY,
    pool_scores=False,
    seeded=True,
    cost="O(N D c) time per iteration of k-means into c = min(L + k, max_clusters) clusters, O(D m²) per pick from a "
    "cluster of m rows; O(N D) memory",
    memory=memory,
    work=work,
    citation="Hacohen, Dekel and Weinshall, Active learning on a budget: opposite strategies suit high and low budgets "
    "(ICML 2022), arXiv:2202.02794, section 3; clusters, their order and distances as in the authors' code",
)
def typiclust(
    embeddings: Annotated[Tensor, "N D"],
    clusters: Annotated[Tensor, "N"] | None = None,
    *,
    choice: Choice,
    spec: Typiclust = Typiclust(),
    context: Tensor,
    seed: int = 0,
    pool: Shards,
) -> Selection:
    """Prefers the most typical row of each cluster, clusters with few labelled rows and then large ones first.

        typicality(x) = 1 / (mean over the nearest neighbours x' of x in its cluster of d(x, x') + 1e-5)

    embeddings: (n, D), of all rows. clusters: (n,) the caller's own cluster of each row, any integers, in place of
    k-means with min(L + k, max_clusters) clusters. context: (l,) rows that count as labelled. choice: k picks among
    (n,) rows.

    Clusters of more than min_cluster_size rows take turns, in the order of (labelled rows ascending, size descending,
    number ascending). Members are the rows of a cluster that are neither labelled nor picked; d is the distance, or its
    square, to min(neighbors, half the members) of them, and a row alone has typicality 0. A labelled row that may be
    chosen is no member. A cluster that runs dry is passed over; when all have, rows follow that are farthest from
    everything labelled or picked, with a warning. Scores are typicalities, and these distances.

    >>> from queryselect_service.shards import Whole
    >>> line = torch.tensor([[0.0], [1.0], [2.0], [7.0], [8.0], [9.5]])
    >>> six, spec = Whole(6), Typiclust(min_cluster_size=2, normalize=False)
    >>> choice = Choice(2, torch.ones(6, dtype=torch.bool), six)
    >>> two = torch.tensor([1, 1, 1, 4, 4, 4])
    >>> typiclust(line, two, choice=choice, spec=spec, context=torch.tensor([0]), pool=six).indices
    tensor([3, 1])
    """
    points = Points(embeddings, pool, normalize=spec.normalize)
    remaining = torch.ones_like(choice.free)
    remaining[context] = False
    if clusters is None:
        labeled = int(pool.sum((~remaining).count_nonzero()))
        made = kmeans.k_means(points, min(labeled + choice.k, spec.max_clusters), seed)
        labels, count = made.labels, len(made.centres)
    else:
        labels, count = _numbered(clusters.long(), pool)
    order, small = _order(labels, count, context, spec.min_cluster_size, pool)
    indices: list[Tensor] = []
    scores: list[Tensor] = []
    for cluster in _turns(order, labels, remaining, choice, pool):
        pool.progress(len(indices), choice.k)
        best, score = _most_typical(points, remaining & (labels == cluster), choice, spec)
        if float(score) == -math.inf:  # limits have closed what was left of it
            continue
        choice.take(best)
        remaining &= torch.arange(pool.offset, pool.offset + len(remaining), device=best.device) != best
        indices.append(best)
        scores.append(score)
        if len(indices) == choice.k:
            break
    none = torch.empty(0, dtype=torch.int64, device=labels.device)
    found, typical = torch.stack(indices) if indices else none, torch.stack(scores) if scores else none.double()
    notices = points.inert_rows() if spec.normalize else ()
    if len(indices) == choice.k:
        return Selection(found, typical, None, notices)
    far, distances = farthest_rows(points, choice, context, found)
    warnings = _fallen_back(far, small, spec.min_cluster_size)
    return Selection(torch.cat([found, far]), torch.cat([typical, distances]), None, (*notices, *warnings))


def _numbered(clusters: Tensor, pool: Shards) -> tuple[Tensor, int]:
    """Clusters (n,) of any numbers -> the same (n,) numbered from 0 on, in their order; and how many there are."""
    numbers = torch.unique(torch.cat([block for (block,) in pool.blocks(torch.unique(clusters))]))
    return torch.searchsorted(numbers, clusters), len(numbers)


def _order(labels: Tensor, count: int, context: Tensor, least: int, pool: Shards) -> tuple[list[int], int]:
    """The clusters of more than `least` rows: with fewest labelled rows first, then the largest, then the first.

    Returns how many are left out, too.
    """
    both = torch.stack([torch.bincount(each, minlength=count) for each in (labels, labels[context])])
    sizes, covered = pool.sum(both).tolist()
    large = [cluster for cluster, size in enumerate(sizes) if size > least]
    return sorted(large, key=lambda c: (covered[c], -sizes[c], c)), sum(size > 0 for size in sizes) - len(large)


def _turns(order: list[int], labels: Tensor, remaining: Tensor, choice: Choice, pool: Shards) -> Iterator[int]:
    """Round after round the clusters that have members left that may be chosen, until a round brings no pick.

    remaining: (n,) bool, members that are left; the caller keeps it up to date.
    """
    before, most = -1, max(order, default=-1) + 1
    while True:
        counts = torch.bincount(labels[choice.free & remaining], minlength=most)[:most]
        left, *members = pool.sum(torch.cat([remaining.count_nonzero()[None], counts])).tolist()
        if left == before or not any(members[cluster] for cluster in order):
            return
        before = left
        yield from (cluster for cluster in order if members[cluster])


def _most_typical(points: Points, members: Tensor, choice: Choice, spec: Typiclust) -> tuple[Tensor, Tensor]:
    """The free member of the highest typicality, members being (n,) bool: its global row, and that."""
    squared = spec.distance is Distance.SQUARED_L2
    at = members.nonzero().squeeze(1)
    rows, means = typicality.neighborhoods(points, at, choice.free[at], spec.neighbors, squared=squared)
    nearness = torch.full(members.shape, -math.inf, dtype=torch.float64, device=at.device).index_copy_(0, rows, -means)
    best, near = choice.best(nearness)
    alone = near == 0 and int(points.pool.sum(members.count_nonzero())) == 1
    apart = -near / points.scale / (points.scale if squared else 1)
    return best, torch.where(near == -math.inf, near, 0 if alone else 1 / (apart + EPSILON))


def _fallen_back(rows: Tensor, small: int, least: int) -> Iterator[Notice]:
    if len(rows):
        message = f"no cluster had rows left for {len(rows)} picks: their scores are distances to what came before"
        yield Notice(NoticeCode.FALLBACK, message, rows)
        if small:
            yield Notice(NoticeCode.SMALL_CLUSTERS, f"{small} clusters of at most {least} rows were left out")
