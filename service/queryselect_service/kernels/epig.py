"""EPIG: expected predictive information gain."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.information import entropy, surprise, without_noise
from queryselect_service.maths.predictions import Samples
from queryselect_service.shards import Shards, Whole
from queryselect_service.spec import Disagreement, SummedLabelScore
from queryselect_service.strategy import Sizes, block_rows, pointwise

#: Joint probabilities that are in memory at once: 4 MB of float64.
TILE = 1 << 19
#: What scores are rounded to, in nats: far above the rounding of sums, far below what matters.
GRID = 2.0**-40


class Epig(Disagreement, SummedLabelScore):
    """Its parameters matter in a multi-label task only."""


def _memory(sizes: Sizes, _: Epig) -> int:
    row, block = sizes.K * sizes.C, min(sizes.N, block_rows(sizes.K * sizes.C))
    copies = 4 * (block + sizes.M) if sizes.multilabel else 4 * block + 3 * sizes.M  # of labels, but for one, two
    return 8 * row * copies + 4 * 8 * TILE


@pointwise(
    Epig,
    cost="O(N M K C²) time, O(N + M K C) memory",
    memory=_memory,
    work=lambda sizes: float(sizes.N) * sizes.M * sizes.C * (2 if sizes.multilabel else sizes.C) * (sizes.K + 10),
    citation="Bickford Smith, Kirsch, Farquhar, Gal, Foster and Rainforth, Prediction-oriented Bayesian active "
    "learning (AISTATS 2023), arXiv:2304.08151, equation 5",
)
def epig(
    samples: Annotated[Tensor, "N K C"],
    target_samples: Annotated[Samples, "M K C"],
    target_weights: Annotated[Tensor, "M"],
    *,
    pool: Shards | None = None,
) -> Tensor:
    """Prefers rows whose label tells most about the labels of target rows, on average over those, in nats.

        s = (1/M) sum_t w_t I(y; y_t),  p(y, y_t) = (1/K) sum_k p_k(y) p_k(y_t)

    samples: (n, K, C), or (n, K, L, 2) per label, where a label tells about the same label of target rows.
    target_samples: (M, K, C) under the same K parameter samples: number k must be one model for all rows, of pool and
    targets (one dropout mask, one ensemble member), or the score means nothing. target_weights: (M,), taken as they
    are. Returns (n,) or (n, L), in [0, min(ln C, ln K)] with weights of mean 1.

    >>> import torch
    >>> twins = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).double()
    >>> round(epig(twins, Samples(twins), torch.ones(1).double()).item(), 6)
    0.693147
    """
    pool = pool or Whole(len(samples))
    targets = target_samples[:]  # (M, K, C) or (M, K, L, 2)
    weights = target_weights / len(targets)
    labels = samples.shape[2] if samples.dim() == 4 else 0
    if not labels:  # one label of C values
        samples, targets = samples[:, :, None], targets[:, :, None]
    own = entropy(samples.mean(1))  # (n, L)
    theirs = (weights[:, None] * entropy(targets.mean(1))).sum(0)  # (L,)
    joint = torch.stack(
        [_joint_entropy(samples[:, :, at], targets[:, :, at], weights, pool) for at in range(max(1, labels))], dim=1
    )  # (n, L)
    total = weights.sum() * own + theirs
    # Rounded, so that rows that are alike tie wherever they stand in a matrix product.
    found = without_noise(total - joint, total).div_(GRID).round_().mul_(GRID)
    return found if labels else found[:, 0]


def _joint_entropy(p: Tensor, q: Tensor, weights: Tensor, pool: Shards) -> Tensor:
    """sum_t w_t H(y, y_t), (n,), of p (n, K, C) and q (M, K, C)."""
    members, classes = p.shape[1:]
    columns = q.permute(1, 0, 2).flatten(1) / members  # (K, M C)
    of_column = weights.repeat_interleave(classes)  # (M C,)
    rows = p.transpose(1, 2).flatten(0, 1)  # (n C, K)
    found = p.new_zeros(len(rows))
    width = min(len(of_column), max(classes, 1 << 10))
    height = max(1, TILE // width)
    for start in range(0, len(rows), height):
        tile = slice(start, start + height)
        for first in range(0, len(of_column), width):
            pool.check()
            some = slice(first, first + width)
            found[tile] += surprise(rows[tile] @ columns[:, some]) @ of_column[some]
    return found.view(-1, classes).sum(1)
