"""The mean divergence from the consensus."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.case import Part, Problem
from benchmarks.clock import timed
from benchmarks.committee import LAYOUT, benchmark, by_numpy, heuristic, highest, logarithms, scikit_activeml


def divergence(p: Any) -> Any:
    """The mean over members of KL(p_k | mean_k p_k), (N,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum(p * np.log(p / p.mean(1, keepdims=True)), axis=2).mean(1)


def by_scikit_activeml(problem: Problem) -> Part:
    """Its function, which writes into the array (K, N, C) that it is given."""
    from skactiveml.pool import average_kl_divergence

    x = np.array(problem.array("samples").swapaxes(0, 1), order="C")
    seconds, picks = timed(lambda: highest(average_kl_divergence(x), problem.k), torch.device("cpu"))
    return Part(seconds, LAYOUT, picks)


BENCHMARKS = (
    benchmark(
        "consensus_kl",
        (
            by_numpy(divergence),
            replace(scikit_activeml(divergence, "average_kl_divergence"), select=by_scikit_activeml),
            heuristic("BALD", "BALD, which is the same"),
        ),
        logarithms,
    ),
)
