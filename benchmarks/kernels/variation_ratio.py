"""The variation ratio of votes."""

from __future__ import annotations

from typing import Any

from benchmarks.committee import benchmark, by_numpy, counts, reads, scikit_activeml, votes


def by_scikit_activeml(samples: Any) -> Any:
    """Its function of votes."""
    from skactiveml.pool import variation_ratios

    return variation_ratios(votes(samples))


BENCHMARKS = (
    benchmark(
        "variation_ratio",
        (
            by_numpy(lambda p: 1 - counts(p).max(1) / p.shape[1]),
            scikit_activeml(by_scikit_activeml, "votes by argmax"),
        ),
        reads,
    ),
)
