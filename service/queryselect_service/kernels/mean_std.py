"""The mean standard deviation of predictions over parameter samples."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from queryselect_service.spec import Disagreement, LabelScore
from queryselect_service.strategy import Task, pointwise


class MeanStd(Disagreement, LabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    MeanStd,
    cost="O(N K C) time, O(N) memory",
    citation="Kampffmeyer, Salberg and Jenssen, Semantic segmentation of small objects and modeling of uncertainty "
    "(CVPR workshops 2016); Gal, Islam and Ghahramani, Deep Bayesian active learning with image data (ICML 2017), "
    "arXiv:1703.02910",
)
def mean_std(samples: Annotated[Tensor, "N K C"], *, task: Task = Task.MULTICLASS) -> Tensor:
    """Prefers rows whose probabilities vary most over parameter samples.

        s = (1/C) sum_c sqrt((1/K) sum_k (p_kc - mean_k p_kc)²)

    samples: (n, K, C), or (n, K, L, 2) per label. The deviation is that of the K samples themselves, so divided by K
    and not by K - 1. Returns (n,) or (n, L), in [0, 1/2].

    >>> import torch
    >>> mean_std(torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])).tolist()
    [0.25]
    """
    # From the first sample on, so that samples that agree deviate by exactly 0. Two passes: the mean of squares less
    # the square of the mean loses its digits.
    steps = samples - samples[:, :1]
    deviations = steps.sub_(steps.mean(1, keepdim=True)).square_().mean(1).sqrt()  # (n, C) or (n, L, 2)
    return deviations[..., 1] if task is Task.MULTILABEL else deviations.mean(-1)
