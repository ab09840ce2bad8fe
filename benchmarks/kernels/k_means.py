"""k-means, and the row nearest to each centre, against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from queryselect_service.strategy import Sizes

SCIKIT = "scikit-learn"


def representatives(x: Any, k: int, seed: int, free: Any) -> Any:
    """Rows (k,) of x (n, D): for each centre of scikit-learn's k-means the nearest free row (n,) that is not taken.

    One start, and Lloyd's iterations to the end.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances

    found = KMeans(k, n_init=1, max_iter=100, tol=0, random_state=seed).fit(x)
    away = pairwise_distances(found.cluster_centers_, x)
    away[:, ~free] = np.inf
    picks: list[int] = []
    for row in away:
        picks.append(int(row.argmin()))
        away[:, picks[-1]] = np.inf
    return np.array(picks)


def scikit_learn(problem: Problem) -> Tensor:
    """On all rows."""
    free = problem.candidates.cpu().numpy()
    return torch.from_numpy(representatives(problem.array("embeddings"), problem.k, problem.seed, free))


BENCHMARKS = (
    Benchmark(
        strategy="k_means",
        make=pools.classified,
        peers=(Peer(SCIKIT, scikit_learn, "KMeans, one start", distribution=SCIKIT, rounds=1),),
        # The start, and a few iterations at the least.
        floor=lambda sizes: {"gemm f32": 10 * sizes.N * sizes.D * sizes.k},
        quick=Case(Sizes(N=300, D=16, C=4, k=10)),
        cpu=(
            Case(Sizes(N=50_000, D=384, C=77, k=100), ratios={SCIKIT: 1}),
            Case(Sizes(N=200_000, D=384, C=77, k=100), peak=4, rounds=1),
        ),
        cuda=(Case(Sizes(N=1_280_000, D=384, C=1000, k=1000)),),
        scaling=Scaling(Sizes(N=10_000, D=64, C=10, k=20), {"N": (5_000, 40_000), "D": (48, 384), "k": (10, 80)}),
    ),
)
