"""The variation ratio of a committee's votes."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from queryselect_service.maths.predictions import Samples
from queryselect_service.spec import Disagreement, LabelScore
from queryselect_service.strategy import pointwise


class VariationRatio(Disagreement, LabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    VariationRatio,
    cost="O(N K C) time, O(N) memory",
    citation="Freeman, Elementary applied statistics (1965); Gal, Islam and Ghahramani, Deep Bayesian active learning "
    "with image data (ICML 2017), arXiv:1703.02910",
)
def variation_ratio(samples: Annotated[Samples, "N K C"]) -> Tensor:
    """Prefers rows on which the most parameter samples vote against the majority.

        s = 1 - max_c |{k : argmax p_k = c}| / K

    samples: (n, K, C), labels L for C in a multi-label task. A sample votes for its likeliest class, the first of
    equal ones.
    Returns (n,) or (n, L), in [0, 1 - 1/C].

    >>> import torch
    >>> variation_ratio(Samples(torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]]))).tolist()
    [0.25]
    """
    return 1 - samples.votes.amax(-1) / samples.shape[1]
