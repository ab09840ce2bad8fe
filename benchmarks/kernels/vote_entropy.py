"""The entropy of votes."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.committee import benchmark, by_numpy, counts, entropies, modal, reads, scikit_activeml, votes


def by_scikit_activeml(samples: Any) -> Any:
    """Its function of votes."""
    from skactiveml.pool import vote_entropy

    return vote_entropy(votes(samples), np.arange(samples.shape[2]))


BENCHMARKS = (
    benchmark(
        "vote_entropy",
        (
            by_numpy(lambda p: entropies(counts(p) / p.shape[1])),
            scikit_activeml(by_scikit_activeml, "votes by argmax"),
            modal("vote_entropy_sampling", "votes by argmax"),
        ),
        reads,
    ),
)
