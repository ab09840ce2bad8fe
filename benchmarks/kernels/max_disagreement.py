"""The largest divergence from the consensus."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.committee import benchmark, by_numpy, logarithms, modal


def divergence(p: Any) -> Any:
    """The largest over members of KL(p_k | mean_k p_k), (N,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum(p * np.log(p / p.mean(1, keepdims=True)), axis=2).max(1)


BENCHMARKS = (benchmark("max_disagreement", (by_numpy(divergence), modal("max_disagreement_sampling")), logarithms),)
