"""Guesses of the labels of pool rows, for the gradients of the Fisher kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from queryselect_service.maths.descriptors import Head, Terms, error_bound, similarity
from queryselect_service.maths.predictions import Samples

#: Added to the covariances of embedding and gradient, as in the authors' code.
RIDGE = 1e-8


def nearest(rows: Terms, references: Terms, exact: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The reference row (n,) of the highest similarity to each of `rows`, ties to the lowest.

    exact: gives the similarity (p,) of pairs of a row and a reference in float64, for those that come near.
    """
    found, last = similarity(rows, references), len(references[0].lengths)  # (n, M)
    best, at = found.max(1)
    bar = best.double() - 2 * error_bound(rows, references)
    bar = bar if found.dtype is torch.float64 else bar.float()
    second = found.scatter_(1, at[:, None], -torch.inf).amax(1)
    doubtful = (second >= bar).nonzero().squeeze(1)
    if not len(doubtful):
        return at
    near = found[doubtful] >= bar[doubtful, None]
    near.scatter_(1, at[doubtful, None], value=True)
    row, reference = near.nonzero().unbind(1)  # (p,)
    score = exact(doubtful[row], reference)
    highest = score.new_full((len(doubtful),), -torch.inf).scatter_reduce_(0, row, score, "amax")
    candidate = torch.where(score == highest[row], reference, last)
    at[doubtful] = at.new_full((len(doubtful),), last).scatter_reduce_(0, row, candidate, "amin")
    return at


def trace(samples: Samples, rows: slice, embeddings: Tensor, head: Tensor | None) -> Tensor:
    """The argmax over y (n,) of Σ_k z·g_k(y), the uncentred trace of the covariance of embedding and gradient.

    With g_k(y) = Wᵀ (p_k - e_y) and u = W z it is Σ_k (p_k·u - u_y): the class of the least logit, whatever the
    samples. Where W is not known, the logarithms of the samples stand for u, which may differ over k.
    """
    if head is None:
        return samples.logarithms(rows).sum(1).argmin(1)
    return (embeddings[rows].double() @ head.double().T).argmin(1)


def mutual_information(samples: Samples, rows: slice, embeddings: Tensor, head: Head) -> Tensor:
    """The argmax over y (n,) of log|C_zz| + log|C_gg(y)| - log|C_joint(y)|, C = Σ_k v_k v_kᵀ + 1e-8 I.

    z is the same for every k. With A Aᵀ = W Wᵀ, b_k = Aᵀ p_k and m_y the mean of b_k less row y of A,

        C_gg(y) = S + K m_y m_yᵀ,   S = Σ_k (b_k - b)(b_k - b)ᵀ + 1e-8 I,   t_y = m_yᵀ S⁻¹ m_y
        I(y) = log(1 + K t_y) - log(1 + (1 - ρ) K t_y),   ρ = K |z|² / (K |z|² + 1e-8)
    """
    b = samples[rows] @ head.plain  # (n, K, r)
    count, mean = b.shape[1], b.mean(1)
    centered = b - mean[:, None]
    s = centered.transpose(1, 2) @ centered
    s.diagonal(dim1=1, dim2=2).add_(RIDGE)
    difference = mean[:, None] - head.plain  # (n, C, r)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(s), difference.transpose(1, 2), upper=False)
    t = count * half.square().sum(1)  # (n, C), K t_y
    rest = RIDGE / (count * embeddings[rows].double().square().sum(1, keepdim=True) + RIDGE)  # 1 - ρ
    information: Tensor = t.log1p() - (rest * t).log1p()  # (n, C)
    return information.argmax(1)
