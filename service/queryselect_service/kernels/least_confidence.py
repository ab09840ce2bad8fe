"""Least-confidence sampling."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from queryselect_service.maths.predictions import split_mode
from queryselect_service.spec import LabelScore
from queryselect_service.strategy import OR_SAMPLES, pointwise


class LeastConfidence(LabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    LeastConfidence,
    cost="O(N C) time, O(N) memory",
    citation="Lewis and Gale, A sequential algorithm for training text classifiers (SIGIR 1994), arXiv:cmp-lg/9407020",
)
def least_confidence(probabilities: Annotated[Tensor, "N C", OR_SAMPLES]) -> Tensor:
    """Prefers rows whose most likely class is least likely.

        s = 1 - max_c p_c

    probabilities: (n, C), or (n, L, 2) per label; of samples, their mean. Returns (n,) or (n, L), in [0, 1 - 1/C].

    >>> import torch
    >>> least_confidence(torch.tensor([[0.75, 0.25], [0.5, 0.5]])).tolist()
    [0.25, 0.5]
    """
    _, rest = split_mode(probabilities)
    return rest.sum(-1)
