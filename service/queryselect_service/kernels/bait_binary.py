"""BAIT with the information of the most likely class against the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths import rank_one
from queryselect_service.maths.fisher import Rows, design_of, selection
from queryselect_service.maths.predictions import Predictions, split_mode
from queryselect_service.maths.rank_one import RankOne
from queryselect_service.shards import Shards
from queryselect_service.spec import FisherDesign
from queryselect_service.strategy import Notice, NoticeCode, ScoreKind, Selection, Sizes, strategy


@dataclass(frozen=True)
class BaitBinary(FisherDesign):
    """Its parameters are those of all that minimise tr(M^-1 F)."""


def _sizes(sizes: Sizes, spec: FisherDesign) -> tuple[int, int, int, int]:
    return sizes.N, sizes.D, 1, min(spec.oversampling * sizes.k, sizes.N)


def _memory(sizes: Sizes, spec: BaitBinary) -> int:
    *_, steps = own = _sizes(sizes, spec)
    return rank_one.memory(*own, steps - min(sizes.k, steps))


@strategy(
    BaitBinary,
    kind=ScoreKind.GAIN,
    cost="O(N D (D + k)) time, O(N k + D^2) memory",
    memory=_memory,
    work=lambda sizes: rank_one.work(*_sizes(sizes, BaitBinary())),
    citation="Huseljic, Hahn, Herde, Rauch and Sick, Fast Fishing: approximating BAIT for efficient and scalable deep "
    "active image classification (2024), arXiv:2404.08981, section 4.2",
)
def bait_binary(
    embeddings: Annotated[Tensor, "N D"],
    probabilities: Annotated[Predictions, "N C"],
    weights: Annotated[Tensor, "N"] | None = None,
    labeled_embeddings: Annotated[Tensor, "M D"] | None = None,
    labeled_probabilities: Annotated[Predictions, "M C"] | None = None,
    labeled_weights: Annotated[Tensor, "M"] | None = None,
    *,
    spec: BaitBinary = BaitBinary(),
    context: Tensor,
    choice: Choice,
    pool: Shards,
) -> Selection:
    r"""Prefers rows that leave the least uncertainty about the whole pool, by the Fisher information of one logit.

        min tr(M^-1 F),  I_x = p̂ (1 - p̂) x xᵀ,  p̂ = max_c p_c
        M = λI + n_L/(n_L + B) F_L + B/(n_L + B) Σ_{x in picks} I_x,  F = mean of I_x over the pool

    Greedy: `oversampling` times the budget forward, each the row of largest decrease, then backward, each the pick of
    least increase. embeddings: (n, D). probabilities: (n, C); per label, (n, L), I_x = Σ_l q_l (1 - q_l) x xᵀ. weights:
    (n,), mass of a row in F. labeled_*: labelled rows that are not in the pool, M of them. Scores are the decreases
    when chosen, exact.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> p = Predictions(torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]))
    >>> from queryselect_service.shards import Whole
    >>> choice = Choice(2, torch.ones(3, dtype=torch.bool), Whole(3))
    >>> bait_binary(x, p, context=torch.tensor([], dtype=torch.int64), choice=choice, pool=Whole(3)).indices
    tensor([2, 0])
    """
    problem = design_of(
        embeddings,
        probabilities,
        weights,
        (labeled_embeddings, labeled_probabilities, labeled_weights),
        context=context,
        k=choice.k,
        spec=spec,
        pool=pool,
    )
    choice.oversample(spec.oversampling)
    phase = RankOne(problem, _variance, labels=1)
    return selection(phase.forward(choice), choice, pool, lambda: phase.first, _notices(problem.rows))


def _variance(predictions: Predictions) -> Tensor:
    """p̂ (1 - p̂), or its sum over labels, (m, 1)."""
    if predictions.multilabel:
        return predictions.variances().sum(1, keepdim=True)
    mode, rest = split_mode(predictions[:])
    return (mode * rest.sum(1))[:, None]


def _notices(rows: Rows) -> tuple[Notice, ...]:
    """p̂ (1 - p̂) falls again below p̂ = 0.5: a head so unsure makes the most certain rows look the most informative."""
    if rows.predictions.multilabel:
        return ()
    unsure = torch.zeros((), dtype=torch.float64, device=rows.mass.device)
    for span in rows.spans(0, 2 * rows.predictions.shape[1]):
        unsure += (rows.predictions[span].amax(1) < 0.5).sum()
    part = float(rows.pool.sum(unsure)) / rows.pool.size
    if part <= 0.5:
        return ()
    message = (
        f"{part:.0%} of the rows have no class of probability 0.5 or more, where bait_binary prefers the wrong rows: "
        "regularise the model's last layer less, lower its temperature, or take bait, which does not have the defect"
    )
    return (Notice(NoticeCode.LOW_CONFIDENCE, message),)
