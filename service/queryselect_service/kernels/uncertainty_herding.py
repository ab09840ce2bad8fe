"""Uncertainty herding: generalised coverage of the rows of which the model is unsure."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.errors import InvalidInput
from queryselect_service.maths import herding
from queryselect_service.maths.information import entropy
from queryselect_service.maths.predictions import Predictions, split_mode
from queryselect_service.shards import Shards
from queryselect_service.spec import Herding, parameter
from queryselect_service.strategy import ScoreKind, Selection, Sizes, Task, strategy


class Uncertainty(enum.StrEnum):
    """How unsure a distribution is."""

    MARGIN = "MARGIN"
    ENTROPY = "ENTROPY"
    CONFIDENCE = "CONFIDENCE"


@dataclass(frozen=True)
class UncertaintyHerding(Herding):
    """Its parameters."""

    uncertainty: Uncertainty = parameter(
        Uncertainty.MARGIN, "A row's mass: 1 - (p1 - p2), the entropy in nats, or 1 - p1, p1 and p2 the largest"
    )
    temperature: float = parameter(1.0, "What logits are divided by before the softmax, above 0", low=0)

    def __post_init__(self) -> None:
        """Raises InvalidInput for a temperature of 0 too."""
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise InvalidInput(f"temperature must be above 0 and finite; it is {self.temperature}", field="temperature")


def _memory(sizes: Sizes, spec: UncertaintyHerding) -> int:
    """Those of herding, one more number per row; uncertainties are made before, a span at a time."""
    return herding.memory(sizes, spec) + 16 * sizes.N


@strategy(
    UncertaintyHerding,
    kind=ScoreKind.GAIN,
    cost="O(N² D + N C) time and, as the batch grows, O(N D) for every gain that is looked at again; O(N D) memory",
    memory=_memory,
    work=herding.work,
    tasks=(Task.MULTICLASS,),
    citation="Bae, Oliveira and Sutherland, Uncertainty herding: one active learning method for all label budgets "
    "(ICLR 2025), arXiv:2412.20644",
)
def uncertainty_herding(
    embeddings: Annotated[Tensor, "N D"],
    probabilities: Annotated[Predictions, "N C"],
    weights: Annotated[Tensor, "N"] | None = None,
    *,
    spec: UncertaintyHerding = UncertaintyHerding(),
    context: Tensor,
    choice: Choice,
    pool: Shards,
) -> Selection:
    r"""Prefers rows as max_herding does, where a row's mass is how unsure the model is of it.

        gain = (1/N) Σ_x w_x u_x max(k(x, u) - m_x, 0),  u_x = uncertainty of softmax(z_x / T), 0 where x is labelled

    Without context, when there is no model to ask yet, u_x = 1.

    embeddings: (n, D). probabilities: (n, C); logits are divided by T as they are, logarithms of probabilities
    otherwise. weights: (n,), a mass w of the caller's own beside, by default 1. context: (l,). Scores are the gains.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    >>> p = Predictions(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [1.0, 0.0]]))
    >>> from queryselect_service.shards import Whole
    >>> choice = Choice(1, torch.tensor([False, True, True, True]), Whole(4))
    >>> uncertainty_herding(x, p, context=torch.tensor([0]), choice=choice, pool=Whole(4)).indices
    tensor([2])
    """
    mass = torch.ones(len(embeddings), dtype=torch.float64, device=embeddings.device)
    if pool.sum(mass.new_tensor(len(context))) > 0:
        for span in pool.spans(len(mass), 6 * 8 * probabilities.shape[1]):
            mass[span] = _uncertainty(probabilities.tempered(span, spec.temperature), spec.uncertainty)
        mass[context] = 0.0
    if weights is not None:
        mass *= weights
    return herding.herd(embeddings, mass, spec=spec, context=context, choice=choice, pool=pool)


def _uncertainty(p: Tensor, which: Uncertainty) -> Tensor:
    """Of distributions (s, C): (s,), with all digits however certain they are."""
    if which is Uncertainty.ENTROPY:
        return entropy(p)
    _, rest = split_mode(p)
    return rest.sum(1) if which is Uncertainty.CONFIDENCE else rest.sum(1) + rest.amax(1)
