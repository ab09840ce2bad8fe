"""The entropy of the mean prediction."""

from __future__ import annotations

from benchmarks.committee import benchmark, by_numpy, entropies, heuristic, modal, reads

BENCHMARKS = (
    benchmark(
        "predictive_entropy",
        (
            by_numpy(lambda p: entropies(p.mean(1))),
            heuristic("Entropy", "Entropy"),
            modal("consensus_entropy_sampling"),
        ),
        reads,
    ),
)
