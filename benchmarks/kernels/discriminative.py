"""Discriminative active learning by logistic regression."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from queryselect_service.strategy import Sizes

#: Fits, the default; and how often scikit-learn's solver may step.
ROUNDS, STEPS = 10, 1000


def scikit_learn(problem: Problem) -> Tensor:
    """The same objective by its own solver, to its usual precision; the constant is not penalised there."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = StandardScaler().fit_transform(problem.array("embeddings"))
    unlabeled = np.ones(len(x), dtype=int)
    unlabeled[problem.context.cpu().numpy()] = 0
    free = problem.candidates.cpu().numpy().copy()
    picks: list[int] = []
    for number in range(1, ROUNDS + 1):
        scores = LogisticRegression(max_iter=STEPS).fit(x, unlabeled).decision_function(x)
        some = np.argsort(-np.where(free, scores, -np.inf), kind="stable")[: problem.k * number // ROUNDS - len(picks)]
        picks += some.tolist()
        free[some], unlabeled[some] = False, 0
    return torch.tensor(picks)


BENCHMARKS = (
    Benchmark(
        strategy="discriminative",
        make=pools.embeddings,
        peers=(Peer("scikit-learn", scikit_learn, distribution="scikit-learn", rounds=1),),
        # A standardised copy is written once and read by every fit at least twice.
        floor=lambda sizes: {"read": 8 * sizes.N * sizes.D * (1 + 2 * ROUNDS)},
        quick=Case(Sizes(N=300, D=8, L=10, k=20)),
        cpu=(Case(Sizes(N=50_000, D=384, L=100, k=100)),),
        cuda=(Case(Sizes(N=1_000_000, D=384, L=1000, k=1000)),),
        scaling=Scaling(
            Sizes(N=10_000, D=64, L=50, k=50),
            {"N": (5_000, 40_000), "D": (48, 384), "L": (50, 400)},
        ),
    ),
)
