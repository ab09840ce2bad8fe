"""TCM: TypiClust as long as few rows are labelled, then margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.kernels.margin import margin
from queryselect_service.kernels.typiclust import Typiclust, memory, typiclust, work
from queryselect_service.maths.predictions import Predictions
from queryselect_service.shards import Shards
from queryselect_service.spec import parameter
from queryselect_service.strategy import (
    PICK_BYTES,
    RANKING_BYTES,
    Choice,
    ScoreKind,
    Selection,
    Sizes,
    Task,
    strategy,
)

#: Labelled rows per class from which margin takes over, where the request does not say.
ROWS_PER_CLASS = 20
#: Bytes per probability that scoring a row by its margin touches.
MARGIN_BYTES = 64


@dataclass(frozen=True)
class TypiclustToMargin(Typiclust):
    """Its parameters: when to change over, and those of typiclust."""

    switch_at: int | None = parameter(
        None,
        "The labelled rows, pending ones too, from which margin takes over; unset: 20 per class",
        low=0,
        unit="rows",
    )


def _memory(sizes: Sizes, spec: TypiclustToMargin) -> int:
    return memory(sizes, spec) + RANKING_BYTES * sizes.N + PICK_BYTES * sizes.k


@strategy(
    TypiclustToMargin,
    kind=ScoreKind.DENSITY,
    pool_scores=False,
    seeded=True,
    tasks=(Task.MULTICLASS,),
    cost="that of typiclust, then O(N C) time and O(N) memory",
    memory=_memory,
    work=lambda sizes: work(sizes) + 10.0 * sizes.N * sizes.C,
    citation="Doucet, Estermann, Aczel and Wattenhofer, Bridging diversity and uncertainty in active learning with "
    "self-supervised pre-training (2024), arXiv:2403.03728",
)
def typiclust_to_margin(
    embeddings: Annotated[Tensor, "N D"],
    probabilities: Annotated[Predictions, "N C"],
    clusters: Annotated[Tensor, "N"] | None = None,
    *,
    choice: Choice,
    spec: TypiclustToMargin = TypiclustToMargin(),
    context: Tensor,
    seed: int = 0,
    pool: Shards,
) -> Selection:
    """Prefers typical rows of clusters while few rows are labelled, then rows whose two likeliest classes are closest.

        s = typicality(x) in its cluster, as in typiclust, for L < switch_at;  1 - (p_(1) - p_(2)), as in margin, after

    embeddings: (n, D); clusters: (n,), the caller's own. probabilities: (n, C). context: (l,) rows that count as
    labelled, pending ones too, L in all. choice: k picks among (n,) rows. The picks, scores and warnings of a request
    are those of one of the two, and the kind of its scores tells which: DENSITY or POINT.

    >>> from queryselect_service.shards import Whole
    >>> line, p = torch.tensor([[0.0], [1.0], [2.0]]), Predictions(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]))
    >>> three, spec = Whole(3), TypiclustToMargin(switch_at=1)
    >>> choice = Choice(1, torch.ones(3, dtype=torch.bool), three)
    >>> typiclust_to_margin(line, p, choice=choice, spec=spec, context=torch.tensor([0]), pool=three).indices
    tensor([2])
    """
    labeled = int(pool.sum(torch.tensor(len(context), device=context.device)))
    if labeled < (ROWS_PER_CLASS * probabilities.shape[1] if spec.switch_at is None else spec.switch_at):
        found: Selection = typiclust(
            embeddings, clusters, choice=choice, spec=spec, context=context, seed=seed, pool=pool
        )
        return found
    scores = torch.empty(len(embeddings), dtype=torch.float64, device=embeddings.device)
    for span in pool.spans(len(scores), MARGIN_BYTES * probabilities.shape[1]):
        scores[span] = margin(probabilities[span])
    return Selection(*choice.walk(scores, choice.k), score_kind=ScoreKind.POINT)
