"""TypiClust, then margin: what it takes where enough is labelled. Before, it is typiclust, which has its own file."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from queryselect_service.strategy import Sizes


def margin(problem: Problem) -> Tensor:
    """1 - (p1 - p2) by numpy."""
    p = problem.array("probabilities")
    top = np.partition(p, -2, axis=1)[:, -2:]
    scores = np.where(problem.candidates.cpu().numpy(), 1 - (top[:, 1] - top[:, 0]), -np.inf)
    return torch.from_numpy(np.argsort(-scores, kind="stable")[: problem.k])


BENCHMARKS = (
    Benchmark(
        strategy="typiclust_to_margin",
        params={"switch_at": 0},
        make=pools.classified,
        peers=(Peer("numpy", margin, "margin, and argsort"),),
        floor=lambda sizes: {"read": sizes.item * sizes.N * sizes.C},
        quick=Case(Sizes(N=300, D=16, C=4, L=5, k=10)),
        cpu=(Case(Sizes(N=200_000, D=64, C=10, L=200, k=100)),),
        cuda=(Case(Sizes(N=1_280_000, D=384, C=1000, k=1000)),),
        scaling=Scaling(Sizes(N=50_000, D=16, C=10, k=20), {"N": (50_000, 400_000), "C": (10, 80)}),
    ),
)
