"""BALD: Bayesian active learning by disagreement."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.information import logarithms, mutual_information, surprise, without_noise
from queryselect_service.maths.noise import uniform
from queryselect_service.shards import Shards, Whole
from queryselect_service.spec import Disagreement, SummedLabelScore, parameter
from queryselect_service.strategy import Task, pointwise

#: Labels up to which JOINT sums over all label vectors; beyond, it draws as many as there are of so many labels.
EXACT_LABELS = 13
#: Float64 entries of JOINT's configurations that are in memory at once.
JOINT_ENTRIES = 1 << 19


class BaldAggregation(enum.StrEnum):
    """How the information in a row's labels becomes the row's score, when the task is multi-label."""

    MEAN = "MEAN"
    SUM = "SUM"
    MAX = "MAX"
    TOP_K_MEAN = "TOP_K_MEAN"
    JOINT = "JOINT"


@dataclass(frozen=True)
class Bald(Disagreement, SummedLabelScore):
    """Its parameters matter in a multi-label task only."""

    label_aggregation: BaldAggregation = parameter(  # type: ignore[assignment]  # those of all label scores, and JOINT
        BaldAggregation.SUM,
        "How label scores become the row's score, in a multi-label task; JOINT: the information of the label vector, "
        "exact up to 13 labels",
    )


@pointwise(
    Bald,
    cost="O(N K C) time, O(N) memory; JOINT: O(N K 2^min(C, 13)) time",
    citation="Houlsby, Huszar, Ghahramani and Lengyel, Bayesian active learning for classification and preference "
    "learning (2011), arXiv:1112.5745, equation 2",
)
def bald(
    samples: Annotated[Tensor, "N K C"],
    *,
    spec: Bald = Bald(),
    task: Task = Task.MULTICLASS,
    pool: Shards | None = None,
) -> Tensor:
    """Prefers rows whose label tells most about the parameters, in nats.

        s = I(y; θ) = H(p̄) - (1/K) sum_k H(p_k),  p̄ = (1/K) sum_k p_k,  0 ln 0 = 0
        per label: I(y_l; θ); JOINT: I(y_1 … y_L; θ), at most their sum, since θ makes labels depend on each other

    samples: (n, K, C), or (n, K, L, 2) per label; they need not be of the same parameters in every row. Returns (n,) or
    (n, L), in [0, min(ln C, ln K)]; JOINT (n,), in [0, min(L ln 2, ln K)].

    >>> import torch
    >>> bald(torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])).tolist()
    [0.0, 0.6931471824645996]
    """
    if task is Task.MULTICLASS or spec.label_aggregation is not BaldAggregation.JOINT:
        return mutual_information(samples)
    n, members, labels, _ = samples.shape
    pool = pool or Whole(n)
    information = _exact if labels <= EXACT_LABELS else _drawn
    found, step = samples.new_empty(n), max(1, JOINT_ENTRIES // (members << min(labels, EXACT_LABELS)))
    for start in range(0, n, step):
        pool.check()
        found[start : start + step] = information(samples[start : start + step])
    return found


def _exact(samples: Tensor) -> Tensor:
    """I(y_1 … y_L; θ), (n,), of (n, K, L, 2), by the probabilities of all label vectors.

    The labels are split in two halves, so that p(y) = (1/K) sum_k p(y_first | k) p(y_second | k) is a matrix product.
    """
    members, labels = samples.shape[1:3]
    first, second = _vectors(samples[:, :, : labels // 2]), _vectors(samples[:, :, labels // 2 :])
    p = first.transpose(1, 2) @ second / members  # (n, 2^(L // 2), 2^(L - L // 2))
    total = surprise(p).sum((1, 2))
    expected = surprise(samples).sum((2, 3)).mean(1)
    return without_noise(total - expected, total).clamp(max=min(labels * math.log(2), math.log(members)))


def _vectors(samples: Tensor) -> Tensor:
    """The probabilities (n, K, 2^L) of all label vectors under each parameter sample, of (n, K, L, 2)."""
    found = samples.new_ones(*samples.shape[:2], 1)
    for label in range(samples.shape[2]):
        found = (found[..., None] * samples[:, :, label, None]).flatten(2)
    return found


def _drawn(samples: Tensor) -> Tensor:
    """The same by label vectors drawn from each parameter sample in turn: the mean of KL(p(θ | y) | uniform).

    Every row is drawn for by the same numbers: its score depends on that row alone, and rows that are alike stay so.
    """
    n, members, labels, _ = samples.shape
    draws = -(-(1 << EXACT_LABELS) // members)  # per parameter sample
    numbers = torch.arange(draws * members * labels, device=samples.device)
    noise = uniform(0, numbers).view(members, draws, labels)
    logs = logarithms(samples)
    odds, absent = logs[..., 1] - logs[..., 0], logs[..., 0].sum(-1)  # (n, K, L), (n, K)
    found, most = samples.new_empty(n), math.log(members)
    for row in range(n):
        drawn = (noise < samples[row, :, None, :, 1]).double().flatten(0, 1)  # (K draws, L)
        z = drawn @ odds[row].T + absent[row]  # (K draws, K), ln p(y | k)
        z -= z.amax(1, keepdim=True)
        likely = z.exp()
        total = likely.sum(1)
        found[row] = most + (likely.mul_(z).sum(1) / total - total.log()).mean()  # ln K + sum_k w_k ln w_k
    return without_noise(found, torch.full_like(found, most)).clamp(max=min(labels * math.log(2), most))
