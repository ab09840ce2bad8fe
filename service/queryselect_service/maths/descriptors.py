"""What the Fisher kernel compares: rows as sums of products of factors, whose similarities are matrix products.

The similarity of rows m and n is

    R(m, n) = Σ over terms  Π over the term's factors  f_m · f_n

so that one set of functions serves every form of the kernel: one long factor, two short ones per scale, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Tensor

from queryselect_service.maths.distances import coarseness, power_of_two
from queryselect_service.shards import Whole

#: What the authors add to standard deviations, so that a row without any becomes 0.
EPSILON = 1e-10
#: Standardising rows of float32 the plain way is good enough up to this mean over deviation, and this inverse of the
#: deviation, where the 1e-10 is less than a rounding error.
PLAIN_MEAN, PLAIN_INVERSE = 8.0, 500.0
#: How many roundings go into a product beside those of its own sum.
ROUNDING = 64
#: Factors that together have no more columns become one.
MERGED_WIDTH = 512
#: Columns that tell of most rows that they are not 0.
FEW = 2
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


@dataclass(frozen=True)
class Term:
    """Factors (n, w) of some rows. lengths: (n,) float64, at least the product of the lengths of a row's factors."""

    factors: tuple[Tensor, ...]
    lengths: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Term:
        return Term(tuple(factor[rows] for factor in self.factors), self.lengths[rows])


#: Rows as sums of terms.
Terms = list[Term]


def standardized(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (n, L) less their mean, over their standard deviation + 1e-10: unbiased, over the row's own entries.

    The product of two such rows is (L - 1) times their correlation. Rows of equal entries become 0.
    """
    x, width = x.to(dtype), x.shape[1]
    if dtype is torch.float32 and width > 1:
        unbiased = x.new_full((width,), math.sqrt((width - 1) / width))
        found, mean, inverse = torch.native_layer_norm(x, (width,), unbiased, None, 0.0)
        # Where a far mean takes digits, or 1e-10 is anything beside a deviation, or where that is 0, it won't do.
        if ((inverse < PLAIN_INVERSE) & (mean.abs() * inverse < PLAIN_MEAN)).all():
            return found
    return _standardized(x)


def _standardized(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=1, keepdim=True)
    spread, largest = high - low, torch.finfo(x.dtype).max
    # Measured from the middle, so that a far mean takes no digits, and in units of the spread, so that no square
    # overflows or vanishes.
    spread = torch.where(spread.isfinite(), spread, high / 2 - low / 2).clamp_max_(largest)
    unit = torch.where(spread > 0, spread, 1)
    moved = x.sub(low / 2 + high / 2).div_(unit)
    moved.sub_(moved.mean(1, keepdim=True))
    deviation = torch.linalg.vector_norm(moved, dim=1, keepdim=True).div_(math.sqrt(max(1, x.shape[1] - 1)))
    moved.div_(deviation.add_(EPSILON / unit).clamp_min_(torch.finfo(x.dtype).tiny))
    return moved.masked_fill_(spread == 0, 0)


class Head:
    """The last linear layer, W (C, L), for gradients of the loss with respect to its inputs: g = (p - e_y) W.

    weights: (C, L), W in units of `unit`, a power of two.
    """

    def __init__(self, weights: Tensor) -> None:
        """weights: (C, L); the unit is one in which no square overflows or vanishes."""
        self.unit = 1 / power_of_two(weights, Whole(len(weights)), torch.float64)
        self.weights = weights.double() / self.unit
        self.width = weights.shape[1]

    @cached_property
    def plain(self) -> Tensor:
        """A root of W Wᵀ, (C, min(C, L)), in the same unit."""
        return _root(self.weights)

    @cached_property
    def _centered(self) -> tuple[Tensor, float]:
        """The same of W less every class's mean, which takes its mean from a row of gradients; and a unit of it."""
        root = _root(self.weights - self.weights.mean(1, keepdim=True))
        largest = float(root.abs().max())
        return root, 2.0 ** (math.frexp(largest)[1] - KEPT_BITS) if largest else 1.0

    def standardized(self, residuals: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (n, min(C, L)) whose products are those of the gradients of `residuals` (n, C), standardised."""
        centered, step = self._centered
        rows = (residuals @ centered).div_(step).round_().mul_(step)
        deviation = torch.linalg.vector_norm(rows, dim=1, keepdim=True).div_(math.sqrt(max(1, self.width - 1)))
        return rows.div_(deviation.add_(EPSILON / self.unit)).to(dtype)


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


def product(*factors: Tensor, widths: Sequence[int]) -> Term:
    """The term of standardised factors (n, w); widths: of what was standardised, which tell their lengths."""
    length = math.prod(math.sqrt(max(0, width - 1)) for width in widths)
    return Term(factors, torch.full((len(factors[0]),), length, dtype=torch.float64, device=factors[0].device))


def total(factors: Sequence[Tensor], widths: Sequence[int]) -> Terms:
    """The sum of the products of standardised factors; short ones are put together, for fewer and longer products."""
    if sum(factor.shape[1] for factor in factors) > MERGED_WIDTH:
        return [product(factor, widths=(width,)) for factor, width in zip(factors, widths, strict=True)]
    factor = torch.cat(tuple(factors), 1) if len(factors) > 1 else factors[0]
    length = math.sqrt(sum(max(0, width - 1) for width in widths))
    return [Term((factor,), torch.full((len(factor),), length, dtype=torch.float64, device=factor.device))]


def taken(terms: Terms, rows: slice | Tensor) -> Terms:
    """Those of some rows."""
    return [term[rows] for term in terms]


def joined(parts: Sequence[Terms]) -> Terms:
    """The rows of all parts."""
    return [
        Term(
            tuple(torch.cat(factors) for factors in zip(*(term.factors for term in terms), strict=True)),
            torch.cat([term.lengths for term in terms]),
        )
        for terms in zip(*parts, strict=True)
    ]


def coarse(terms: Terms) -> Terms:
    """The same in bfloat16."""
    return [Term(tuple(factor.bfloat16() for factor in term.factors), term.lengths) for term in terms]


def alive(terms: Terms) -> Tensor:
    """Which rows (n,) are like anything: have a term none of whose factors is 0."""
    found = torch.zeros(len(terms[0].lengths), dtype=torch.bool, device=terms[0].lengths.device)
    for term in terms:
        some = torch.ones_like(found)
        for factor in term.factors:
            some &= _not_zero(factor)
        found |= some
    return found


def _not_zero(factor: Tensor) -> Tensor:
    found = factor[:, :FEW].any(1)
    if not found.all():  # mostly they all are
        rest = (~found).nonzero().squeeze(1)
        found[rest] = factor[rest].any(1)
    return found


def similarity(a: Terms, b: Terms) -> Tensor:
    """R (m, n) of every row of one and every row of the other."""
    found: Tensor | None = None
    for ours, theirs in zip(a, b, strict=True):
        f, *others = ours.factors
        g, *their_others = theirs.factors
        if found is not None and not others:
            found.addmm_(f, g.T)
            continue
        some = f @ g.T
        for f, g in zip(others, their_others, strict=True):
            some.mul_(f @ g.T)
        found = some if found is None else found.add_(some)
    assert found is not None  # there is a term
    return found


def paired(a: Terms, b: Terms) -> Tensor:
    """R (n,) of every row of one and its own row of the other."""
    found = torch.zeros_like(a[0].lengths)
    for ours, theirs in zip(a, b, strict=True):
        some = torch.ones_like(found)
        for f, g in zip(ours.factors, theirs.factors, strict=True):
            some *= (f * g).sum(1)
        found += some
    return found


def error_bound(a: Terms, b: Terms) -> Tensor:
    """How wrong `similarity` can be for each row (m,) of one and any row of the other."""
    bound = torch.zeros_like(a[0].lengths)
    for ours, theirs in zip(a, b, strict=True):
        dtype, width = ours.factors[0].dtype, max(factor.shape[1] for factor in ours.factors)
        part = BFLOAT16_ERROR
        if dtype is not torch.bfloat16:
            part = torch.finfo(dtype).eps * (ROUNDING + width)
            part += coarseness() if dtype is torch.float32 else 0.0
        largest = theirs.lengths.max() if len(theirs.lengths) else theirs.lengths.sum()
        bound += math.expm1(len(ours.factors) * math.log1p(part)) * ours.lengths * largest
    return bound


def spans_bytes(widths: int, others: int, item: int) -> int:
    """What `spans` is told of a row that is multiplied with so many others: bytes, and arithmetic in terms of them."""
    return item * (4 * widths + 4 * others) + widths * others // 32


def batches(size: int, rows: int) -> Iterator[slice]:
    """Slices that cover `size`, so many rows each."""
    for start in range(0, size, rows):
        yield slice(start, start + rows)
