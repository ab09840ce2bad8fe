"""Inputs for the benchmarks: seeded, on the generator's device, of a case's sizes and type."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.case import Case

#: Rows that are made at once, so that making them takes little memory beside them.
ROWS = 1 << 16


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


def _empty(case: Case, width: int, generator: torch.Generator) -> Tensor:
    return torch.empty(case.sizes.N, width, dtype=case.dtype, device=generator.device)


def _normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator, device=generator.device)
