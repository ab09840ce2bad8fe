"""The Fisher kernel, against its authors' scheme."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Scaling
from benchmarks.published.fisher_kernel import PEERS, SCHEME
from queryselect_service.strategy import Sizes

#: Of all features, the parts of three scales of a small network, as its layers have them.
PARTS = (8, 4)


def make(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Rows around centres of classes.

    With classes: three scales, a head on the last, which is wrong about a third of the references. Without: one scale
    with gradients, and all references misclassified.
    """
    sizes, device = case.sizes, generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=case.dtype)

    if not sizes.C:
        half = sizes.S // 2
        found = {"validation_misclassified": torch.ones(sizes.M, dtype=torch.bool, device=device)}
        for prefix, rows in (("", sizes.N), ("validation_", sizes.M)):
            found[f"{prefix}scales[0].embeddings"] = normal(rows, half)
            found[f"{prefix}scales[0].gradients"] = normal(rows, half)
        return found
    widths = [max(2, sizes.S // part) for part in PARTS]
    widths.append(sizes.S - sum(widths))
    middles = [normal(sizes.C, width) for width in widths]
    weights = middles[-1] * 1.2 / math.sqrt(widths[-1])
    found = {"head_weights": weights}
    for prefix, rows in (("", sizes.N), ("validation_", sizes.M)):
        own = torch.randint(sizes.C, (rows,), generator=generator, device=device)
        for at, (middle, width) in enumerate(zip(middles, widths, strict=True)):
            found[f"{prefix}scales[{at}].embeddings"] = normal(rows, width) + 1.5 / math.sqrt(width) * middle[own]
        found[f"{prefix}probabilities"] = (found[f"{prefix}scales[2].embeddings"] @ weights.T).softmax(1)
        if prefix:
            found[f"{prefix}labels"] = own
    return found


def floor(sizes: Sizes) -> dict[str, float]:
    """The products: of rows and all references for labels, of rows and centres; of references and centres."""
    labels = sizes.S * sizes.M if sizes.C else 0
    width = sizes.S + min(sizes.C, sizes.S)
    references = 0.0 if sizes.C else 2.0 * sizes.k * sizes.M * sizes.S
    return {"gemm f32": 2.0 * sizes.N * (labels + sizes.k * width) + references}


PLAIN = Benchmark(
    strategy="fisher_kernel",
    params={"kernel": "SUM", "first_center": 0},
    make=make,
    peers=PEERS,
    floor=floor,
    quick=Case(Sizes(N=400, S=16, M=60, k=8)),
    cpu=(
        Case(Sizes(N=30_000, S=1536, M=3000, k=200), ratios={SCHEME: 2}),
        Case(Sizes(N=500, S=1536, M=3000, k=200), ratios={SCHEME: 3}),  # k-centres, and little else
    ),
    cuda=(Case(Sizes(N=500_000, S=1536, M=20_000, k=1250)),),
    scaling=Scaling(
        Sizes(N=20_000, S=256, M=2000, k=100),
        {"N": (10_000, 80_000), "S": (128, 1024), "M": (1000, 8000), "k": (50, 400)},
    ),
)
LABELS = replace(
    PLAIN,
    params={"kernel": "SUM"},
    quick=Case(Sizes(N=400, S=24, C=4, M=60, k=8)),
    cpu=(Case(Sizes(N=50_000, S=80, C=10, M=10_000, k=125), ratios={SCHEME: 2}),),
    cuda=(Case(Sizes(N=500_000, S=768, C=10, M=104_000, k=1250)),),
    scaling=Scaling(
        Sizes(N=10_000, S=80, C=10, M=2000, k=50), {"N": (5_000, 40_000), "M": (1000, 8000), "C": (10, 80)}
    ),
)


def coarse(benchmark: Benchmark, ratio: float) -> Benchmark:
    """The same by bfloat16 products."""
    cases = tuple(replace(case, ratios={SCHEME: ratio}) for case in benchmark.cpu[:1])
    return replace(benchmark, params={**benchmark.params, "coarse_products": True}, cpu=cases)


BENCHMARKS = (PLAIN, LABELS, coarse(PLAIN, 4), coarse(LABELS, 4))
