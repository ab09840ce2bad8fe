"""Margin sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.uncertainty import benchmark


def score(p: Any) -> Any:
    """The second largest probability less the largest."""
    highest = np.partition(p, -2, axis=1)
    return highest[:, -2] - highest[:, -1]


BENCHMARKS = (benchmark("margin", score, "margin_sampling", "margin_sampling"),)
