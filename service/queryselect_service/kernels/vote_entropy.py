"""The entropy of a committee's votes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from queryselect_service.maths.information import entropy
from queryselect_service.maths.predictions import Samples
from queryselect_service.spec import Disagreement, LabelScore, parameter
from queryselect_service.strategy import pointwise


@dataclass(frozen=True)
class VoteEntropy(Disagreement, LabelScore):
    """Its parameters; those of label scores matter in a multi-label task only."""

    soft: bool = parameter(False, "Whether members vote with their probabilities, not with their likeliest class")
    normalize: bool = parameter(False, "Whether the entropy is divided by the largest that it can be")

    def check_inputs(self, shapes: Mapping[str, tuple[int, ...]], returns: Collection[str]) -> None:
        """Raises InvalidInput for one sample, but for soft votes: these may be split within one."""
        if not self.soft:
            super().check_inputs(shapes, returns)


@pointwise(
    VoteEntropy,
    cost="O(N K C) time, O(N) memory",
    citation="Dagan and Engelson, Committee-based sampling for training probabilistic classifiers (ICML 1995)",
)
def vote_entropy(samples: Annotated[Samples, "N K C"], *, spec: VoteEntropy = VoteEntropy()) -> Tensor:
    """Prefers rows on which parameter samples vote for many classes alike, in nats.

        s = - sum_c v_c ln v_c,  v_c = |{k : argmax p_k = c}| / K;  soft: v_c = (1/K) sum_k p_kc
        normalize: divided by ln min(C, K), soft by ln C

    samples: (n, K, C), labels L for C in a multi-label task. A sample votes for its likeliest class, the first of
    equal ones.
    Returns (n,) or (n, L).

    >>> import torch
    >>> vote_entropy(Samples(torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])), spec=VoteEntropy(normalize=True)).tolist()
    [1.0]
    """
    members, classes = samples.shape[1], 2 if samples.multilabel else samples.shape[2]
    # Sorted, so that the same votes for other classes are a tie, and not apart by the rounding of a sum.
    shares = samples[:].mean(1) if spec.soft else samples.votes.sort(-1, descending=True).values / members
    scores = entropy(shares)
    most = math.log(classes if spec.soft else min(classes, members))
    return scores / most if spec.normalize and most > 0 else scores
