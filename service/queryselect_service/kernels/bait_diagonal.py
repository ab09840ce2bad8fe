"""BAIT with the diagonals of M's inverse and of F."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.fisher import Rows, design_of, kinds, leader, least_of, picked, refuse_overflow
from queryselect_service.maths.predictions import Predictions
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import FisherDesign
from queryselect_service.strategy import ScoreKind, Selection, Sizes, strategy


@dataclass(frozen=True)
class BaitDiagonal(FisherDesign):
    """Its parameters are those of all that minimise tr(M^-1 F)."""


def _memory(sizes: Sizes, spec: BaitDiagonal) -> int:
    """A few numbers per row, a few (C, D), the picks' rows, several times to find the same ones, and spans of rows."""
    picks = 8 * min(spec.oversampling * sizes.k, sizes.N) * (sizes.D + sizes.C)
    at_once = min(sizes.N, SPAN_BYTES // (8 * (2 * sizes.D + 12 * sizes.C)))
    spans = 8 * at_once * (2 * sizes.D + 6 * sizes.C)
    return 8 * (6 * sizes.N + 8 * sizes.C * sizes.D) + 7 * picks + spans


@strategy(
    BaitDiagonal,
    kind=ScoreKind.GAIN,
    cost="O(N D C k) time, O(N + k (D + C)) memory",
    memory=_memory,
    work=lambda sizes: 4.0 * sizes.N * sizes.D * sizes.C * sizes.k,
    citation="Huseljic, Hahn, Herde, Rauch and Sick, Fast Fishing: approximating BAIT for efficient and scalable deep "
    "active image classification (2024), arXiv:2404.08981, section 5",
)
def bait_diagonal(
    embeddings: Annotated[Tensor, "N D"],
    probabilities: Annotated[Predictions, "N C"],
    weights: Annotated[Tensor, "N"] | None = None,
    labeled_embeddings: Annotated[Tensor, "M D"] | None = None,
    labeled_probabilities: Annotated[Predictions, "M C"] | None = None,
    labeled_weights: Annotated[Tensor, "M"] | None = None,
    *,
    spec: BaitDiagonal = BaitDiagonal(),
    context: Tensor,
    choice: Choice,
    pool: Shards,
) -> Selection:
    r"""Prefers rows as bait does, with only the diagonals a of M^-1 and f of F, (C, D) each.

        G_x = Lᵀ diag(t) L,  t_k = Σ_d a_kd x_d²;  H_x = Lᵀ diag(t') L,  t'_k = Σ_d a_kd² f_kd x_d²
        L Lᵀ = diag(p) - p pᵀ;  q = diag(L (I + G_x)⁻¹ Lᵀ)
        gain = tr[(I + G_x)⁻¹ H_x] = Σ_k q_k t'_k;  a_kd ← a_kd - a_kd² x_d² q_k

    Since Σ p = 1, no matrix need be inverted: with π_k = p_k / (1 + p_k t_k),  q_k = π_k (1 - π_k / Σ π). Backward the
    signs turn.

    embeddings: (n, D). probabilities: (n, C), or per label (n, L), each with q_l (1 - q_l) for L Lᵀ. weights: (n,),
    mass of a row in F. labeled_*: labelled rows that are not in the pool, M of them. Scores are the gains when chosen.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> p = Predictions(torch.tensor([[0.4, 0.3, 0.3], [0.9, 0.1, 0.0], [0.4, 0.3, 0.3]]))
    >>> from queryselect_service.shards import Whole
    >>> choice = Choice(2, torch.ones(3, dtype=torch.bool), Whole(3))
    >>> bait_diagonal(x, p, context=torch.tensor([], dtype=torch.int64), choice=choice, pool=Whole(3)).indices
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
    f = problem.total(_information)
    inverse = 1 / (problem.ridge + problem.context_total(_information))  # a, (C, D)
    choice.oversample(spec.oversampling)
    rows: list[Tensor] = []
    scores: list[Tensor] = []
    picks: list[tuple[Tensor, Tensor]] = []  # x (D,) and predictions (C,) as sent
    first = gains = _gains(problem.rows, inverse, f, problem.scale)
    for step in range(choice.steps):
        pool.progress(step, choice.steps)
        row, score, x, values = leader(choice, gains, embeddings, probabilities.values)
        if choice.ends(score):
            break
        choice.take(row)
        rows.append(row)
        scores.append(score)
        picks.append((x, values))
        inverse = _moved(_some(problem.rows, x[None], values[None]), inverse, problem.scale)
        if step + 1 < choice.steps:
            gains = _gains(problem.rows, inverse, f, problem.scale)

    found = torch.stack(scores) if scores else gains[:0]
    refuse_overflow(found)
    numbers = torch.stack(rows) if rows else context[:0]
    left = torch.arange(len(numbers), device=numbers.device)
    if choice.excess:
        x, values = map(torch.stack, zip(*picks, strict=True))
        left = _backward(_some(problem.rows, x, values), numbers, inverse, f, problem.scale, choice)
    return picked(numbers[left], found[left], lambda: first)


def _some(like: Rows, embeddings: Tensor, values: Tensor) -> Rows:
    """Rows with these embeddings (m, D) and predictions (m, C), as they were sent."""
    return Rows(embeddings, like.predictions.of(values), like.mass.new_ones(len(values)), like.scale, like.pool)


def _backward(picks: Rows, numbers: Tensor, inverse: Tensor, f: Tensor, scale: float, choice: Choice) -> Tensor:
    """Drops picks (m,) until no more are left than wanted, each time the one of least loss: which (r,) are left.

    numbers: (m,), their global rows. The losses of a step are one product, as gains are.
    """
    kind = kinds(torch.cat([picks.x(slice(None)).square_(), picks.predictions.values], dim=1))
    left = torch.arange(len(numbers), device=numbers.device)
    while choice.excess:
        losses = -_gains(picks.at(left), inverse, f, -scale)
        drop = left[least_of(losses, choice.droppable(numbers[left]), numbers[left], kind[left])]
        inverse = _moved(picks.at(drop[None]), inverse, -scale)
        choice.drop(numbers[drop])
        left = left[left != drop]
    return left


def _information(rows: Rows) -> Tensor:
    """The diagonal of Σ mass I_x: (C, D)."""
    dims, classes = rows.embeddings.shape[1], rows.predictions.shape[1]
    found = torch.zeros(classes, dims, dtype=torch.float64, device=rows.mass.device)
    for span in rows.spans(2 * dims * classes, 2 * dims + 8 * classes):
        found.addmm_((rows.predictions.variances(span) * rows.mass[span, None]).T, rows.x(span).square_())
    return found


def _gains(rows: Rows, inverse: Tensor, f: Tensor, scale: float) -> Tensor:
    """What the objective falls by when a row is taken, for every row (n,), a and f (C, D); dropped for a scale < 0."""
    classes, dims = inverse.shape
    both = torch.cat([inverse, inverse.square() * f])  # (2 C, D)
    gains = torch.empty_like(rows.mass)
    for span in rows.spans(4 * dims * classes, 4 * dims + 24 * classes):
        t, rise = (rows.x(span).square_() @ both.T).chunk(2, dim=1)  # (m, C)
        gains[span] = scale * (_kept(rows.predictions.at(span), scale * t) * rise).sum(1)
    return gains


def _moved(row: Rows, inverse: Tensor, scale: float) -> Tensor:
    """What a becomes when a row is taken; dropped for a scale < 0."""
    squares = row.x(slice(None))[0].square_()  # (D,)
    q = scale * _kept(row.predictions, scale * (inverse @ squares)[None])[0]  # (C,)
    return inverse - inverse.square() * squares * q[:, None]


def _kept(predictions: Predictions, t: Tensor) -> Tensor:
    """Q (m, C) for t (m, C), both without the scale that a pick's information has."""
    if predictions.multilabel:
        variances = predictions.variances()
        return variances / (1 + variances * t)
    p = predictions[:]
    pi = p / (1 + p * t)
    most = pi.abs().argmax(1, keepdim=True)
    rest = pi.scatter(1, most, 0.0).sum(1, keepdim=True)  # where one class has nearly all, Σ π - π is what is left
    total = rest + pi.gather(1, most)
    return pi * (total - pi).scatter(1, most, rest) / total
