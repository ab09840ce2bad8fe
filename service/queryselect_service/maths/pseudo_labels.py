"""Guesses of the labels of pool rows, for the gradients of the Fisher kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from queryselect_service.errors import InvalidInput
from queryselect_service.maths.descriptors import (
    Head,
    Terms,
    batches,
    error_bound,
    paired,
    similarity,
    spans_bytes,
    taken,
)
from queryselect_service.maths.predictions import Samples
from queryselect_service.shards import Shards

#: Added to the covariances of embedding and gradient, as in the authors' code.
RIDGE = 1e-8
#: Of so many references the most similar is found at once; those of groups that are not near are not looked at again.
GROUP = 128
#: Entries of pairs of rows that are compared at a time.
PAIR_ENTRIES = 1 << 20


def nearest(rows: Sequence[Terms], references: Sequence[Terms], pool: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """The reference row (n,) of the highest similarity to each of `rows`, and pairs (p,) of a row and a reference.

    Both are given as often as they are to be compared, ever more precisely: all rows with all references first, a block
    of these at a time, then those that come near. A row of the pairs is most similar to one of theirs, which `likest`
    tells.
    """
    n, width, item = len(rows[0][0].lengths), _width(rows[0]), rows[0][0].factors[0].element_size()
    slack = _slack(rows[0], references[0])
    best = torch.full((n,), -torch.inf, dtype=slack.dtype, device=slack.device)
    found = []
    # Blocks of half a span leave room for it in a processor's cache.
    for span in pool.spans(len(references[0][0].lengths), 2 * spans_bytes(width, n, item)):
        row, reference, score, best = _near(similarity(rows[0], taken(references[0], span)), best, slack)
        found.append((row, reference + span.start, score))
    row, reference, score = (torch.cat(parts) for parts in zip(*found, strict=True))
    kept = score >= (best - slack)[row]
    row, reference = row[kept], reference[kept]
    at = torch.empty(n, dtype=torch.int64, device=slack.device).index_copy_(0, row, reference)
    row, reference = _shared(row, reference, n)
    for ours, theirs in zip(rows[1:], references[1:], strict=True):
        parts = [
            paired(taken(ours, row[part]), taken(theirs, reference[part]))
            for part in batches(len(row), max(1, PAIR_ENTRIES // width))
        ]
        score = torch.cat([slack[:0], *parts])
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


def _width(rows: Terms) -> int:
    """The entries of a row."""
    return sum(factor.shape[1] for term in rows for factor in term.factors)


def _slack(rows: Terms, references: Terms) -> Tensor:
    """By how much (n,) the similarity of a row to two references may be wrong, both together."""
    return 2 * error_bound(rows, references)


def _near(found: Tensor, best: Tensor, slack: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs (p,) of a row and a column whose entry (n, M) is no further below the row's highest than `slack` (n,).

    Returns them with their entries, and the highest (n,) so far, best, that now is.
    """
    count = found.shape[1]
    size = min(GROUP, count)
    # As integers, entries of 16 bits compare alike from 0 on, and much faster; those below count as 0 at first.
    short = found.dtype is torch.bfloat16
    entries = found.view(torch.int16) if short else found
    # The last group begins with columns of the one before, which are not its own.
    highest = torch.cat([entries.unfold(1, size, size).amax(2), entries[:, count - size :].amax(1, keepdim=True)], 1)
    highest = highest.clamp_min_(0).view(found.dtype) if short else highest
    top = highest.amax(1)
    if short and (below := top == 0).any():
        top[below] = found[below].amax(1)
    best = torch.maximum(best, top)
    bar = best - slack
    row, group = (highest >= bar[:, None]).nonzero().unbind(1)
    start = (group * size).clamp_max_(count - size)
    values = found.unfold(1, size, 1)[row, start]  # (g, size)
    pair, within = (values >= bar[row, None]).nonzero().unbind(1)
    column = start[pair] + within
    own = column >= group[pair] * size
    pair, within = pair[own], within[own]
    return row[pair], column[own], values[pair, within].double(), best


def _highest(row: Tensor, score: Tensor, n: int) -> Tensor:
    """Of the scores (p,) of pairs the highest of every row (n,)."""
    return score.new_full((n,), -torch.inf).scatter_reduce_(0, row, score, "amax")


def _shared(row: Tensor, reference: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The pairs (p,) whose row is in several."""
    several = torch.bincount(row, minlength=n)[row] > 1
    return row[several], reference[several]


def trace(samples: Samples, rows: slice, embeddings: Tensor, head: Head | None) -> Tensor:
    """The argmax over y (n,) of Σ_k z·g_k(y), the uncentred trace of the covariance of embedding and gradient.

    With g_k(y) = Wᵀ (p_k - e_y) and u = W z it is Σ_k (p_k·u - u_y): the class of the least logit, whatever the
    samples. Where W is not known, the logarithms of the samples stand for u, which may differ over k.
    """
    if head is None:
        return samples.logarithms(rows).sum(1).argmin(1)
    return (embeddings[rows].double() @ head.weights.T).argmin(1)


def mutual_information(samples: Samples, rows: slice, embeddings: Tensor, head: Head) -> Tensor:
    """The argmax over y (n,) of log|C_zz| + log|C_gg(y)| - log|C_joint(y)|, C = Σ_k v_k v_kᵀ + 1e-8 I.

    z is the same for every k. With A Aᵀ = W Wᵀ, b_k = Aᵀ p_k and m_y the mean of b_k less row y of A,

        C_gg(y) = S + K m_y m_yᵀ,   S = Σ_k (b_k - b)(b_k - b)ᵀ + 1e-8 I,   t_y = m_yᵀ S⁻¹ m_y
        I(y) = log(1 + K t_y) - log(1 + (1 - ρ) K t_y),   ρ = K |z|² / (K |z|² + 1e-8)

    Raises InvalidInput where 1e-8 is nothing beside W, and S can't be told from a singular matrix.
    """
    b = samples[rows] @ head.plain  # (n, K, r)
    count, mean = b.shape[1], b.mean(1)
    centered = b - mean[:, None]
    s = centered.transpose(1, 2) @ centered
    s.diagonal(dim1=1, dim2=2).add_(RIDGE / head.unit / head.unit)
    root, failed = torch.linalg.cholesky_ex(s)
    if bool(failed.any()):
        words = (
            "pool.head_weights are too large for pseudo_label MC_MUTUAL_INFORMATION: beside gradients of such length "
        )
        raise InvalidInput(f"{words}float64 does not hold the {RIDGE:g} added to variances", field="pool.head_weights")
    difference = mean[:, None] - head.plain  # (n, C, r)
    half = torch.linalg.solve_triangular(root, difference.transpose(1, 2), upper=False)
    t = count * half.square().sum(1)  # (n, C), K t_y
    rest = RIDGE / (count * embeddings[rows].double().square().sum(1, keepdim=True) + RIDGE)  # 1 - ρ
    information: Tensor = t.log1p() - (rest * t).log1p()  # (n, C)
    return information.argmax(1)
