"""The mean divergence of a committee from its consensus."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from queryselect_service.maths.information import mutual_information
from queryselect_service.spec import Disagreement, SummedLabelScore
from queryselect_service.strategy import pointwise


class ConsensusKl(Disagreement, SummedLabelScore):
    """Its parameters matter in a multi-label task only."""


@pointwise(
    ConsensusKl,
    cost="O(N K C) time, O(N) memory",
    citation="McCallum and Nigam, Employing EM and pool-based active learning for text classification (ICML 1998)",
)
def consensus_kl(samples: Annotated[Tensor, "N K C"]) -> Tensor:
    """Prefers rows on which committee members diverge most from their consensus, on average, in nats.

        s = (1/K) sum_k KL(p_k | p̄) = H(p̄) - (1/K) sum_k H(p_k),  p̄ = (1/K) sum_k p_k

    The same number as BALD under another name, and computed by the same function: the divergence from the mean is the
    information that a member's identity has about its prediction.

    samples: (n, K, C), or (n, K, L, 2) per label. Returns (n,) or (n, L), in [0, min(ln C, ln K)].

    >>> import torch
    >>> consensus_kl(torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])).tolist()
    [0.0, 0.6931471824645996]
    """
    return mutual_information(samples)
