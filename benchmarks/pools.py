"""Inputs for the benchmarks: seeded, on the generator's device, of a case's sizes and type."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.case import Case

#: Rows, and numbers, that are made at once, so that making them takes little memory beside them.
ROWS, NUMBERS = 1 << 16, 1 << 22
#: Dimensions of the embeddings that a Bayesian head is on.
HEAD_DIMS = 32


def nothing(*_: object) -> dict[str, Tensor]:
    """No inputs: all that matters is how many rows there are."""
    return {}


def predictions(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Probabilities (N, C) of a softmax over normal logits: sure of some rows, unsure of others."""
    found = _empty(case, case.sizes.C, generator)
    for start in range(0, len(found), ROWS):
        block = found[start : start + ROWS]
        block[:] = _normal(len(block), case.sizes.C, generator).mul_(2).softmax(1)
    return {"probabilities": found}


def embeddings(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Embeddings (N, D), normal."""
    found = _empty(case, case.sizes.D, generator)
    for start in range(0, len(found), ROWS):
        block = found[start : start + ROWS]
        block[:] = _normal(len(block), case.sizes.D, generator)
    return {"embeddings": found}


def classified(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Embeddings (N, D) around the centres of C classes, and the probabilities (N, C) of a linear head on them.

    The head is right of most rows and sure of some: its largest probability is about a half on average.
    """
    sizes = case.sizes
    centres = _normal(sizes.C, sizes.D, generator)
    x, p = _empty(case, sizes.D, generator), _empty(case, sizes.C, generator)
    for start in range(0, sizes.N, ROWS):
        rows = slice(start, min(start + ROWS, sizes.N))
        own = torch.randint(sizes.C, (rows.stop - start,), generator=generator, device=generator.device)
        block = _normal(len(own), sizes.D, generator) + 3 / math.sqrt(sizes.D) * centres[own]
        x[rows] = block
        p[rows] = (1.5 / math.sqrt(sizes.D) * block @ centres.T).softmax(1)
    return {"embeddings": x, "probabilities": p}


def samples(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Predictions (N, K, C) under K parameter samples: a row's logits, disturbed by between nothing and a lot.

    What the samples tell of a row's label is between nothing and a good part of what they can. Rows have nothing to do
    with each other.
    """
    sizes = case.sizes
    found = _samples(case, sizes.N, generator)
    step = max(1, NUMBERS // (sizes.K * sizes.C))
    for start in range(0, sizes.N, step):
        block = found[start : start + step]
        n = len(block)
        own = _normal(n, sizes.C, generator).mul_(2)[:, None]  # (n, 1, C)
        much = 3 * torch.rand(n, 1, 1, generator=generator, device=generator.device)
        block[:] = (own + much * _normal(n, sizes.K * sizes.C, generator).view(block.shape)).softmax(2)
    return {"samples": found}


def consistent_samples(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Predictions (N, K, C) of a linear head with K samples of its weights, the same for every row."""
    return {"samples": _predicted(case, case.sizes.N, _heads(case, generator), generator)}


def with_targets(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """The same, and predictions (M, K, C) of target rows that count alike."""
    heads = _heads(case, generator)
    return {
        "samples": _predicted(case, case.sizes.N, heads, generator),
        "target_samples": _predicted(case, case.sizes.M, heads, generator),
        "target_weights": torch.ones(case.sizes.M, dtype=case.dtype, device=generator.device),
    }


def _heads(case: Case, generator: torch.Generator) -> Tensor:
    """Weights (D, K C): those that the samples have in common, and what each has of its own."""
    sizes = case.sizes
    common = _normal(HEAD_DIMS, sizes.C, generator)[:, None]  # (D, 1, C)
    own = _normal(HEAD_DIMS, sizes.K * sizes.C, generator).view(HEAD_DIMS, sizes.K, sizes.C)
    return (2 * common + own).flatten(1).div_(math.sqrt(HEAD_DIMS))


def _predicted(case: Case, rows: int, heads: Tensor, generator: torch.Generator) -> Tensor:
    found = _samples(case, rows, generator)
    step = max(1, NUMBERS // heads.shape[1])
    for start in range(0, rows, step):
        block = found[start : start + step]
        block[:] = (_normal(len(block), HEAD_DIMS, generator) @ heads).view(block.shape).softmax(2)
    return found


def _samples(case: Case, rows: int, generator: torch.Generator) -> Tensor:
    return torch.empty(rows, case.sizes.K, case.sizes.C, dtype=case.dtype, device=generator.device)


def _empty(case: Case, width: int, generator: torch.Generator) -> Tensor:
    return torch.empty(case.sizes.N, width, dtype=case.dtype, device=generator.device)


def _normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator, device=generator.device)
