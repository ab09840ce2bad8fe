"""MaxHerding, against scikit-activeml and the definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.clock import timed
from queryselect_service.strategy import Sizes

SCIKIT, NUMPY = "scikit-activeml", "numpy"
#: Rows that peers are run on where there are more, as they have matrices of all pairs.
ROWS = 10_000


def scikit_activeml(problem: Problem) -> Tensor | Part:
    """Its query strategy, with the same kernel; what is labelled adds nothing there, so that picks may differ."""
    from skactiveml.pool import MaxHerding

    some = part(problem)
    x, labels = some.array("embeddings"), np.full(len(some.candidates), np.nan)
    labels[some.context.cpu().numpy()] = 0

    query = MaxHerding(metric_dict={"gamma": 1.0}, random_state=0).query
    return scaled(lambda: torch.from_numpy(query(x, labels, batch_size=problem.k)), problem, some)


def by_definition(problem: Problem) -> Tensor | Part:
    """The definition, with the mass of 1 for every row."""
    some = part(problem)
    return scaled(lambda: greedy(some), problem, some)


def part(problem: Problem) -> Problem:
    """As many rows as peers are run on."""
    return problem.first(ROWS) if len(problem.candidates) > ROWS else problem


def scaled(select: Callable[[], Tensor], problem: Problem, some: Problem) -> Tensor | Part:
    """The picks, where `some` are all rows; else the time on some of them, scaled to all pairs."""
    n, rows = len(problem.candidates), len(some.candidates)
    if n == rows:
        return select()
    seconds, _ = timed(select, problem.device)
    return Part(seconds * (n / rows) ** 2, f"{rows} of {n} rows, pairs scaled")


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
        peers=(
            Peer(SCIKIT, scikit_activeml, distribution=SCIKIT, rounds=1),
            Peer(NUMPY, by_definition, "the definition", exact=True, rounds=1),
        ),
        # Every pair at least once.
        floor=lambda sizes: {"gemm f64": 2 * sizes.N * sizes.N * sizes.D},
        quick=Case(Sizes(N=300, D=16, L=5, k=10)),
        cpu=(
            Case(Sizes(N=10_000, D=384, L=100, k=100), ratios={SCIKIT: 10, NUMPY: 10}, peak=4),
            Case(Sizes(N=50_000, D=384, L=100, k=100), ratios={SCIKIT: 10, NUMPY: 10}, peak=4, rounds=1),
        ),
        cuda=(Case(Sizes(N=50_000, D=384, L=100, k=100)),),
        scaling=Scaling(
            Sizes(N=2_000, D=64, L=20, k=20),
            {"N": (1_000, 8_000), "D": (48, 384), "k": (10, 80)},
        ),
    ),
)
