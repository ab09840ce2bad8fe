"""EPIG, against baal's and its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Problem, Scaling
from benchmarks.committee import baal
from benchmarks.published.epig import PEERS
from queryselect_service.strategy import Sizes


def by_baal(x: Any, problem: Problem) -> Tensor:
    """Its heuristic, which makes all joint probabilities at once."""
    from baal.active.heuristics import EPIG

    targets = np.ascontiguousarray(problem.array("target_samples").swapaxes(1, 2))
    return torch.from_numpy(EPIG()(x, targets)[: problem.k].copy())


def floor(sizes: Sizes) -> dict[str, float]:
    """The joint probabilities, and a logarithm of each."""
    joint = float(sizes.N) * sizes.M * sizes.C**2
    return {"gemm f64": 2 * sizes.K * joint, "log": joint}


BENCHMARKS = (
    Benchmark(
        strategy="epig",
        make=pools.with_targets,
        peers=(baal(by_baal, "EPIG"), *PEERS),
        floor=floor,
        quick=Case(Sizes(N=300, K=8, C=5, M=20, k=10)),
        cpu=(Case(Sizes(N=5_000, K=100, C=10, M=200, k=100)),),
        cuda=(Case(Sizes(N=50_000, K=100, C=10, M=1000, k=1000)),),
        scaling=Scaling(
            Sizes(N=1000, K=64, C=8, M=64, k=10),
            {"N": (500, 4000), "K": (32, 256), "C": (4, 32), "M": (32, 256)},
        ),
    ),
)
