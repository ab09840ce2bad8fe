"""Expected gradient length of a linear head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.clock import timed
from queryselect_service.strategy import Sizes

#: Rows whose gradients are computed one by one.
ROWS = 500


def by_numpy(problem: Problem) -> Tensor:
    """The closed form: |x| sum_y p_y |p - e_y|."""
    x, p = problem.array("embeddings"), problem.array("probabilities")
    lengths = np.sqrt(1 - 2 * p + (p**2).sum(1, keepdims=True))
    scores = np.linalg.norm(x, axis=1) * (p * lengths).sum(1)
    return torch.from_numpy(np.argsort(-scores)[: problem.k])


def by_autograd(problem: Problem) -> Tensor | Part:
    """The definition: the gradient of every class of every row, in float64; of the first rows where there are more."""
    x, p = (problem.inputs[name][:ROWS].double() for name in ("embeddings", "probabilities"))
    seconds, scores = timed(lambda: torch.stack([_expected_length(*row) for row in zip(x, p, strict=True)]), x.device)
    n = len(problem.candidates)
    if n <= ROWS:
        return scores.topk(problem.k).indices
    return Part(seconds * n / ROWS, f"{ROWS} of {n} rows, scaled")


def _expected_length(x: Tensor, p: Tensor) -> Tensor:
    """The score () of a row x (D,) that a head predicts p (C,); w is what its weights are changed by."""
    w = x.new_zeros(len(p), len(x), requires_grad=True)
    total = x.new_zeros(())
    for label, probability in enumerate(p):
        loss = cross_entropy(p.log() + w @ x, torch.tensor(label, device=x.device))
        (gradient,) = torch.autograd.grad(loss, w)
        total += probability * gradient.norm()
    return total


BENCHMARKS = (
    Benchmark(
        strategy="expected_gradient_length",
        make=pools.classified,
        peers=(
            Peer("numpy", by_numpy, "the closed form"),
            Peer("autograd", by_autograd, "the definition", exact=True),
        ),
        floor=lambda sizes: {"read": sizes.item * sizes.N * (sizes.D + sizes.C)},
        quick=Case(Sizes(N=200, D=8, C=4, k=10)),
        cpu=(Case(Sizes(N=200_000, D=384, C=10, k=100)),),
        cuda=(Case(Sizes(N=1_280_000, D=384, C=1000, k=1000)),),
        scaling=Scaling(
            Sizes(N=50_000, D=64, C=10, k=100),
            {"N": (50_000, 400_000), "D": (48, 384), "C": (10, 80), "k": (1000, 8000)},
        ),
    ),
)
