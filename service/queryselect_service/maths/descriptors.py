"""What the Fisher kernel compares: rows as sums of products of factors, whose similarities are matrix products.

Terms are a list of tuples of factors, each (n, w). The similarity of rows m and n is

    R(m, n) = Σ over terms  Π over the term's factors  f_m · f_n

so that one set of functions serves every form of the kernel: one long factor, two short ones per scale, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from queryselect_service.maths.distances import coarseness

#: Rows as factors.
Terms = list[tuple[Tensor, ...]]

#: What the authors add to standard deviations, so that a row without any becomes 0.
EPSILON = 1e-10
#: Digits (bits) that derived gradients keep: equal rows are then equal, wherever a product had them.
KEPT_BITS = 44
#: Products in bfloat16: how wrong one can be, as a part of the lengths of the two rows. 2^-9 for either and the result.
BFLOAT16_ERROR = 4 * 2.0**-9


@dataclass(frozen=True)
class Scale:
    """One scale of a descriptor: pooled features (n, L) and, where they are given, gradients (n, P) there."""

    embeddings: Tensor
    gradients: Tensor | None = None


def scales_of(inputs: Mapping[str, Tensor], prefix: str = "") -> tuple[Scale, ...]:
    """The scales among inputs by name, such as scales[0].gradients; embeddings and gradients alone are one scale."""
    names = (f"{prefix}scales[{at}]" for at in count())
    found = []
    for name in names:
        if f"{name}.embeddings" not in inputs:
            break
        found.append(Scale(inputs[f"{name}.embeddings"], inputs.get(f"{name}.gradients")))
    if not found and f"{prefix}embeddings" in inputs:
        found.append(Scale(inputs[f"{prefix}embeddings"], inputs.get(f"{prefix}gradients")))
    return tuple(found)


def standardized(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (n, L) less their mean, over their standard deviation + 1e-10: unbiased, over the row's own entries.

    The product of two such rows is (L - 1) times their correlation. Rows of equal entries become 0.
    """
    x = x.to(dtype)
    low, high = x.aminmax(dim=1, keepdim=True)
    spread = high - low
    # Measured from the middle, so that a far mean takes no digits, and in units of the spread, so that no square
    # overflows or vanishes.
    spread = torch.where(spread.isfinite(), spread, high / 2 - low / 2).clamp_max_(torch.finfo(dtype).max)
    unit = torch.where(spread > 0, spread, 1)
    moved = x.sub(low / 2 + high / 2).div_(unit)
    moved.sub_(moved.mean(1, keepdim=True))
    deviation = torch.linalg.vector_norm(moved, dim=1, keepdim=True).div_(math.sqrt(max(1, x.shape[1] - 1)))
    moved.div_(deviation.add_(EPSILON / unit).clamp_min_(torch.finfo(dtype).tiny))
    return moved.masked_fill_(spread == 0, 0)


class Head:
    """The last linear layer, W (C, L), for gradients of the loss with respect to its inputs: g = (p - e_y) W."""

    def __init__(self, weights: Tensor) -> None:
        """weights: (C, L)."""
        w = weights.double()
        self.width = w.shape[1]
        self.plain = _root(w)
        # Subtracting a row's mean from g is subtracting every class's mean from W.
        self._centered = _root(w - w.mean(1, keepdim=True))
        largest = float(self._centered.abs().max())
        self._step = 2.0 ** (math.frexp(largest)[1] - KEPT_BITS) if largest else 1.0

    def standardized(self, residuals: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (n, min(C, L)) whose products are those of the gradients of `residuals` (n, C), standardised."""
        rows = (residuals @ self._centered).div_(self._step).round_().mul_(self._step)
        deviation = torch.linalg.vector_norm(rows, dim=1, keepdim=True).div_(math.sqrt(max(1, self.width - 1)))
        return rows.div_(deviation.add_(EPSILON)).to(dtype)


def _root(w: Tensor) -> Tensor:
    """A matrix A (C, min(C, L)) with A Aᵀ = W Wᵀ: rows times A have the products of the same rows times W."""
    if w.shape[0] >= w.shape[1]:
        return w
    values, vectors = torch.linalg.eigh(w @ w.T)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def residuals(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The residuals p - e_y (n, C) of distributions (n, C) and labels (n,), with all digits however sure p is."""
    at = labels[:, None]
    others = probabilities.scatter(1, at, 0.0)
    return others.scatter(1, at, -others.sum(1, keepdim=True))


def merged(factors: Sequence[Tensor]) -> Terms:
    """One term of one factor: its products are the sums of the products of all `factors`."""
    return [(torch.cat(tuple(factors), 1) if len(factors) > 1 else factors[0],)]


def taken(terms: Terms, rows: slice | Tensor) -> Terms:
    """Those of some rows."""
    return [tuple(factor[rows] for factor in term) for term in terms]


def similarity(a: Terms, b: Terms) -> Tensor:
    """R (m, n) of every row of one and every row of the other."""
    total: Tensor | None = None
    for ours, theirs in zip(a, b, strict=True):
        product: Tensor | None = None
        for f, g in zip(ours, theirs, strict=True):
            some = f @ g.T
            product = some if product is None else product.mul_(some)
        assert product is not None  # a term has a factor
        total = product if total is None else total.add_(product)
    assert total is not None  # there is a term
    return total


def paired(a: Terms, b: Terms) -> Tensor:
    """R (n,) of every row of one and its own row of the other."""
    total = torch.zeros(len(a[0][0]), dtype=a[0][0].dtype, device=a[0][0].device)
    for ours, theirs in zip(a, b, strict=True):
        product = torch.ones_like(total)
        for f, g in zip(ours, theirs, strict=True):
            product *= (f * g).sum(1)
        total += product
    return total


def lengths(terms: Terms) -> list[Tensor]:
    """The product (n,) of the lengths of a row's factors, for every term: no similarity is larger than theirs."""
    found = []
    for term in terms:
        product = torch.linalg.vector_norm(term[0].float(), dim=1).double()
        for factor in term[1:]:
            product = product * torch.linalg.vector_norm(factor.float(), dim=1)
        found.append(product)
    return found


def error_bound(a: list[Tensor], b: list[Tensor], terms: Terms) -> Tensor:
    """How wrong `similarity` can be for each row of one (m,) and any row of the other, by their `lengths`."""
    total = torch.zeros_like(a[0])
    for mine, theirs, term in zip(a, b, terms, strict=True):
        dtype, width = term[0].dtype, max(factor.shape[1] for factor in term)
        if dtype is torch.bfloat16:
            part = BFLOAT16_ERROR
        else:
            part = torch.finfo(dtype).eps * (16 + width) + (coarseness() if dtype is torch.float32 else 0.0)
        largest = theirs.max() if len(theirs) else theirs.sum()
        total += (math.expm1(len(term) * math.log1p(part))) * mine * largest
    return total


def spans_bytes(widths: int, others: int, item: int) -> int:
    """What `spans` is told of a row that is multiplied with so many others: bytes, and arithmetic in terms of them."""
    return item * (4 * widths + 4 * others) + widths * others // 32


def batches(size: int, rows: int) -> Iterator[slice]:
    """Slices that cover `size`, so many rows each."""
    for start in range(0, size, rows):
        yield slice(start, start + rows)
