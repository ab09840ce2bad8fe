"""What a selection is, and the words for what it tells: kinds of scores, why it ended, what is worth a warning."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


class ScoreKind(enum.StrEnum):
    """What a score is. For every kind, higher is more worth choosing."""

    POINT = "POINT"
    KEY = "KEY"
    GAIN = "GAIN"
    DISTANCE = "DISTANCE"
    DENSITY = "DENSITY"
    COVERAGE = "COVERAGE"
    KERNEL = "KERNEL"
    PROBABILITY = "PROBABILITY"


class StopReason(enum.StrEnum):
    """Why a selection ended."""

    MAX_ITEMS = "MAX_ITEMS"
    MAX_COST = "MAX_COST"
    MIN_GAIN = "MIN_GAIN"
    QUOTAS = "QUOTAS"


class NoticeCode(enum.StrEnum):
    """What a notice is about."""

    INERT_ROWS = "INERT_ROWS"
    SATURATED = "SATURATED"
    COVERED = "COVERED"
    CONSTRAINED = "CONSTRAINED"
    LOW_CONFIDENCE = "LOW_CONFIDENCE"
    SUBSAMPLED = "SUBSAMPLED"
    UNUSED_INPUT = "UNUSED_INPUT"
    FALLBACK = "FALLBACK"
    SMALL_CLUSTERS = "SMALL_CLUSTERS"
    NO_MISCLASSIFIED = "NO_MISCLASSIFIED"


@dataclass(frozen=True)
class Notice:
    """Something the caller should know though all went well."""

    code: NoticeCode
    message: str
    rows: Tensor | None = None  # (r,) int64


@dataclass(frozen=True)
class Selection:
    """What a kernel returns: picks in the order of choice, first pick first.

    The last two are not the kernel's business: `strategy.select` fills them in.
    """

    indices: Tensor  # (k,) int64, global rows; fewer where the request's limits ended the selection
    scores: Tensor  # (k,) float64
    pool_scores: Callable[[], Tensor] | None = None  # () -> (n,) float64; called only when someone asks
    notices: tuple[Notice, ...] = ()
    # () -> (n,) int64, of all rows here, and what is to be said of them alone; likewise
    pseudo_labels: Callable[[], tuple[Tensor, tuple[Notice, ...]]] | None = None
    score_kind: ScoreKind | None = None  # what the scores are, where that is not what the strategy says of itself
    stop_reason: StopReason = StopReason.MAX_ITEMS
    cost_spent: float | None = None  # what the picks cost together; None where the request gave no costs
