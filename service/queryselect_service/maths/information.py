"""Entropies and mutual information of distributions over the last axis, in nats; float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from queryselect_service.maths.predictions import split_mode

#: Where entropies are subtracted, what is below so many roundings of them is none.
ROUNDINGS = 16 * torch.finfo(torch.float64).eps


def entropy(p: Tensor) -> Tensor:
    """The entropy (...,) of distributions (..., C), 0 ln 0 = 0, with all digits however certain they are."""
    mode, rest = split_mode(p)
    certain = -mode * torch.log1p(-rest.sum(-1))  # ln p_(1) from the rest: exact when the mode is nearly 1
    return certain - torch.xlogy(rest, rest).sum(-1)


def logarithms(p: Tensor) -> Tensor:
    """Ln p of every entry, a new tensor; that of 0 is that of the least normal number, so that 0 ln 0 is 0.

    Not xlogy, which torch computes one number at a time.
    """
    return p.clamp_min(torch.finfo(p.dtype).tiny).log_()


def surprise(p: Tensor) -> Tensor:
    """-p ln p of every entry, 0 ln 0 = 0."""
    return logarithms(p).mul_(p).neg_()


def without_noise(information: Tensor, entropies: Tensor) -> Tensor:
    """Differences of entropies, 0 where they are no more than the rounding of those, and never negative."""
    return torch.where(information > ROUNDINGS * (1 + entropies), information, 0.0)


def mutual_information(samples: Tensor) -> Tensor:
    """I(y; θ) = H(mean_k p_k) - mean_k H(p_k), (n, ...), of distributions (n, K, ..., C) under K parameter samples.

    Between 0, exactly so where the samples agree, and min(ln C, ln K).
    """
    total = entropy(samples.mean(1))
    nats = logarithms(samples).mul_(samples)  # p ln p
    expected = nats.sum((1, -1)) / -samples.shape[1]
    most = math.log(min(samples.shape[1], samples.shape[-1]))
    return without_noise(total - expected, total).clamp(max=most)


def divergences(samples: Tensor) -> Tensor:
    """KL(p_k | mean_k p_k), (n, K, ...), of distributions (n, K, ..., C)."""
    consensus = samples.mean(1, keepdim=True)
    ratios = logarithms(samples).sub_(logarithms(consensus))
    return without_noise(ratios.mul_(samples).sum(-1), entropy(consensus))
