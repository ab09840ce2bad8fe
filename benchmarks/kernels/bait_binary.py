"""BAIT with the Fisher information of the likeliest class against the others, against the published algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from benchmarks.published.bait import TEXT, TEXT_F64, Design, Factors, Form, backward, forward_steps, judge, peers
from queryselect_service.strategy import Sizes

FORM = Form(binary=True)
SINGLE = "one pass per pick"


def one_pass(problem: Problem) -> Tensor:
    """Ours without the guesses, in plain float32 and therefore not exact: every pick updates G and H in one pass.

    u = A v / sqrt(1 + G),  w = A F u,  P = V_x^T u,  W = V_x^T w:   G_x <- G_x - P^2,  H_x <- H_x - 2 P W + P^2 u^T F u
    """
    factors = Factors(problem, FORM)
    design = Design(problem, FORM, factors)
    lengths = factors.scale * factors.heads.flatten()  # (N,)
    products = zip(*(design.products(v) for v in factors.batches()), strict=True)
    g, h = (torch.cat(parts).flatten() for parts in products)  # (N,)
    free, chosen = problem.candidates.clone(), problem.context[:0]
    for _ in range(forward_steps(problem)):
        best = torch.where(free, h / (1 + g), -1).argmax()
        free[best], chosen = False, torch.cat([chosen, best[None]])
        v = lengths[best] * factors.x[best]  # (D,)
        u = design.inverse @ v / (1 + g[best]).sqrt()
        fu = design.fisher @ u
        p, w = (torch.stack([u, design.inverse @ fu]) @ factors.x.T) * lengths  # (N,) each
        h -= p * (2 * w - p * (u @ fu))
        g -= p.square_()
        design.move(v[None], 1)
    return backward(problem, factors, design, chosen)


def floor(sizes: Sizes) -> dict[str, float]:
    """One pass over the embeddings per forward step, 2 k of them; and F (half of it, it is symmetric) and H_0."""
    return {
        "read": sizes.item * sizes.N * sizes.D * 2 * sizes.k,
        "gemm f32": 3 * sizes.N * sizes.D**2,
    }


BENCHMARKS = (
    Benchmark(
        strategy="bait_binary",
        make=pools.classified,
        peers=(*peers(FORM), Peer(SINGLE, one_pass, "float32")),
        floor=floor,
        quick=Case(Sizes(N=500, D=16, C=4, L=5, k=10), peers=(judge(FORM),)),
        cpu=(
            Case(
                Sizes(N=50_000, D=384, C=10, L=100, k=100),
                ratios={TEXT: 70, TEXT_F64: 70},
                ceiling=0.7,
                peers=(judge(FORM),),
            ),
            Case(
                Sizes(N=200_000, D=384, C=10, L=100, k=100), ratios={TEXT: 120, TEXT_F64: 120, SINGLE: 1.5}, ceiling=0.7
            ),
        ),
        cuda=tuple(
            Case(Sizes(N=1_280_000, D=384, C=100, L=1000, k=1000), dtype, ceiling=0.5)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        scaling=Scaling(
            Sizes(N=20_000, D=128, C=10, L=50, k=25),
            {"N": (12_500, 100_000), "D": (48, 384), "C": (10, 80), "L": (100, 800), "k": (12, 96)},
        ),
    ),
)
