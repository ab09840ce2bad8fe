"""The mean standard deviation over samples."""

from __future__ import annotations

from benchmarks.committee import benchmark, by_numpy, heuristic, reads

BENCHMARKS = (
    benchmark(
        "mean_std",
        (by_numpy(lambda p: p.std(1).mean(1)), heuristic("Variance", "Variance, which ranks by the mean variance")),
        reads,
    ),
)
