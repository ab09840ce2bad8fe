"""MaxHerding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from queryselect_service.strategy import Sizes


def greedy(problem: Problem, mass: np.ndarray | None = None) -> Tensor:
    """The definition with bandwidth 1: a matrix of all pairs, and every gain at every step."""
    x = problem.array("embeddings").astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kernel = np.exp(2 * (x @ x.T) - 2)
    mass = np.ones(len(x)) if mass is None else mass
    seen = kernel[:, problem.context.cpu().numpy()].max(1, initial=0.0)
    free, picks = problem.candidates.cpu().numpy().copy(), []
    for _ in range(problem.k):
        gains = mass @ np.maximum(kernel - seen[:, None], 0)
        picks.append(int(np.where(free, gains, -np.inf).argmax()))
        free[picks[-1]] = False
        seen = np.maximum(seen, kernel[:, picks[-1]])
    return torch.tensor(picks)


BENCHMARKS = (
    Benchmark(
        strategy="max_herding",
        make=pools.embeddings,
        peers=(Peer("numpy", greedy, "the definition", exact=True),),
        # Every pair at least once.
        floor=lambda sizes: {"gemm f64": 2 * sizes.N * sizes.N * sizes.D},
        quick=Case(Sizes(N=300, D=16, L=5, k=10)),
        cpu=(Case(Sizes(N=10_000, D=384, L=100, k=20), ratios={"numpy": 3}, ceiling=4),),
        cuda=(Case(Sizes(N=50_000, D=384, L=100, k=100)),),
        scaling=Scaling(
            Sizes(N=2_000, D=64, L=20, k=20),
            {"N": (1_000, 8_000), "D": (48, 384), "k": (10, 80)},
        ),
    ),
)
