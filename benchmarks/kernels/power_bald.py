"""PowerBALD: BALD, and a draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Problem
from benchmarks.committee import baal, benchmark, by_numpy, entropies, logarithms


def score(p: Any) -> Any:
    """The logarithm of BALD, with noise by which the highest are a draw by BALD."""
    information = entropies(p.mean(1)) - entropies(p).mean(1)
    return np.log(information.clip(1e-300)) + np.random.default_rng(0).gumbel(size=len(p))


def by_baal(x: Any, problem: Problem) -> Tensor:
    """Its sampling by powers of its BALD."""
    from baal.active.heuristics import BALD
    from baal.active.heuristics.stochastics import PowerSampling

    picks, _ = PowerSampling(BALD(), problem.k).get_ranks(x)
    return torch.from_numpy(picks)


BENCHMARKS = (
    benchmark(
        "power_bald",
        (by_numpy(score, "the formula, Gumbel noise and argsort"), baal(by_baal, "PowerSampling of BALD")),
        logarithms,
    ),
)
