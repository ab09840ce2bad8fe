"""MaxHerding: greedy generalised coverage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths import herding
from queryselect_service.shards import Shards
from queryselect_service.spec import Herding
from queryselect_service.strategy import ScoreKind, Selection, strategy


@dataclass(frozen=True)
class MaxHerding(Herding):
    """Its parameters are those of all that cover the pool by a kernel."""


@strategy(
    MaxHerding,
    kind=ScoreKind.GAIN,
    cost="O(N² D) time and, as the batch grows, O(N D) for every gain that is looked at again; O(N D) memory",
    memory=herding.memory,
    work=herding.work,
    citation="Bae, Noh and Sutherland, Generalized coverage for more robust low-budget active learning (ECCV 2024), "
    "arXiv:2407.12212",
)
def max_herding(
    embeddings: Annotated[Tensor, "N D"],
    weights: Annotated[Tensor, "N"] | None = None,
    *,
    spec: MaxHerding = MaxHerding(),
    context: Tensor,
    choice: Choice,
    pool: Shards,
) -> Selection:
    r"""Prefers the row that brings the pool nearest to what is labelled or chosen, nearness by a Gaussian kernel.

        C(S) = (1/N) Σ_x w_x max over s in S of k(x, s),  k(x, s) = exp(-|x - s|² / h²)
        pick argmax over u of C(S + u) - C(S) = (1/N) Σ_x w_x max(k(x, u) - m_x, 0);  m_x ← max(m_x, k(x, u));  repeat

    The sum is over all rows, labelled and unlabelled; m_x begins with the context, and at 0 without.

    embeddings: (n, D). weights: (n,), mass w of a row, by default 1. context: (l,) rows that count as chosen already;
    choice: k picks among (n,) rows. Scores are the gains when picked, in [0, mean of w].

    All is float64. Gains that rounding can't tell apart, or that differ by less than a part of 1e-10, are ties.

    >>> import torch
    >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
    >>> from queryselect_service.shards import Whole
    >>> choice, none = Choice(2, torch.ones(4, dtype=torch.bool), Whole(4)), torch.tensor([], dtype=torch.int64)
    >>> max_herding(x, spec=MaxHerding(normalize=False), context=none, choice=choice, pool=Whole(4)).indices
    tensor([1, 3])
    """
    return herding.herd(embeddings, weights, spec=spec, context=context, choice=choice, pool=pool)
