"""Entropy sampling."""

from __future__ import annotations

import numpy as np

from benchmarks.uncertainty import benchmark

BENCHMARKS = (benchmark("entropy", lambda p: -(p * np.log(p)).sum(1), "entropy", "entropy_sampling"),)
