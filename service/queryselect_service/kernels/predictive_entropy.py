"""The entropy of the mean prediction over parameter samples."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from queryselect_service.maths.information import entropy
from queryselect_service.spec import SummedLabelScore
from queryselect_service.strategy import pointwise


class PredictiveEntropy(SummedLabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    PredictiveEntropy,
    cost="O(N K C) time, O(N) memory",
    citation="Gal, Islam and Ghahramani, Deep Bayesian active learning with image data (ICML 2017), arXiv:1703.02910, "
    "section 4; as consensus entropy: Settles, Active learning literature survey (2009), section 3.2",
)
def predictive_entropy(samples: Annotated[Tensor, "N K C"]) -> Tensor:
    """Prefers rows whose prediction, averaged over parameter samples, has the highest entropy, in nats.

        s = - sum_c p̄_c ln p̄_c,  p̄ = (1/K) sum_k p_k,  0 ln 0 = 0

    samples: (n, K, C), or (n, K, L, 2) per label. Returns (n,) or (n, L), in [0, ln C].

    >>> import torch
    >>> predictive_entropy(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])).tolist()
    [0.6931471824645996]
    """
    return entropy(samples.mean(1))
