"""DropQuery, against its definition."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from benchmarks.kernels.k_means import representatives
from queryselect_service.strategy import Sizes

PASSES, DROPOUT, ENOUGH = 3, 0.75, 25


def with_head(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Embeddings (N, D), normal, and a head's weights (C, D)."""
    sizes = case.sizes
    head = torch.randn(sizes.C, sizes.D, generator=generator, device=generator.device)
    return {**pools.embeddings(case, generator), "head_weights": head.to(case.dtype)}


def by_definition(problem: Problem) -> Tensor:
    """Numpy's masks and products, k-means of scikit-learn, and the row nearest to each centre."""
    x, head = problem.array("embeddings"), problem.array("head_weights")
    rng, plain = np.random.default_rng(problem.seed), (x @ head.T).argmax(1)
    changed = np.zeros(len(x), dtype=int)
    for _ in range(PASSES):
        changed += ((x * (rng.random(x.shape) >= DROPOUT)) @ head.T).argmax(1) != plain
    free, threshold = problem.candidates.cpu().numpy(), PASSES // 2
    while threshold and (free & (changed > threshold)).sum() < ENOUGH * problem.k:
        threshold -= 1
    rows = np.flatnonzero(free & (changed > threshold))
    some = x[rows] / np.linalg.norm(x[rows], axis=1, keepdims=True)
    return torch.from_numpy(rows[representatives(some, problem.k, problem.seed, np.ones(len(some), dtype=bool))])


BENCHMARKS = (
    Benchmark(
        strategy="drop_query",
        make=with_head,
        peers=(Peer("the definition", by_definition, "numpy, and k-means by scikit-learn", rounds=1),),
        # The passes, the start of k-means, and a few iterations at the least.
        floor=lambda sizes: {"gemm f32": 2 * sizes.N * sizes.D * (sizes.C * (PASSES + 1) + 5 * sizes.k)},
        quick=Case(Sizes(N=300, D=16, C=4, k=10)),
        cpu=(
            Case(Sizes(N=50_000, D=384, C=10, k=100), rounds=1),
            Case(Sizes(N=200_000, D=384, C=10, k=100), peak=4, rounds=1),
        ),
        cuda=(Case(Sizes(N=1_280_000, D=384, C=100, k=1000)),),
        scaling=Scaling(Sizes(N=10_000, D=64, C=10, k=20), {"N": (5_000, 40_000), "D": (48, 384), "k": (10, 80)}),
    ),
)
