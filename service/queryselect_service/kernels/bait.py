"""BAIT: batch active learning by the Fisher information of the last layer, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.errors import InvalidInput
from queryselect_service.maths import class_blocks, rank_one
from queryselect_service.maths.class_blocks import ClassBlocks, plan
from queryselect_service.maths.class_factors import AllClasses, Factors, TopClasses
from queryselect_service.maths.fisher import design_of, selection
from queryselect_service.maths.predictions import Predictions
from queryselect_service.maths.rank_one import RankOne
from queryselect_service.shards import Shards
from queryselect_service.spec import FisherDesign, parameter
from queryselect_service.strategy import Notice, NoticeCode, ScoreKind, Selection, Sizes, strategy


@dataclass(frozen=True)
class Bait(FisherDesign):
    """Its parameters."""

    top_classes: int | None = parameter(
        None, "How many of the likeliest classes the expectation is over; unset: all", low=1, unit="classes"
    )
    renormalize_top_classes: bool = parameter(True, "Whether the probabilities of those classes are made to sum to 1")

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises InvalidInput where there are not so many classes."""
        classes = sizes.get("C")
        if self.top_classes is not None and classes is not None and self.top_classes > classes:
            raise InvalidInput(
                f"top_classes must be at most C = {classes}; it is {self.top_classes}", field="top_classes"
            )

    def columns(self, classes: int) -> int:
        """How many columns the factor of a row's information has."""
        return max(1, classes - 1) if self.top_classes in (None, classes) else self.top_classes or 1


def _sizes(sizes: Sizes, spec: Bait) -> tuple[int, int, int, int, int, int]:
    steps = min(spec.oversampling * sizes.k, sizes.N)
    return sizes.N, sizes.D, sizes.C, spec.columns(sizes.C), sizes.L + sizes.M, steps


def _memory(sizes: Sizes, spec: Bait) -> int:
    n, dims, classes, _, _, steps = own = _sizes(sizes, spec)
    drops = steps - min(sizes.k, steps)
    return rank_one.memory(n, dims, classes, steps, drops) if sizes.multilabel else class_blocks.memory(*own, drops)


def _work(sizes: Sizes) -> float:
    n, dims, classes, _, _, steps = own = _sizes(sizes, Bait())
    return rank_one.work(n, dims, classes, steps) if sizes.multilabel else class_blocks.work(*own)


@strategy(
    Bait,
    kind=ScoreKind.GAIN,
    cost="O(N D C c k) time, O(N c^2 + D C c k) memory, c = C or top_classes",
    memory=_memory,
    work=_work,
    citation="Ash, Goel, Krishnamurthy and Kakade, Gone fishing: neural active learning with Fisher embeddings "
    "(NeurIPS 2021), arXiv:2106.09675, algorithm 1; top_classes: Huseljic et al., Fast Fishing (2024), "
    "arXiv:2404.08981",
)
def bait(
    embeddings: Annotated[Tensor, "N D"],
    probabilities: Annotated[Predictions, "N C"],
    weights: Annotated[Tensor, "N"] | None = None,
    labeled_embeddings: Annotated[Tensor, "M D"] | None = None,
    labeled_probabilities: Annotated[Predictions, "M C"] | None = None,
    labeled_weights: Annotated[Tensor, "M"] | None = None,
    *,
    spec: Bait = Bait(),
    context: Tensor,
    choice: Choice,
    pool: Shards,
) -> Selection:
    r"""Prefers rows that leave the least uncertainty about the whole pool, by the last layer's Fisher information.

        min tr(M^-1 F),  I_x = V_x V_xᵀ = (diag(p) - p pᵀ) ⊗ x xᵀ
        M = λI + n_L/(n_L + B) F_L + B/(n_L + B) Σ_{x in picks} I_x,  F = mean of I_x over the pool

    Greedy: `oversampling` times the budget forward, each the row of largest decrease, which is
    tr[(I + V_xᵀM⁻¹V_x)⁻¹ V_xᵀM⁻¹FM⁻¹V_x], then backward, each the pick of least increase.

    embeddings: (n, D). probabilities: (n, C), or per label (n, L), where I_x has a block q_l (1 - q_l) x xᵀ per label.
    weights: (n,), mass of a row in F. labeled_*: labelled rows that are not in the pool, M of them. Scores are the
    decreases when chosen, exact.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> p = Predictions(torch.tensor([[0.4, 0.3, 0.3], [0.9, 0.1, 0.0], [0.4, 0.3, 0.3]]))
    >>> from queryselect_service.shards import Whole
    >>> choice = Choice(2, torch.ones(3, dtype=torch.bool), Whole(3))
    >>> bait(x, p, context=torch.tensor([], dtype=torch.int64), choice=choice, pool=Whole(3)).indices
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
    dims, classes = embeddings.shape[1], probabilities.shape[1]
    if probabilities.multilabel:
        if spec.top_classes is not None:
            raise InvalidInput("top_classes has no meaning in a multi-label task", field="top_classes")
        phase = RankOne(problem, Predictions.variances, labels=classes)
        return selection(phase.forward(choice), choice, pool, lambda: phase.first)
    columns = spec.columns(classes)

    def factors(p: Tensor) -> Factors:
        if spec.top_classes not in (None, classes) or classes == 1:
            return TopClasses.of(p, columns, renormalize=spec.renormalize_top_classes)
        return AllClasses.of(p)

    how = plan(pool.size, dims, classes, columns, problem.labeled, choice.steps)
    blocks = ClassBlocks(problem, factors, columns, choice, how)
    return selection(blocks.forward(choice), choice, pool, lambda: blocks.first, _notices(how.sample, pool))


def _notices(sample: int, pool: Shards) -> tuple[Notice, ...]:
    if sample >= pool.size:
        return ()
    message = (
        f"F averages over {sample} of the {pool.size} rows, drawn uniformly: all would take too long at this many "
        "dimensions and classes. Any row may be chosen"
    )
    return (Notice(NoticeCode.SUBSAMPLED, message),)
