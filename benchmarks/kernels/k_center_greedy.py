"""k-center greedy, the core-set strategy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.clock import scaled
from queryselect_service.strategy import Sizes

#: Picks that scikit-activeml makes in whole, and those of its two runs where there are more.
WHOLE, FEW = 100, (10, 60)


def scikit_activeml(problem: Problem) -> Tensor | Part:
    """Its query strategy; 1000 picks would take minutes and a matrix (k, N) of float64."""
    from skactiveml.pool import CoreSet

    labels = np.full(len(problem.candidates), np.nan)
    labels[problem.context.cpu().numpy()] = 0

    def select(k: int) -> Tensor:
        return torch.from_numpy(CoreSet().query(problem.array("embeddings"), labels, batch_size=k))

    if problem.k <= WHOLE:
        return select(problem.k)
    start, steps, picks = scaled(select, problem.k, FEW, problem.device)
    return Part(start + steps, f"{FEW[1]} of {problem.k} steps, scaled", picks)


BENCHMARKS = (
    Benchmark(
        strategy="k_center_greedy",
        make=pools.embeddings,
        peers=(Peer("scikit-activeml", scikit_activeml, distribution="scikit-activeml", exact=True),),
        # Two passes for the mean and the norms, one per pick, and a product with what is labelled.
        floor=lambda sizes: {
            "read": sizes.item * sizes.N * sizes.D * (2 + sizes.k),
            "gemm f32": 2 * sizes.N * sizes.D * sizes.L,
        },
        quick=Case(Sizes(N=500, D=16, L=5, k=10)),
        cpu=tuple(
            Case(Sizes(N=200_000, D=384, L=100, k=k), ratios={"scikit-activeml": 20}, ceiling=1, peak=4)
            for k in (100, 1000)
        ),
        cuda=tuple(Case(Sizes(N=1_280_000, D=384, L=1000, k=k)) for k in (100, 1000)),
        scaling=Scaling(
            Sizes(N=50_000, D=128, L=50, k=50),
            {"N": (25_000, 200_000), "D": (48, 384), "L": (100, 800), "k": (25, 200)},
        ),
    ),
)
