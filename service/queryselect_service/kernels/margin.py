"""Margin sampling (best versus second best)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from queryselect_service.maths.predictions import split_mode
from queryselect_service.spec import LabelScore
from queryselect_service.strategy import OR_SAMPLES, pointwise


class Margin(LabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    Margin,
    cost="O(N C) time, O(N) memory",
    citation="Scheffer, Decomain and Wrobel, Active hidden Markov models for information extraction (IDA 2001)",
)
def margin(probabilities: Annotated[Tensor, "N C", OR_SAMPLES]) -> Tensor:
    """Prefers rows whose two most likely classes are closest.

        s = 1 - (p_(1) - p_(2))

    probabilities: (n, C), or (n, L, 2) per label; of samples, their mean. Returns (n,) or (n, L), in [0, 1].

    >>> import torch
    >>> margin(torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]])).tolist()
    [0.5, 0.75]
    """
    _, rest = split_mode(probabilities)
    return rest.sum(-1) + rest.amax(-1)  # 1 - p_(1) is the sum of the rest
