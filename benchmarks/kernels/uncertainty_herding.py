"""Uncertainty herding."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.kernels.max_herding import NUMPY, greedy, part, scaled
from queryselect_service.strategy import Sizes


def by_definition(problem: Problem) -> Tensor | Part:
    """The greedy of max_herding, a row's mass 1 less its margin, 0 where it is labelled."""
    some = part(problem)
    p = np.sort(some.array("probabilities").astype(np.float64), axis=1)
    mass = 1 - (p[:, -1] - p[:, -2]) / p.sum(1)
    mass[some.context.cpu().numpy()] = 0
    return scaled(lambda: greedy(some, mass), problem, some)


BENCHMARKS = (
    Benchmark(
        strategy="uncertainty_herding",
        make=pools.classified,
        peers=(Peer(NUMPY, by_definition, "the definition", exact=True, rounds=1),),
        floor=lambda sizes: {"gemm f64": 2 * sizes.N * sizes.N * sizes.D},
        quick=Case(Sizes(N=300, D=16, C=4, L=5, k=10)),
        cpu=(
            Case(Sizes(N=10_000, D=384, C=10, L=100, k=100), ratios={NUMPY: 10}, peak=4),
            Case(Sizes(N=50_000, D=384, C=10, L=100, k=100), ratios={NUMPY: 10}, peak=4, rounds=1),
        ),
        cuda=(Case(Sizes(N=50_000, D=384, C=10, L=100, k=100)),),
        scaling=Scaling(
            Sizes(N=2_000, D=64, C=10, L=20, k=20),
            {"N": (1_000, 8_000), "D": (48, 384), "k": (10, 80)},
        ),
    ),
)
