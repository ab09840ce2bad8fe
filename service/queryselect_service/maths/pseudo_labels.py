"""Guesses of the labels of pool rows, for the gradients of the Fisher kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from queryselect_service.maths.descriptors import Head, Terms, batches, error_bound, paired, similarity, taken
from queryselect_service.maths.predictions import Samples

#: Added to the covariances of embedding and gradient, as in the authors' code.
RIDGE = 1e-8


#: Of so many references the most similar is found at once; those of groups that are not near are not looked at again.
GROUP = 512
#: Entries of pairs of rows that are compared at a time.
PAIR_ENTRIES = 1 << 20


def nearest(rows: Sequence[Terms], references: Sequence[Terms]) -> tuple[Tensor, Tensor, Tensor]:
    """The reference row (n,) of the highest similarity to each of `rows`, and pairs (p,) of a row and a reference.

    Both are given as often as they are to be compared, ever more precisely: all rows with all references first, then
    those that come near. A row of the pairs is most similar to one of theirs, which `likest` tells.
    """
    found = similarity(rows[0], references[0])  # (n, M)
    n = len(found)
    row, reference = _near(found, _slack(rows[0], references[0]))
    at = torch.empty(n, dtype=torch.int64, device=found.device).index_copy_(0, row, reference)
    row, reference = _shared(row, reference, n)
    for ours, theirs in zip(rows[1:], references[1:], strict=True):
        width = sum(factor.shape[1] for term in ours for factor in term.factors)
        parts = [
            paired(taken(ours, row[part]), taken(theirs, reference[part]))
            for part in batches(len(row), max(1, PAIR_ENTRIES // width))
        ]
        score = torch.cat([found.new_empty(0, dtype=torch.float64), *parts])
        kept = score >= _highest(row, score, n)[row] - _slack(ours, theirs)[row]
        row, reference = row[kept], reference[kept]
        at.index_copy_(0, row, reference)
        row, reference = _shared(row, reference, n)
    return at, row, reference


def likest(row: Tensor, reference: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (r,) of pairs (p,) and for each the reference of the highest score, ties to the lowest."""
    distinct, which = torch.unique(row, return_inverse=True)
    best = score == _highest(which, score, len(distinct))[which]
    last = torch.iinfo(reference.dtype).max
    lowest = reference.new_full((len(distinct),), last)
    return distinct, lowest.scatter_reduce_(0, which[best], reference[best], "amin")


def _slack(rows: Terms, references: Terms) -> Tensor:
    """By how much (n,) the similarity of a row to two references may be wrong, both together."""
    return 2 * error_bound(rows, references)


def _near(found: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (p,) of a row and a column whose entry (n, M) is no further below the row's highest than `slack` (n,)."""
    count = found.shape[1]
    size = min(GROUP, count)
    # The last group begins with columns of the one before, which are not its own.
    highest = torch.cat([found.unfold(1, size, size).amax(2), found[:, count - size :].amax(1, keepdim=True)], 1)
    bar = highest.amax(1).double() - slack
    bar = bar if found.dtype is torch.float64 else bar.float()
    row, group = (highest >= bar[:, None]).nonzero().unbind(1)
    start = (group * size).clamp_max_(count - size)
    pair, within = (found.unfold(1, size, 1)[row, start] >= bar[row, None]).nonzero().unbind(1)
    column = start[pair] + within
    own = column >= group[pair] * size
    return row[pair[own]], column[own]


def _highest(row: Tensor, score: Tensor, n: int) -> Tensor:
    """Of the scores (p,) of pairs the highest of every row (n,)."""
    return score.new_full((n,), -torch.inf).scatter_reduce_(0, row, score, "amax")


def _shared(row: Tensor, reference: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The pairs (p,) whose row is in several."""
    several = torch.bincount(row, minlength=n)[row] > 1
    return row[several], reference[several]


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
