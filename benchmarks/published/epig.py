"""BALD and EPIG by their formulas, plainly, in the type that the samples have.

Houlsby, Huszár, Ghahramani and Lengyel, Bayesian active learning for classification and preference learning (2011),
arXiv:1112.5745, equation 2; Bickford Smith, Kirsch, Farquhar, Gal, Foster and Rainforth, Prediction-oriented Bayesian
active learning (AISTATS 2023), arXiv:2304.08151, equation 5. Written from the formulas alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import Peer, Problem

BALD, WHOLE, CHUNKS = "BALD by its formula", "EPIG by its formula", "EPIG by its formula, in chunks"
#: Joint probabilities that are made at once where they are made in chunks.
CHUNK = 1 << 24


def entropy(p: Tensor) -> Tensor:
    """-sum_c p ln p over the last axis, what is not a number at 0 counting as 0."""
    return -torch.nan_to_num(p * p.log()).sum(-1)


def bald(problem: Problem) -> Tensor:
    """The picks (k,) by H(mean_k p_k) - mean_k H(p_k)."""
    p = problem.inputs["samples"]
    return (entropy(p.mean(1)) - entropy(p).mean(1)).topk(problem.k).indices


def epig(problem: Problem) -> Tensor:
    """The picks (k,), all joint probabilities made at once."""
    return _scores(problem.inputs["samples"], problem.inputs["target_samples"]).topk(problem.k).indices


def in_chunks(problem: Problem) -> Tensor:
    """The same, of some rows at a time."""
    p, targets = problem.inputs["samples"], problem.inputs["target_samples"]
    rows = max(1, CHUNK // (targets.shape[0] * targets.shape[2] * p.shape[2]))
    found = [_scores(p[start : start + rows], targets) for start in range(0, len(p), rows)]
    return torch.cat(found).topk(problem.k).indices


def _scores(p: Tensor, targets: Tensor) -> Tensor:
    """(n,): mean over targets of H(y) + H(y_t) - H(y, y_t), of p (n, K, C) and targets (M, K, C)."""
    members = p.shape[1]
    columns = targets.transpose(0, 1).flatten(1)  # (K, M C)
    joint = p.transpose(1, 2) @ columns / members  # (n, C, M C)
    total = entropy(p.mean(1)) + entropy(targets.mean(1)).mean()
    return total - entropy(joint.flatten(1)) / len(targets)


PEERS = (
    Peer(WHOLE, epig, "all joint probabilities at once"),
    Peer(CHUNKS, in_chunks, f"{CHUNK >> 20} Mi joint probabilities at once"),
)
