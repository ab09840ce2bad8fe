"""ProbCover, against scikit-activeml and the published algorithm."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.clock import timed
from queryselect_service.strategy import Sizes

SCIKIT, TEXT = "scikit-activeml", "the published algorithm"
#: Of normal rows of 384 entries scaled to unit length, which are about √2 apart, one in 800 has this near.
DELTA = 1.3
#: Rows that scikit-activeml is run on where there are more, as it has matrices of all pairs.
ROWS = 10_000
#: Rows that the authors compare with all others at once.
BLOCK = 500


def unit(problem: Problem) -> Tensor:
    """The rows (N, D), scaled to unit length."""
    return torch.nn.functional.normalize(problem.inputs["embeddings"])


def scikit_activeml(problem: Problem) -> Part:
    """Its query strategy with this one radius."""
    from skactiveml.pool import ProbCover

    n = len(problem.candidates)
    some = problem.first(ROWS) if n > ROWS else problem
    x, labels = unit(some).cpu().numpy(), np.full(len(some.candidates), np.nan)
    labels[some.context.cpu().numpy()] = 0

    seconds, _ = timed(
        lambda: ProbCover(n_classes=2, deltas=[DELTA], random_state=0).query(x, labels, batch_size=problem.k),
        torch.device("cpu"),
    )
    said = "" if n == len(labels) else f"{len(labels)} of {n} rows, pairs scaled"
    return Part(seconds * (n / len(labels)) ** 2, said)


def published(problem: Problem) -> Tensor:
    """The graph as a list of its edges, made a block of rows at a time; every degree at every step, by what is left."""
    x, n = unit(problem), len(problem.candidates)
    tails, heads = [], []
    for start in range(0, n, BLOCK):
        rows, others = (torch.cdist(x[start : start + BLOCK], x) < DELTA).nonzero(as_tuple=True)
        tails.append(rows + start)
        heads.append(others)
    tail, head = torch.cat(tails), torch.cat(heads)
    covered = torch.zeros_like(problem.candidates)
    covered[head[torch.isin(tail, problem.context)]] = True
    free, picks = problem.candidates.clone(), []
    for _ in range(problem.k):
        left = ~covered[head]
        tail, head = tail[left], head[left]
        degrees = torch.bincount(tail, minlength=n)
        row = int(torch.where(free, degrees, -1).argmax())
        picks.append(row)
        free[row] = False
        covered[head[tail == row]] = True
    return torch.tensor(picks)


BENCHMARKS = (
    Benchmark(
        strategy="prob_cover",
        make=pools.embeddings,
        peers=(
            Peer(SCIKIT, scikit_activeml, distribution=SCIKIT, rounds=1),
            Peer(TEXT, published, "a list of edges", exact=True),
        ),
        # Every pair at least once.
        floor=lambda sizes: {"gemm f32": 2 * sizes.N * sizes.N * sizes.D},
        quick=Case(Sizes(N=300, D=128, L=5, k=10)),
        cpu=(
            Case(Sizes(N=10_000, D=384, L=100, k=100), ratios={SCIKIT: 6, TEXT: 1}, peak=4),
            Case(Sizes(N=50_000, D=384, L=100, k=100), ratios={SCIKIT: 6, TEXT: 1}, peak=4, rounds=1),
        ),
        cuda=(Case(Sizes(N=100_000, D=384, L=100, k=100)),),
        scaling=Scaling(
            Sizes(N=4_000, D=64, L=20, k=20),
            {"N": (2_000, 16_000), "D": (48, 384), "k": (10, 80)},
        ),
        params={"delta": DELTA},
    ),
)
