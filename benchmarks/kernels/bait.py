"""BAIT in full and with the expectation over two classes, against the published algorithm."""

from __future__ import annotations

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Scaling
from benchmarks.published.bait import TEXT, TEXT_F64, Form, judge, peers
from queryselect_service.strategy import Sizes


def benchmark(top_classes: int | None, cuda: tuple[Case, ...] = ()) -> Benchmark:
    """top_classes: the strategy's parameter."""
    form = Form(top_classes=top_classes)

    def floor(sizes: Sizes) -> dict[str, float]:
        """Two products X U and two of the (c, c) factors a step, 2 k steps; F and H_0 by classes or by pairs of rows.

        Counted without what labelled rows cost.
        """
        columns = top_classes or sizes.C
        step = 4 * sizes.N * sizes.C * columns * (sizes.D + columns)
        start = 2 * sizes.N * sizes.D * min(sizes.D * sizes.C**2, sizes.N)
        return {"gemm f32": 2 * sizes.k * step + start}

    return Benchmark(
        strategy="bait",
        params={} if top_classes is None else {"top_classes": top_classes},
        make=pools.classified,
        peers=peers(form),
        floor=floor,
        quick=Case(Sizes(N=200, D=8, C=4, L=5, k=5), peers=(judge(form),)),
        cpu=(
            Case(Sizes(N=10_000, D=384, C=10, L=100, k=100), ratios={TEXT: 500, TEXT_F64: 500}),
            Case(
                Sizes(N=10_000, D=384, C=77, L=100, k=100),
                ratios={TEXT: 500, TEXT_F64: 500},
                peak=8,
                rounds=1 if top_classes is None else 3,
            ),
        ),
        cuda=cuda,
        scaling=Scaling(
            Sizes(N=1500, D=48, C=8, L=16, k=16),
            {"N": (750, 6000), "D": (16, 128), "C": (4, 32), "L": (16, 128), "k": (8, 64)},
        ),
    )


BENCHMARKS = (
    benchmark(2, cuda=(Case(Sizes(N=1_280_000, D=384, C=1000, L=1000, k=100)),)),
    benchmark(None, cuda=(Case(Sizes(N=50_000, D=384, C=100, L=1000, k=100)),)),
)
