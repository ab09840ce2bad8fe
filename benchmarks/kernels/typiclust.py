"""TypiClust, against scikit-activeml and the published algorithm."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.clock import timed
from queryselect_service.strategy import Sizes

SCIKIT, TEXT = "scikit-activeml", "the published algorithm"
#: Rows that scikit-activeml is run on where there are more.
ROWS = 50_000
#: Clusters up to which the authors run k-means in whole; beyond, on so many rows at a time.
WHOLE, BATCH = 50, 5000
NEIGHBOURS, SMALLEST, EPSILON = 20, 5, 1e-5


def scikit_activeml(problem: Problem) -> Tensor | Part:
    """Its query strategy, with its own defaults."""
    from skactiveml.pool import TypiClust

    n = len(problem.candidates)
    some = problem.first(ROWS) if n > ROWS else problem
    x, labels = some.array("embeddings"), np.full(len(some.candidates), np.nan)
    labels[some.context.cpu().numpy()] = 0
    seconds, picks = timed(
        lambda: TypiClust(random_state=0).query(x, labels, batch_size=problem.k), torch.device("cpu")
    )
    if n <= ROWS:
        return Part(seconds, "", torch.from_numpy(np.asarray(picks)))
    return Part(seconds * n / ROWS, f"{ROWS} of {n} rows, scaled")


def published(problem: Problem) -> Tensor:
    """k-means of scikit-learn, in whole or by batches as the authors have it, and neighbours within each cluster."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    x = problem.array("embeddings").astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labeled, k = problem.context.cpu().numpy(), problem.k
    clusters = min(len(labeled) + k, 500)
    means = (
        KMeans(clusters, n_init=1, random_state=0)
        if clusters <= WHOLE
        else MiniBatchKMeans(clusters, n_init=1, batch_size=BATCH, random_state=0)
    )
    of = means.fit_predict(x)
    sizes, known = np.bincount(of, minlength=clusters), np.bincount(of[labeled], minlength=clusters)
    order = sorted(np.flatnonzero(sizes > SMALLEST), key=lambda cluster: (known[cluster], -sizes[cluster]))
    of[labeled] = -1
    picks: list[int] = []
    while len(picks) < k:
        for cluster in order:
            rows = np.flatnonzero(of == cluster)
            if not len(rows) or len(picks) == k:
                continue
            count = max(1, min(NEIGHBOURS, len(rows) // 2))
            squared = 2 - 2 * x[rows] @ x[rows].T
            nearest = np.partition(squared, min(count, len(rows) - 1), axis=1)[:, 1 : count + 1]
            picks.append(int(rows[(1 / (nearest.mean(1) + EPSILON)).argmax()]) if len(rows) > 1 else int(rows[0]))
            of[picks[-1]] = -1
    return torch.tensor(picks)


BENCHMARKS = (
    Benchmark(
        strategy="typiclust",
        make=pools.classified,
        peers=(
            Peer(SCIKIT, scikit_activeml, distribution=SCIKIT, rounds=1),
            Peer(TEXT, published, "k-means by scikit-learn", rounds=1),
        ),
        # k-means: the start, and a few iterations at the least.
        floor=lambda sizes: {"gemm f32": 10 * sizes.N * sizes.D * min(500, sizes.L + sizes.k)},
        quick=Case(Sizes(N=300, D=16, C=4, L=5, k=10)),
        cpu=(
            Case(Sizes(N=50_000, D=384, C=77, k=100), ratios={SCIKIT: 10, TEXT: 10}),
            Case(Sizes(N=50_000, D=384, C=77, k=1000), ratios={SCIKIT: 10, TEXT: 10}, rounds=1),
            Case(Sizes(N=200_000, D=384, C=77, k=100), peak=4, rounds=1),
        ),
        cuda=(Case(Sizes(N=1_280_000, D=384, C=1000, k=1000)),),
        scaling=Scaling(Sizes(N=10_000, D=64, C=10, k=20), {"N": (5_000, 40_000), "D": (48, 384), "k": (10, 80)}),
    ),
)
