"""Factors L_x of a row's Fisher information in its logits, L_x L_xᵀ = diag(p) - p pᵀ, whole or in its likely classes.

They are never written out: what is needed are the products with them and with their transposes, a few operations per
class. Tensors hold a block of m rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: How many multiply-adds of a product take as long as one entry of L_xᵀL_y, which is written, read and multiplied.
ENTRY = 1000


class Factors(Protocol):
    """The factors (C, c) of m rows."""

    @property
    def columns(self) -> int:
        """How many columns L_x has, c."""

    def __getitem__(self, rows: slice) -> Factors:
        """Those of some rows."""

    def transposed(self, y: Tensor) -> Tensor:
        """L_xᵀ y for y (m, r, C): (m, r, c)."""

    def times(self, y: Tensor) -> Tensor:
        """L_x y for y (m, r, c): (m, r, C)."""

    def outer(self) -> Tensor:
        """L_x L_xᵀ: (m, C, C)."""

    def between(self, rows: Tensor, mass: Tensor, other: Any) -> Tensor:
        """Σ_y k_xy L_xᵀ L_y L_yᵀ L_x for k = rows (m, n): (m, c, c).

        mass: (n,), that of each y. other: the factors of y, of the same kind.
        """


@dataclass(frozen=True)
class AllClasses:
    """All classes. The factor has C - 1 columns: those of a class, of the rest against the next class, and so on.

        L_jj = √(p_j r_j / (p_j + r_j)),   L_ij = -p_i L_jj / r_j  for i > j,   r_j = Σ_{i > j} p_i

    (Tanabe and Sagae 1992, the Cholesky factor of a multinomial covariance.) Unlike √p_j (e_j - p), whose columns are
    linearly dependent, it loses no digits where the information is large.

    p: (m, C). over_rest: (m, C - 1), 1/r_j. diagonal: (m, C - 1), L_jj.
    """

    p: Tensor
    over_rest: Tensor
    diagonal: Tensor

    @staticmethod
    def of(p: Tensor) -> AllClasses:
        """Those of probabilities (m, C), float64."""
        rest = p.flip(1).cumsum(1).flip(1)[:, 1:]  # (m, C - 1), r_j as a sum, so that small ones keep their digits
        head, both = p[:, :-1], p[:, :-1] + rest
        share = torch.where(both > 0, rest / torch.where(both > 0, both, 1.0), 0.0)
        over_rest = torch.where(rest > 0, 1 / torch.where(rest > 0, rest, 1.0), 0.0)
        return AllClasses(p, over_rest, (head * share).sqrt())

    @property
    def columns(self) -> int:
        """C = C - 1."""
        return self.diagonal.shape[1]

    def __getitem__(self, rows: slice) -> AllClasses:
        return AllClasses(self.p[rows], self.over_rest[rows], self.diagonal[rows])

    def transposed(self, y: Tensor) -> Tensor:
        """See Factors."""
        weighted = y[..., 1:] * self.p[:, None, 1:]
        later = weighted.flip(-1).cumsum(-1).flip(-1)  # (m, r, C - 1), Σ_{i > j} p_i y_i
        return (y[..., :-1] - later.mul_(self.over_rest[:, None])).mul_(self.diagonal[:, None])

    def times(self, y: Tensor) -> Tensor:
        """See Factors."""
        own = y * self.diagonal[:, None]
        found = torch.cat([own, torch.zeros_like(own[..., :1])], dim=-1)
        found[..., 1:] -= (own * self.over_rest[:, None]).cumsum(-1).mul_(self.p[:, None, 1:])
        return found

    def outer(self) -> Tensor:
        """See Factors."""
        found = -self.p[:, :, None] * self.p[:, None, :]
        # p (1 - p) with 1 - p as the sum of the others: the off-diagonal entries of a row add up to minus its diagonal.
        found.diagonal(dim1=1, dim2=2).zero_()
        found.diagonal(dim1=1, dim2=2).copy_(-found.sum(2))
        return found

    def between(self, rows: Tensor, mass: Tensor, other: AllClasses) -> Tensor:
        """See Factors."""
        return _by_classes(self, rows, mass, other)


def _by_classes(factors: Factors, rows: Tensor, mass: Tensor, other: Factors) -> Tensor:
    """See Factors.between: the sum over y of what stands for all pairs of classes, as one product."""
    outer = other.outer()
    classes = outer.shape[1]
    at = torch.triu_indices(classes, classes, device=rows.device)
    sums = rows @ outer[:, at[0], at[1]].mul_(mass[:, None])  # (m, C (C + 1) / 2)
    found = rows.new_empty(len(rows), classes, classes)
    found[:, at[0], at[1]] = found[:, at[1], at[0]] = sums
    return factors.transposed(factors.transposed(found).mT)


@dataclass(frozen=True)
class TopClasses:
    """The c likeliest classes: column j is √p̃_j (e_j - p) for each j of them, p the distribution over all classes.

    p̃ is p over these classes, renormalised or not. Of classes of equal probability the first counts as likelier.

    rest: (m, C), p but for the likeliest class. top: (m, c), the classes, likeliest first. root: (m, c), √p̃. mode:
    (m,), p̂, the largest p. As elsewhere, 1 - p̂ is the sum of the rest, which keeps its digits in a prediction nearly
    certain.
    """

    rest: Tensor
    top: Tensor
    root: Tensor
    mode: Tensor

    @staticmethod
    def of(p: Tensor, columns: int, *, renormalize: bool) -> TopClasses:
        """Those of probabilities (m, C), float64."""
        top = p.argsort(dim=1, descending=True, stable=True)[:, :columns].contiguous()
        expectation = p.gather(1, top)
        if renormalize:
            expectation = expectation / expectation.sum(1, keepdim=True)
        return TopClasses(p.scatter(1, top[:, :1], 0.0), top, expectation.sqrt(), p.gather(1, top[:, :1])[:, 0])

    @property
    def columns(self) -> int:
        """The number c of classes that count."""
        return self.top.shape[1]

    def __getitem__(self, rows: slice) -> TopClasses:
        return TopClasses(self.rest[rows], self.top[rows], self.root[rows], self.mode[rows])

    def _less_mean(self, y: Tensor, rest: Tensor) -> Tensor:
        """y_j - p.y for the columns' classes. y: (m, r, c), entries of these classes. rest: (m, r), rest.y."""
        first = self.rest.sum(1)[:, None] * y[..., 0] - rest
        others = y[..., 1:] - (self.mode[:, None] * y[..., 0] + rest)[..., None]
        return torch.cat([first[..., None], others], dim=2)

    def transposed(self, y: Tensor) -> Tensor:
        """See Factors."""
        entries = y.gather(2, self.top[:, None].expand(-1, y.shape[1], -1))
        return self._less_mean(entries, (y @ self.rest[..., None])[..., 0]).mul_(self.root[:, None])

    def times(self, y: Tensor) -> Tensor:
        """See Factors."""
        own = y * self.root[:, None]
        found = (-own.sum(2, keepdim=True) * self.rest[:, None]).scatter_add_(
            2, self.top[:, None, 1:].expand(-1, y.shape[1], -1), own[..., 1:]
        )
        mode = self.rest.sum(1)[:, None] * own[..., 0] - self.mode[:, None] * own[..., 1:].sum(2)
        return found.scatter_(2, self.top[:, None, :1].expand(-1, y.shape[1], -1), mode[..., None])

    def written(self) -> Tensor:
        """L_xᵀ: (m, c, C)."""
        eye = torch.eye(self.columns, dtype=self.root.dtype, device=self.root.device)
        return self.times(eye.expand(len(self.root), -1, -1))

    def outer(self) -> Tensor:
        """See Factors."""
        written = self.written()
        return written.mT @ written

    def between(self, rows: Tensor, mass: Tensor, other: TopClasses) -> Tensor:
        """See Factors. Of many classes, the entries of L_xᵀL_y instead of all pairs of classes."""
        if self.rest.shape[1] ** 2 <= ENTRY * self.columns**2:
            return _by_classes(self, rows, mass, other)
        columns = other.columns
        theirs = other.written().flatten(0, 1).T.contiguous()  # (C, n c)
        entries = theirs[self.top].mT  # (m, n c, c)
        inner = self._less_mean(entries, self.rest @ theirs) * self.root[:, None]  # (m, n c, c), (L_xᵀL_y)ᵀ
        weighted = inner * (rows * mass).repeat_interleave(columns, dim=1)[..., None]
        return inner.mT @ weighted
