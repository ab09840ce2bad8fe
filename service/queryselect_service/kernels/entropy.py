"""Entropy sampling."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.predictions import split_mode
from queryselect_service.spec import LabelScore
from queryselect_service.strategy import pointwise


class Entropy(LabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    Entropy,
    cost="O(N C) time, O(N) memory",
    citation="Shannon, A mathematical theory of communication (1948); "
    "Settles, Active learning literature survey (2009), section 3.1",
)
def entropy(probabilities: Annotated[Tensor, "N C"]) -> Tensor:
    """Prefers rows whose predictive distribution has the highest entropy, in nats.

        s = - sum_c p_c ln p_c,  0 ln 0 = 0

    probabilities: (n, C), or (n, L, 2) per label. Returns (n,) or (n, L), in [0, ln C].

    >>> import torch
    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist()
    [0.0, 0.6931471824645996]
    """
    mode, rest = split_mode(probabilities)
    certain = -mode * torch.log1p(-rest.sum(-1))  # ln p_(1) from the rest: exact when the mode is nearly 1
    return certain - torch.xlogy(rest, rest).sum(-1)
