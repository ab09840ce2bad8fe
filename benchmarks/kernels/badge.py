"""BADGE, against scikit-activeml and the published algorithm. Draws differ: each has a generator of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.clock import timed
from benchmarks.published import badge
from queryselect_service.strategy import Sizes

SCIKIT = "scikit-activeml"
#: Rows and picks that it is run on where there are more: it writes out all gradients in float64.
ROWS, PICKS = 5000, 20


def scikit_activeml(problem: Problem) -> Part:
    """Its query strategy, with a model that has these predictions."""
    from skactiveml.base import SkactivemlClassifier
    from skactiveml.pool import Badge

    n = len(problem.candidates)
    some = problem.first(min(n, ROWS))
    x, p, k = some.array("embeddings"), some.array("probabilities"), min(problem.k, PICKS)

    class Known(SkactivemlClassifier):  # type: ignore[misc]  # it has no types
        def fit(self, *_: Any, **__: Any) -> Known:
            return self

        def predict_proba(self, rows: Any) -> Any:
            return p[: len(rows)]

    known, labels = Known(classes=list(range(p.shape[1]))), np.full(len(x), np.nan)
    seconds, _ = timed(
        lambda: Badge(random_state=problem.seed).query(x, labels, known, fit_clf=False, batch_size=k),
        torch.device("cpu"),
    )
    if n == len(x) and k == problem.k:
        return Part(seconds, "")
    return Part(seconds * n / len(x) * problem.k / k, f"{k} of {problem.k} picks on {len(x)} of {n} rows, scaled")


BENCHMARKS = (
    Benchmark(
        strategy="badge",
        make=pools.classified,
        peers=(Peer(SCIKIT, scikit_activeml, distribution=SCIKIT, rounds=1), badge.PEER),
        # One pass, for the lengths: few rows need to meet picks.
        floor=lambda sizes: {"read": sizes.item * sizes.N * (sizes.D + sizes.C)},
        quick=Case(Sizes(N=300, D=8, C=4, k=10)),
        cpu=(
            *(
                Case(Sizes(N=50_000, D=384, C=classes, k=100), ratios={badge.NAME: 15, SCIKIT: 100})
                for classes in (10, 100)
            ),
            Case(Sizes(N=200_000, D=384, C=10, k=100), peak=4),
        ),
        cuda=(Case(Sizes(N=1_280_000, D=384, C=1000, k=1000)),),
        scaling=Scaling(
            Sizes(N=20_000, D=128, C=10, k=50),
            {"N": (10_000, 80_000), "D": (48, 384), "C": (10, 80), "k": (25, 200)},
        ),
    ),
)
