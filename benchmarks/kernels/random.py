"""Uniform sampling, against drawing and against a shuffled pool."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from queryselect_service.strategy import Sizes


def shuffle(problem: Problem) -> Tensor:
    """What notebooks do."""
    rows = np.random.default_rng(problem.seed).permutation(len(problem.candidates))
    return torch.from_numpy(rows[: problem.k])


def scikit_activeml(problem: Problem) -> Tensor:
    """Its query strategy, on a pool without labels."""
    from skactiveml.pool import RandomSampling

    n = len(problem.candidates)
    picks = RandomSampling(random_state=problem.seed).query(
        np.zeros((n, 1), np.float32), np.full(n, np.nan), batch_size=problem.k
    )
    return torch.from_numpy(picks)


BENCHMARKS = (
    Benchmark(
        strategy="random",
        make=pools.nothing,
        peers=(
            Peer("numpy", shuffle, "a permutation"),
            Peer("scikit-activeml", scikit_activeml, distribution="scikit-activeml"),
        ),
        floor=lambda sizes: {"read": 8 * sizes.N},  # a look at every key, float64
        quick=Case(Sizes(N=1000, k=10)),
        cpu=(Case(Sizes(N=1_000_000, k=100)),),
        cuda=(Case(Sizes(N=1_280_000, k=1000)),),
        scaling=Scaling(Sizes(N=1_000_000, k=1000), {"N": (500_000, 8_000_000), "k": (1000, 8000)}),
    ),
)
