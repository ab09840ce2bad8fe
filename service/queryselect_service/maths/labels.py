"""From a score per label to a score per row."""

from __future__ import annotations

from torch import Tensor


def aggregate_labels(scores: Tensor, how: str, top_k: int | None = None) -> Tensor:
    """The row scores (n,) of label scores (n, L): their MEAN, SUM, MAX, or TOP_K_MEAN over the last axis."""
    if how == "SUM":
        return scores.sum(-1)
    if how == "MAX":
        return scores.amax(-1)
    if how == "TOP_K_MEAN" and top_k is not None:
        return scores.topk(top_k, dim=-1).values.mean(-1)
    return scores.mean(-1)
