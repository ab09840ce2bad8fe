"""Factors L_x of a row's Fisher information in its logits, L_x L_xᵀ = diag(p) - p pᵀ, whole or in its likely classes.

Many or wide ones are never written out: what is needed are the products with them and with their transposes, a few
operations per class. Tensors hold a block of m rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from queryselect_service.maths.fisher import widened

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

    def partners(self, mass: Tensor) -> Tensor:
        """These rows as what others are paired with, each with its mass (n,): what `pair` reads, n rows or n c columns.

        Three steps give Σ_y k_xy L_xᵀ L_y L_yᵀ L_x: `pair` sums over some y, its sums add up, `paired` ends it.
        """

    def pair(self, k: Tensor, partners: Tensor) -> Tensor:
        """What sums over y come to for k (m, n), the weight of every pair: (m, w)."""

    def paired(self, sums: Tensor) -> Tensor:
        """(m, c, c) of sums (m, w)."""


def _by_classes(factors: Factors, mass: Tensor) -> Tensor:
    """Factors.partners as L_y L_yᵀ for all pairs of classes: (n, C (C + 1) / 2 or more)."""
    outer = factors.outer()
    pairs = torch.cat([outer[:, k, k:] for k in range(outer.shape[1])], dim=1)
    return widened(pairs.mul_(mass[:, None]))


def between(factors: Factors, middle: Tensor) -> Tensor:
    """Lᵀ K L for symmetric K (m, C, C): (m, c, c)."""
    return factors.transposed(factors.transposed(middle).mT)


def written(factors: Factors, rows: int, like: Tensor) -> Tensor:
    """Lᵀ for so many rows, (m, c, C). like: a tensor of the same type and place."""
    eye = torch.eye(factors.columns, dtype=like.dtype, device=like.device)
    return factors.times(eye.expand(rows, -1, -1))


def _paired(factors: Factors, sums: Tensor, classes: int) -> Tensor:
    """Factors.paired for these."""
    at = torch.triu_indices(classes, classes, device=sums.device)
    found, sums = sums.new_empty(len(sums), classes, classes), sums[:, : at.shape[1]]
    found[:, at[0], at[1]] = sums
    found[:, at[1], at[0]] = sums
    return between(factors, found)


@dataclass(frozen=True)
class AllClasses:
    """All classes. The factor has C - 1 columns: those of a class against the ones before it, for all but the first.

        L_jj = √(p_j r_j / (p_j + r_j)),   L_ij = -p_i L_jj / r_j  for i < j,   r_j = Σ_{i < j} p_i

    (Tanabe and Sagae 1992, the Cholesky factor of a multinomial covariance, from its last row up.) Unlike
    √p_j (e_j - p), whose columns are linearly dependent, it loses no digits where the information is large.

    p: (m, C). over_before: (m, C - 1), 1/r_j. diagonal: (m, C - 1), L_jj.
    """

    p: Tensor
    over_before: Tensor
    diagonal: Tensor

    @staticmethod
    def of(p: Tensor) -> AllClasses:
        """Those of probabilities (m, C), float64."""
        before = p.cumsum(1)[:, :-1]  # (m, C - 1), r_j as a sum, so that small ones keep their digits
        own, both = p[:, 1:], p[:, 1:] + before
        share = torch.where(both > 0, before / torch.where(both > 0, both, 1.0), 0.0)
        over_before = torch.where(before > 0, 1 / torch.where(before > 0, before, 1.0), 0.0)
        return AllClasses(p, over_before, (own * share).sqrt())

    @property
    def columns(self) -> int:
        """How many there are, C - 1."""
        return self.diagonal.shape[1]

    def __getitem__(self, rows: slice) -> AllClasses:
        return AllClasses(self.p[rows], self.over_before[rows], self.diagonal[rows])

    def transposed(self, y: Tensor) -> Tensor:
        """See Factors."""
        found = (y[..., :-1] * self.p[:, None, :-1]).cumsum_(-1)  # (m, r, C - 1), Σ_{i < j} p_i y_i
        return found.mul_(-self.over_before[:, None]).add_(y[..., 1:]).mul_(self.diagonal[:, None])

    def times(self, y: Tensor) -> Tensor:
        """See Factors."""
        own = y * self.diagonal[:, None]
        found = torch.empty(*y.shape[:-1], y.shape[-1] + 1, dtype=y.dtype, device=y.device)
        found[..., 0], found[..., 1:] = 0, own
        later = own.mul_(self.over_before[:, None]).flip(-1).cumsum_(-1).flip(-1)  # (m, r, C - 1), from j on
        found[..., :-1] -= later.mul_(self.p[:, None, :-1])
        return found

    def outer(self) -> Tensor:
        """See Factors."""
        found = -self.p[:, :, None] * self.p[:, None, :]
        # p (1 - p) with 1 - p as the sum of the others: the off-diagonal entries of a row add up to minus its diagonal.
        found.diagonal(dim1=1, dim2=2).zero_()
        found.diagonal(dim1=1, dim2=2).copy_(-found.sum(2))
        return found

    def partners(self, mass: Tensor) -> Tensor:
        """See Factors."""
        return _by_classes(self, mass)

    def pair(self, k: Tensor, partners: Tensor) -> Tensor:
        """See Factors."""
        return k @ partners

    def paired(self, sums: Tensor) -> Tensor:
        """See Factors."""
        return _paired(self, sums, self.p.shape[1])


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

    def outer(self) -> Tensor:
        """See Factors."""
        rows = written(self, len(self.root), self.root)
        return rows.mT @ rows

    @property
    def _few(self) -> bool:
        """Whether there are so many classes that the entries of L_xᵀL_y are fewer than pairs of classes."""
        return self.rest.shape[1] ** 2 > ENTRY * self.columns**2

    def partners(self, mass: Tensor) -> Tensor:
        """See Factors."""
        if not self._few:
            return _by_classes(self, mass)
        return (written(self, len(mass), mass) * mass.sqrt()[:, None, None]).flatten(0, 1).T.contiguous()  # (C, n c)

    def pair(self, k: Tensor, partners: Tensor) -> Tensor:
        """See Factors."""
        if not self._few:
            return k @ partners
        inner = self._less_mean(partners[self.top].mT, self.rest @ partners)  # (m, n c, c)
        inner *= self.root[:, None]  # (L_xᵀL_y)ᵀ
        return (inner.mT @ (inner * k.repeat_interleave(self.columns, dim=1)[..., None])).flatten(1)

    def paired(self, sums: Tensor) -> Tensor:
        """See Factors."""
        if not self._few:
            return _paired(self, sums, self.rest.shape[1])
        return sums.view(-1, self.columns, self.columns)


@dataclass(frozen=True)
class Written:
    """Factors written out, for rows that are multiplied again and again: of few columns, that takes half the time.

    of: what they are. heads: (m, c, C), Lᵀ.
    """

    of: Factors
    heads: Tensor

    @property
    def columns(self) -> int:
        """See Factors."""
        return self.of.columns

    def __getitem__(self, rows: slice) -> Written:
        return Written(self.of[rows], self.heads[rows])

    def transposed(self, y: Tensor) -> Tensor:
        """See Factors."""
        return y @ self.heads.mT

    def times(self, y: Tensor) -> Tensor:
        """See Factors."""
        return y @ self.heads

    def outer(self) -> Tensor:
        """See Factors."""
        return self.of.outer()

    def partners(self, mass: Tensor) -> Tensor:
        """See Factors."""
        return self.of.partners(mass)

    def pair(self, k: Tensor, partners: Tensor) -> Tensor:
        """See Factors."""
        return self.of.pair(k, partners)

    def paired(self, sums: Tensor) -> Tensor:
        """See Factors."""
        return self.of.paired(sums)
