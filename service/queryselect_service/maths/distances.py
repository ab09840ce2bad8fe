"""Euclidean distances that are fast in single precision and exact where a decision hangs on them.

Distances by the expansion |x|^2 + |c|^2 - 2 x.c are one matrix product, but they lose digits when the norms are much
larger than the distances. `Points` therefore works on rows that are shifted and scaled, and knows how wrong a fast
distance can be; what is too close to call is decided by direct differences in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from queryselect_service.shards import Shards

#: Centres that one matrix product takes at once.
CENTRES = 256
#: Bytes of direct float64 differences between two checks for cancellation.
DIRECT_BYTES = 256 << 20


class Points:
    """The rows of one slice, ready for distances to centres.

    Distances are those of the rows as given (or of their unit-length versions with `normalize`), times `scale`, a power
    of two that keeps squares from overflowing or vanishing; it changes no digit. The columns of `work` are shifted by
    their mean rounded to bfloat16: far offsets go, and integer or fixed-point data stay exact, so that their exact ties
    stay ties.
    """

    def __init__(self, embeddings: Tensor, pool: Shards, *, normalize: bool = False) -> None:
        """embeddings: (n, D), any float type; read, never written."""
        self.embeddings, self.pool, self.normalize, self.scale = embeddings, pool, normalize, 1.0
        n, dims, device = *embeddings.shape, embeddings.device
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        largest = torch.empty(n, dtype=torch.float64, device=device)
        for span in pool.spans(n, dims * embeddings.element_size()):
            low, high = embeddings[span].aminmax(dim=1)
            largest[span] = torch.maximum(-low, high).double()
        self.inert = largest == 0  # (n,), rows without length
        if not normalize:
            _, peak = pool.best(largest)
            widest = 120 if dtype == torch.float32 else 1000  # so that the scale itself is a normal number
            self.scale = 2.0 ** min(max(-math.frexp(float(peak))[1], -widest), widest)  # entries of about 1
        total = torch.zeros(dims, dtype=torch.float64, device=device)
        for span in pool.spans(n, dims * 8):
            total += self.exact(embeddings[span]).sum(0)
        self.mean = pool.sum(total) / pool.size  # (D,)
        self.shift = self.mean.to(torch.bfloat16).double()
        self.work = torch.empty(n, dims, dtype=dtype, device=device)
        self.norms = torch.empty(n, dtype=dtype, device=device)
        for span in pool.spans(n, dims * 8):
            self.work[span] = self._moved(embeddings[span])
            self.norms[span] = torch.linalg.vector_norm(self.work[span], dim=1).square_()
        self._error = _rounding(dtype) * (4 + math.sqrt(dims))

    def _moved(self, rows: Tensor) -> Tensor:
        """Rows (m, D) as given -> scaled or normalized, shifted rows: rounded once, after the shift."""
        dtype = self.work.dtype
        if self.normalize:
            return (self.exact(rows) - self.shift).to(dtype)
        return rows.to(dtype) * self.scale - self.shift.to(dtype)  # scaling is exact, so this rounds once too

    def error_bound(self, nearest: Tensor) -> Tensor:
        """How wrong the fast squared distances (n,) to the nearest centre can be, each.

        A product of D terms is wrong by the unit of rounding times the norms, and the nearest centre's squared norm is
        at most 2 |x|^2 + 2 d^2. The last term is for squares that vanish.
        """
        vanishing = self.work.shape[1] * torch.finfo(self.work.dtype).tiny
        return self._error * (3 * self.norms + 2 * nearest) + vanishing

    def exact(self, rows: Tensor) -> Tensor:
        """Rows (m, D) as given -> the float64 rows (m, D) whose distances count."""
        rows = rows.double()
        if self.normalize:
            rows = rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            lengths: Tensor = rows.norm(dim=-1, keepdim=True)
            return rows / lengths.clamp_min(torch.finfo(torch.float64).tiny)
        return rows * self.scale

    def update_nearest(self, nearest: Tensor, centres: Tensor) -> None:
        """Lowers `nearest` (n,), in place, to the fast squared distances to `centres` (m, D), rows as given."""
        moved = self.exact(centres) - self.shift  # (m, D)
        norms = moved.square().sum(1)  # (m,)
        dtype = self.work.dtype
        for first in range(0, len(moved), CENTRES):
            some, their = moved[first : first + CENTRES].to(dtype), norms[first : first + CENTRES].to(dtype)
            for span in self.pool.spans(len(self.work), self.work.element_size() * (self.work.shape[1] + len(some))):
                if len(some) == 1:
                    squared = torch.addmv(self.norms[span], self.work[span], some[0], alpha=-2)  # (s,)
                    squared += their[0]
                else:
                    squared = torch.addmm(their, self.work[span], some.T, alpha=-2).amin(1)  # (s,)
                    squared += self.norms[span]
                torch.minimum(nearest[span], squared.clamp_min_(0), out=nearest[span])

    def direct(self, rows: Tensor, centres: Tensor) -> Tensor:
        """The distance (m,) of each of `rows` (m, D) to the nearest of `centres` (c, D), by differences in float64."""
        nearest = torch.full((len(rows),), math.inf, dtype=torch.float64, device=rows.device)
        exact, dims = self.exact(centres), centres.shape[1]
        for first in range(0, len(centres), CENTRES):
            some = exact[first : first + CENTRES]
            step = max(1, DIRECT_BYTES // (8 * dims * len(some)))
            for start in range(0, len(rows), step):
                self.pool.check()
                part = slice(start, start + step)
                distances = torch.cdist(
                    self.exact(rows[part]), some, compute_mode="donot_use_mm_for_euclid_dist"
                )  # (s, c)
                nearest[part] = torch.minimum(nearest[part], distances.amin(1))
        return nearest


def _rounding(dtype: torch.dtype) -> float:
    """The unit of rounding of a matrix product in `dtype`: a process may have allowed torch coarser ones."""
    if dtype == torch.float32:
        return {"highest": torch.finfo(dtype).eps, "high": 2.0**-10}.get(torch.get_float32_matmul_precision(), 2.0**-7)
    return torch.finfo(dtype).eps
