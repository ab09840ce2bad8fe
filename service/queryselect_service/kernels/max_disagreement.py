"""The largest divergence of a committee's member from the consensus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from queryselect_service.maths.information import divergences
from queryselect_service.maths.labels import aggregate_labels
from queryselect_service.spec import Disagreement, SummedLabelScore
from queryselect_service.strategy import Task, pointwise


@dataclass(frozen=True)
class MaxDisagreement(Disagreement, SummedLabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    MaxDisagreement,
    cost="O(N K C) time, O(N) memory",
    citation="Danka and Horvath, modAL: a modular active learning framework for Python (2018), arXiv:1805.00979, "
    "max disagreement sampling; McCallum and Nigam (ICML 1998) for the divergence",
)
def max_disagreement(
    samples: Annotated[Tensor, "N K C"],
    *,
    spec: MaxDisagreement = MaxDisagreement(),
    task: Task = Task.MULTICLASS,
) -> Tensor:
    """Prefers rows on which one committee member diverges most from the consensus, in nats.

        s = max_k KL(p_k | p̄),  p̄ = (1/K) sum_k p_k
        per label: max_k of the aggregate over labels of KL(p_kl | p̄_l); summed, that is the divergence of the label
        vectors where a member predicts labels independently

    samples: (n, K, C), or (n, K, L, 2) per label. Returns (n,), in [0, ln K], summed over labels at most L ln K.

    >>> import torch
    >>> max_disagreement(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]])).tolist()
    [0.6931471824645996, 0.0]
    """
    found = divergences(samples)  # (n, K) or (n, K, L)
    if task is Task.MULTILABEL:
        found = aggregate_labels(found, spec.label_aggregation, spec.top_k)
    return found.amax(1)
