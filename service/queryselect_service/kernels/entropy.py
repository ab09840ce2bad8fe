"""Entropy sampling."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from queryselect_service.maths import information
from queryselect_service.spec import LabelScore
from queryselect_service.strategy import OR_SAMPLES, pointwise


class Entropy(LabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    Entropy,
    cost="O(N C) time, O(N) memory",
    citation="Shannon, A mathematical theory of communication (1948); "
    "Settles, Active learning literature survey (2009), section 3.1",
)
def entropy(probabilities: Annotated[Tensor, "N C", OR_SAMPLES]) -> Tensor:
    """Prefers rows whose predictive distribution has the highest entropy, in nats.

        s = - sum_c p_c ln p_c,  0 ln 0 = 0

    probabilities: (n, C), or (n, L, 2) per label; of samples, their mean. Returns (n,) or (n, L), in [0, ln C].

    >>> import torch
    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist()
    [0.0, 0.6931471824645996]
    """
    return information.entropy(probabilities)
