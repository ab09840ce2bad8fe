"""What the benchmarks of the uncertainty scores share: the same peers, sizes and floor for each."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Peer, Problem, Scaling
from queryselect_service.strategy import Sizes


def benchmark(strategy: str, scores: Callable[[Any], Any], scikit_activeml: str, modal: str) -> Benchmark:
    """The benchmark of a score of probabilities.

    scores: of probabilities (N, C) as an array, (N,), higher being more worth choosing, as a line of numpy.
    scikit_activeml: its name for the score. modal: that of its query strategy in modAL.uncertainty.
    """

    def by_numpy(problem: Problem) -> Tensor:
        return torch.from_numpy(np.argsort(-scores(problem.array("probabilities")))[: problem.k])

    def by_scikit_activeml(problem: Problem) -> Tensor:
        """What its UncertaintySampling does with the probabilities of a classifier."""
        from skactiveml.pool import uncertainty_scores
        from skactiveml.utils import simple_batch

        utilities = uncertainty_scores(problem.array("probabilities"), method=scikit_activeml)
        return torch.from_numpy(simple_batch(utilities, random_state=problem.seed, batch_size=problem.k))

    def by_modal(problem: Problem) -> Tensor:
        """Its query strategy, with a classifier that has predicted already."""
        from modAL import uncertainty

        predicted = SimpleNamespace(predict_proba=lambda x: x)
        picks, _ = getattr(uncertainty, modal)(predicted, problem.array("probabilities"), n_instances=problem.k)
        return torch.from_numpy(picks)

    return Benchmark(
        strategy=strategy,
        make=pools.predictions,
        peers=(
            Peer("numpy", by_numpy, "the formula and argsort"),
            Peer("scikit-activeml", by_scikit_activeml, distribution="scikit-activeml"),
            Peer("modAL", by_modal, distribution="modAL-python"),
        ),
        floor=lambda sizes: {"read": sizes.item * sizes.N * sizes.C},
        quick=Case(Sizes(N=1000, C=10, k=10)),
        cpu=(Case(Sizes(N=1_000_000, C=10, k=100)), Case(Sizes(N=50_000, C=1000, k=100))),
        cuda=(Case(Sizes(N=1_280_000, C=1000, k=1000)),),
        scaling=Scaling(Sizes(N=200_000, C=16, k=100), {"N": (250_000, 2_000_000), "C": (16, 256), "k": (1000, 8000)}),
    )
