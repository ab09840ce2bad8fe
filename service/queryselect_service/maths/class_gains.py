"""The gains tr[(I + G_x)⁻¹ H_x] of many rows while G and H change, computed where they may be the largest.

Taking a row lets G fall for all others, so that with S = (I + G)⁻¹ as it was when last computed for a row,

    S ⪯ (I + G)⁻¹ ⪯ S/(1 - δ),   δ = tr[S (G_then - G)],   tr[S H] <= gain <= tr[S H]/(1 - δ):

I + G = S⁻¹ - (G_then - G), and S^½ (G_then - G) S^½ is at most its trace times I. Two sums over the entries bound a
gain; factors are computed for the few rows only whose bound reaches the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from queryselect_service.maths.fisher import ROUNDING, TIE
from queryselect_service.shards import Shards

#: Columns up to which gains are cheaper than their bounds.
FEW = 2


class Gains:
    """Of rows with G and H (m, c, c), which change in place. Between two restarts G only falls."""

    def __init__(self, g: Tensor, h: Tensor, pool: Shards) -> None:
        self._g, self._h, self._pool = g, h, pool
        self._bounded = g.shape[1] > FEW
        self._s = torch.empty_like(g) if self._bounded else g[:0]
        self._then = g.new_empty(len(g))  # tr[S G_then], and what rounding may take from it
        self._kept = g.new_empty(g.shape[1], len(g))  # the diagonal of (I + G)⁻¹, (c, m)

    def restart(self) -> tuple[Tensor, Tensor]:
        """All gains (m,), exactly, when G and H are newly computed; and how wrong rounding may have made them."""
        # Rounding errors are measured by what the diagonals (c, m) of G and H were, below 0 as they may be by rounding.
        self._first_g, self._first_h = (x.diagonal(dim1=1, dim2=2).T.abs().contiguous() for x in (self._g, self._h))
        return self._all()

    def now(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """The gains (m,) and errors: exactly where they may be the best of the rows that are free (m,), of all slices.

        Elsewhere a bound, below the best.
        """
        if not self._bounded:
            return self._all()
        gains, lower = self._g.new_empty(2, len(self._g))
        for span in self._pool.spans(len(gains), 32 * self._g.shape[1] ** 2):
            s, g, h = (x[span].flatten(1) for x in (self._s, self._g, self._h))
            lower[span] = torch.linalg.vecdot(s, h).clamp_min_(0)
            gains[span] = lower[span] / (1 - self._then[span] + torch.linalg.vecdot(s, g)).clamp_min(0)
        gains = torch.where(gains >= 0, gains, torch.inf)  # where δ reaches 1, there is no bound
        errors = self._errors(slice(None), gains)
        margin = self._g.shape[1] * errors  # of sums over all entries, not over a diagonal
        least = lower.new_full((1,), -torch.inf)  # so that there is a best where limits leave no row at all
        _, best = self._pool.best(torch.cat([torch.where(free, lower - margin, -torch.inf), least]))
        at = (free & ~(gains + margin < best * (1 - 2 * TIE))).nonzero().squeeze(1)
        for span in self._pool.spans(len(at), 64 * self._g.shape[1] ** 2):
            gains[at[span]] = self._exactly(at[span])
        errors[at] = self._errors(at, gains[at])
        return gains, errors

    def _all(self) -> tuple[Tensor, Tensor]:
        gains = self._g.new_empty(len(self._g))
        for span in self._pool.spans(len(gains), 64 * self._g.shape[1] ** 2):
            gains[span] = self._exactly(span)
        return gains, self._errors(slice(None), gains)

    def _errors(self, at: slice | Tensor, gains: Tensor) -> Tensor:
        scale = self._first_h[:, at] + gains.nan_to_num(posinf=0.0) * self._first_g[:, at]
        return ROUNDING * (self._kept[:, at] * scale).sum(0)

    def _exactly(self, at: slice | Tensor) -> Tensor:
        """The gains of some rows, with which their S are computed anew."""
        g, h, columns = self._g[at], self._h[at], self._g.shape[1]
        if columns == 1:
            self._kept[0, at] = kept = 1 / (1 + g[:, 0, 0])
            gains = kept * h[:, 0, 0]
            return gains.clamp_min_(0)
        if columns == FEW:  # by hand: for matrices so small, calls take longer than what they do
            first, part = 1 + g[:, 0, 0], g[:, 0, 1] / (1 + g[:, 0, 0])
            second = 1 + g[:, 1, 1] - part * g[:, 0, 1]
            rest = h[:, 1, 1] - 2 * part * h[:, 0, 1] + part.square() * h[:, 0, 0]
            self._kept[:, at] = torch.stack([1 / first + part.square() / second, 1 / second])
            gains = h[:, 0, 0] / first + rest / second
            return gains.clamp_min_(0)
        eye = torch.eye(columns, dtype=g.dtype, device=g.device)
        root, _ = torch.linalg.cholesky_ex(g + eye)
        half = torch.linalg.solve_triangular(root, eye.expand_as(g), upper=False)
        self._s[at], kept = half.mT @ half, half.square().sum(1).T
        self._kept[:, at] = kept
        self._then[at] = columns - kept.sum(0) + ROUNDING * columns * (kept * self._first_g[:, at]).sum(0)
        found: Tensor = ((half @ h) * half).sum((1, 2))
        return found.clamp_min_(0)
