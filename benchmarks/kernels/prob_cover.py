"""ProbCover."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from queryselect_service.strategy import Sizes

#: Of normal rows scaled to unit length, which are about √2 apart, some have this near.
DELTA = 1.2


def by_definition(problem: Problem) -> Tensor:
    """The definition: the graph of all pairs as a matrix, and every degree at every step."""
    x = problem.array("embeddings").astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    edges = x @ x.T > 1 - DELTA**2 / 2
    covered = edges[problem.context.cpu().numpy()].any(0)
    free, picks = problem.candidates.cpu().numpy().copy(), []
    for _ in range(problem.k):
        degrees = edges[:, ~covered].sum(1)
        picks.append(int(np.where(free, degrees, -math.inf).argmax()))
        free[picks[-1]] = False
        covered |= edges[picks[-1]]
    return torch.tensor(picks)


BENCHMARKS = (
    Benchmark(
        strategy="prob_cover",
        make=pools.embeddings,
        peers=(Peer("numpy", by_definition, "the definition", exact=True),),
        # Every pair at least once.
        floor=lambda sizes: {"gemm f32": 2 * sizes.N * sizes.N * sizes.D},
        quick=Case(Sizes(N=300, D=16, L=5, k=10)),
        cpu=(Case(Sizes(N=20_000, D=384, L=100, k=100), ceiling=4),),
        cuda=(Case(Sizes(N=100_000, D=384, L=100, k=100)),),
        scaling=Scaling(
            Sizes(N=4_000, D=64, L=20, k=20),
            {"N": (2_000, 16_000), "D": (48, 384), "k": (10, 80)},
        ),
        params={"delta": DELTA},
    ),
)
