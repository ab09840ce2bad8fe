"""Expected gradient length of the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.predictions import split_mode
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Task, pointwise


@dataclass(frozen=True)
class ExpectedGradientLength(Spec):
    """Its parameters."""

    squared: bool = parameter(False, "Whether the expectation is of the squared length")
    bias: bool = parameter(False, "Whether the layer has a bias, whose gradient counts too")


@pointwise(
    ExpectedGradientLength,
    cost="O(N (D + C)) time, O(N) memory",
    citation="Settles, Craven and Ray, Multiple-instance active learning (NeurIPS 2007), section 4.2",
)
def expected_gradient_length(
    embeddings: Annotated[Tensor, "N D"],
    probabilities: Annotated[Tensor, "N C"],
    *,
    spec: ExpectedGradientLength = ExpectedGradientLength(),
    task: Task = Task.MULTICLASS,
) -> Tensor:
    r"""Prefers rows that would change the last layer most, in expectation over their labels.

        s = |h| Σ_y p_y √(1 - 2 p_y + |p|²),   squared: |h|² (1 - |p|²),   with a bias |h|² + 1 for |h|²
        per label: |h| √(Σ_l q_l (1 - q_l)),   squared: its square

    embeddings: (n, D), h. probabilities: (n, C), or (n, L, 2) per label. Returns (n,).

    >>> h, p = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[0.5, 0.5]]).double()
    >>> expected_gradient_length(h, p, spec=ExpectedGradientLength(squared=True))
    tensor([12.5000], dtype=torch.float64)
    """
    # Where squares would overflow or vanish, the largest entry is taken out first.
    largest = embeddings.abs().amax(1).clamp_min(1.0 if spec.bias else 1e-300)
    squares = (embeddings / largest[:, None]).square().sum(1)
    if spec.bias:
        squares = squares + largest.pow(-2)
    length = largest * squares.sqrt()
    if task is Task.MULTILABEL:
        expected = probabilities.prod(-1).sum(-1)  # E of the squared residual
        factor, root = expected, expected.sqrt()
    else:
        # 1 - p_y, and |p|² - p_y², as sums of the others where y is the mode: they keep their digits in a prediction
        # that is nearly certain.
        _, rest = split_mode(probabilities)
        mode = probabilities.argmax(1, keepdim=True)
        missing = (1 - probabilities).scatter(1, mode, rest.sum(1, keepdim=True))
        squares_of_others = probabilities.square().sum(1, keepdim=True) - probabilities.square()
        squares_of_others = squares_of_others.scatter(1, mode, rest.square().sum(1, keepdim=True))
        residual = missing.square() + squares_of_others  # (n, C), |e_y - p|²
        factor, root = (probabilities * residual).sum(1), (probabilities * residual.sqrt()).sum(1)
    most = torch.finfo(length.dtype).max / 4
    return length.square().clamp(max=most) * factor if spec.squared else length.clamp(max=most) * root
