"""BAIT with diagonals in place of the matrices, against the published algorithm."""

from __future__ import annotations

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Scaling
from benchmarks.published.bait import Form, judge, peers
from queryselect_service.strategy import Sizes

FORM = Form(diagonal=True)

BENCHMARKS = (
    Benchmark(
        strategy="bait_diagonal",
        make=pools.classified,
        peers=peers(FORM),
        # X^2 a and X^2 (a^2 f), (N, C) each, and the (C, C) factors of G and H made of them, at each of 2 k steps.
        floor=lambda sizes: {"gemm f32": 2 * sizes.k * 4 * sizes.N * sizes.C * (sizes.D + sizes.C**2)},
        quick=Case(Sizes(N=200, D=8, C=4, L=5, k=5), peers=(judge(FORM),)),
        cpu=(Case(Sizes(N=10_000, D=384, C=10, L=100, k=100)),),
        cuda=(Case(Sizes(N=100_000, D=384, C=100, L=1000, k=100)),),
        scaling=Scaling(
            Sizes(N=1500, D=48, C=8, L=16, k=16),
            {"N": (750, 6000), "D": (16, 128), "C": (4, 32), "L": (16, 128), "k": (8, 64)},
        ),
    ),
)
